"""Language models as their public JAX code writes them, tiny: what is fused, values and gradients in float64.

Own code. Each keeps what distinguishes its family for a matcher: where masks and scales come from, how heads are split,
which norm, which activation, what a loss reads.
"""

from __future__ import annotations

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import zenith_jax as zenith

B, T, WIDTH, HEADS, VOCABULARY = 2, 6, 16, 2, 24
D = WIDTH // HEADS


@pytest.fixture
def tokens(rng):
    return jnp.asarray(rng.integers(VOCABULARY, size=(B, T)), jnp.int32)


@pytest.fixture
def padding():
    return jnp.arange(T) < jnp.array([T, 4])[:, None]


# --- GPT-2: flax.linen, fused qkv, causal and padding masks combined, an additive bias made by lax.select -------------


class Gpt2Attention(nn.Module):
    @nn.compact
    def __call__(self, x, padding):
        query, key, value = jnp.split(nn.Dense(3 * WIDTH, name="c_attn")(x), 3, axis=-1)
        query, key, value = (a.reshape(*a.shape[:2], HEADS, D) for a in (query, key, value))
        causal = nn.make_causal_mask(jnp.ones((1, T)), dtype="bool")
        mask = nn.combine_masks(jnp.broadcast_to(padding[:, None, None], (B, 1, T, T)), causal)
        bias = jax.lax.select(
            mask > 0, *(jnp.full(mask.shape, x, jnp.float32) for x in (0.0, jnp.finfo(jnp.float32).min))
        )
        weights = nn.dot_product_attention_weights(query, key, bias=bias)
        out = jnp.einsum("...hqk,...khd->...qhd", weights, value)
        return nn.Dense(WIDTH, name="c_proj")(out.reshape(*x.shape))


class Gpt2(nn.Module):
    layers: int = 2

    @nn.compact
    def __call__(self, tokens, padding):
        embedding = nn.Embed(VOCABULARY, WIDTH)
        x = embedding(tokens) + nn.Embed(T, WIDTH)(jnp.arange(T))
        for _ in range(self.layers):
            x = x + Gpt2Attention()(nn.LayerNorm(epsilon=1e-5)(x), padding)
            y = nn.gelu(nn.Dense(4 * WIDTH)(nn.LayerNorm(epsilon=1e-5)(x)), approximate=True)
            x = x + nn.Dense(WIDTH)(y)
        return embedding.attend(nn.LayerNorm(epsilon=1e-5)(x))


def test_gpt2_with_its_loss(check_fused, tokens, padding):
    model = Gpt2()
    params = model.init(jax.random.key(0), tokens, padding)

    def loss(params, tokens, padding):
        logits = model.apply(params, tokens, padding)[:, :-1].astype(jnp.float32)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        return (losses * padding[:, 1:]).sum() / padding[:, 1:].sum()

    check_fused(
        loss,
        *(params, tokens, padding),
        counts={"attention": 2, "layer_norm": 1, "add_layer_norm": 4, "gelu_tanh": 2, "linear_cross_entropy": 1},
        floor_ulps=64,
    )


# --- BERT: flax.linen, norm after the sum, exact gelu, padding as an additive bias ------------------------------------


class BertLayer(nn.Module):
    @nn.compact
    def __call__(self, x, bias):
        heads = lambda name: nn.Dense(WIDTH, name=name)(x).reshape(B, T, HEADS, D)  # noqa: E731
        query, key, value = heads("query"), heads("key"), heads("value")
        out = nn.dot_product_attention(query, key, value, bias=bias).reshape(B, T, WIDTH)
        x = nn.LayerNorm(epsilon=1e-12)(nn.Dense(WIDTH)(out) + x)
        y = nn.Dense(WIDTH)(nn.gelu(nn.Dense(4 * WIDTH)(x), approximate=False))
        return nn.LayerNorm(epsilon=1e-12)(y + x)


class Bert(nn.Module):
    @nn.compact
    def __call__(self, tokens, padding):
        bias = (1.0 - padding[:, None, None].astype(jnp.float32)) * -1e9
        x = nn.Embed(VOCABULARY, WIDTH)(tokens) + nn.Embed(T, WIDTH)(jnp.arange(T))
        x = nn.LayerNorm(epsilon=1e-12)(x)
        for _ in range(2):
            x = BertLayer()(x, bias)
        return nn.tanh(nn.Dense(WIDTH)(x[:, 0]))


def test_bert(check_fused, tokens, padding):
    model = Bert()
    params = model.init(jax.random.key(0), tokens, padding)
    check_fused(
        model.apply,
        *(params, tokens, padding),
        counts={"attention": 2, "layer_norm": 1, "add_layer_norm": 4, "gelu_erf": 2},
        floor_ulps=64,
    )


# --- Llama: flax.nnx, RMSNorm that casts, half-split RoPE, repeated keys and values, SwiGLU, scan over the layers -----


def rotated(x, base=1e4):
    """Half-split rotary embedding, as Llama's."""
    frequencies = base ** (-jnp.arange(0, D, 2) / D)
    angle = jnp.arange(x.shape[1])[:, None] * frequencies
    cos, sin = (jnp.concatenate([f(angle)] * 2, axis=-1)[:, None] for f in (jnp.cos, jnp.sin))
    turned = jnp.concatenate([-x[..., D // 2 :], x[..., : D // 2]], axis=-1)
    return x * cos + turned * sin


class LlamaNorm(nnx.Module):
    def __init__(self):
        self.weight = nnx.Param(jnp.ones(WIDTH))

    def __call__(self, x):
        wide = x.astype(jnp.float32)
        variance = jnp.square(wide).mean(-1, keepdims=True)
        return self.weight * (wide * jax.lax.rsqrt(variance + 1e-6)).astype(x.dtype)


class LlamaLayer(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        dense = lambda n, m: nnx.Linear(n, m, use_bias=False, rngs=rngs)  # noqa: E731
        self.query, self.key, self.value, self.out = (dense(WIDTH, n) for n in (WIDTH, D, D, WIDTH))
        self.gate, self.up, self.down = dense(WIDTH, 32), dense(WIDTH, 32), dense(32, WIDTH)
        self.before, self.after = LlamaNorm(), LlamaNorm()

    def __call__(self, x):
        y = self.before(x)
        query, key, value = (f(y).reshape(*y.shape[:2], -1, D) for f in (self.query, self.key, self.value))
        query, key = rotated(query), rotated(key)
        key, value = (jnp.repeat(a, HEADS, axis=2) for a in (key, value))
        logits = jnp.einsum("bthd,bshd->bhts", query, key) / jnp.sqrt(D)
        allowed = jnp.tril(jnp.ones((1, 1, y.shape[1], y.shape[1]), bool))
        weights = jax.nn.softmax(jnp.where(allowed, logits, jnp.finfo(logits.dtype).min).astype(jnp.float32), axis=-1)
        x = x + self.out(jnp.einsum("bhts,bshd->bthd", weights.astype(x.dtype), value).reshape(x.shape))
        y = self.after(x)
        return x + self.down(nnx.silu(self.gate(y)) * self.up(y))


@pytest.mark.parametrize("remat", [False, True])
def test_llama_with_scanned_layers(check_fused, rng, remat):
    @nnx.vmap(in_axes=0, out_axes=0)
    def stacked(key):
        return LlamaLayer(nnx.Rngs(key))

    graph, state = nnx.split(stacked(jax.random.split(jax.random.key(0), 3)))

    def layer(x, state):
        return nnx.merge(graph, state)(x), None

    def model(state, x):
        return jax.lax.scan(jax.checkpoint(layer) if remat else layer, x, state)[0]

    x = jnp.asarray(rng.normal(size=(B, T, WIDTH)), jnp.float32)
    # The norm before attention has its sum in the scan's last iteration: no sum to fuse.
    check_fused(
        model,
        state,
        x,
        counts={"attention": 1, "rope": 2, "rms_norm": 1, "add_rms_norm": 1, "gated_silu": 1},
        floor_ulps=128,
    )


# --- Gemma: einsum weights, norm with 1 + scale, groups merged into heads, local layers, GeGLU ------------------------


def gemma_norm(x, scale):
    variance = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(variance + 1e-6) * (1 + scale)


def gemma_layer(p, x, *, window=None):
    y = gemma_norm(x, p["pre_attention"])
    query = jnp.einsum("BTD,NDH->BTNH", y, p["query"])
    key, value = jnp.einsum("BSD,CKDH->CBSKH", y, p["key_value"])
    query, key = rotated(query) * D**-0.5, rotated(key)
    kv_heads = key.shape[2]
    grouped = query.reshape(B, T, kv_heads, -1, D)
    logits = jnp.einsum("BTKGH,BSKH->BTKGS", grouped, key).reshape(B, T, -1, T)
    mask = jnp.tril(jnp.ones((T, T), bool))
    if window is not None:
        mask = mask * jnp.triu(jnp.ones((T, T), bool), 1 - window)
    weights = jax.nn.softmax(jnp.where(mask[None, :, None], logits, -2.3819763e38), axis=-1)
    weights = weights.reshape(B, T, kv_heads, -1, T)
    out = jnp.einsum("BTKGS,BSKH->BTKGH", weights, value).reshape(B, T, -1, D)
    x = x + gemma_norm(jnp.einsum("BTNH,NHD->BTD", out, p["out"]), p["post_attention"])
    gate, up = jnp.einsum("BTD,CDF->CBTF", gemma_norm(x, p["pre_mlp"]), p["gating"])
    return x + gemma_norm((nn.gelu(gate) * up) @ p["down"], p["post_mlp"])


def gemma_parameters(rng):
    shapes = dict(
        pre_attention=(WIDTH,),
        query=(4, WIDTH, D),
        key_value=(2, 2, WIDTH, D),
        out=(4, D, WIDTH),
        post_attention=(WIDTH,),
        pre_mlp=(WIDTH,),
        gating=(2, WIDTH, 24),
        down=(24, WIDTH),
        post_mlp=(WIDTH,),
    )
    return {k: jnp.asarray(rng.normal(size=s) / 3, jnp.float32) for k, s in shapes.items()}


@pytest.mark.parametrize("window", [None, 3])
def test_gemma(check_fused, rng, window):
    x = jnp.asarray(rng.normal(size=(B, T, WIDTH)), jnp.float32)
    report = check_fused(
        lambda p, x: gemma_layer(p, x, window=window),
        *(gemma_parameters(rng), x),
        counts={"attention": 1, "rope": 2, "rms_norm": 3, "add_rms_norm": 1, "gated_gelu_tanh": 1},
        floor_ulps=128,
    )
    (attention,) = [s for s in report.fused if s.op == "attention"]
    assert ("causal" if window is None else "band") in attention.detail and "mask" not in attention.detail


# --- T5: no scale, a learned bias of relative positions and the mask's added to it, RMSNorm, relu ---------------------


def t5_bucket(distance, buckets=8, reach=16):
    buckets //= 2
    side, distance = (distance > 0) * buckets, jnp.abs(distance)
    exact = buckets // 2
    far = jnp.log(distance / exact + np.finfo(np.float32).eps) / jnp.log(reach / exact) * (buckets - exact)
    far = jnp.minimum(exact + far, buckets - 1).astype(jnp.int32)
    return side + jnp.where(distance < exact, distance, far)


class T5Layer(nn.Module):
    @nn.compact
    def __call__(self, x, bias):
        y = nn.RMSNorm(epsilon=1e-6)(x)
        query, key, value = (nn.Dense(WIDTH, use_bias=False)(y).reshape(B, T, HEADS, D) for _ in range(3))
        weights = nn.dot_product_attention_weights(query * jnp.sqrt(jnp.float32(D)), key, bias=bias)
        out = jnp.einsum("...hqk,...khd->...qhd", weights, value).reshape(B, T, WIDTH)
        x = x + nn.Dense(WIDTH, use_bias=False)(out)
        y = nn.relu(nn.Dense(32, use_bias=False)(nn.RMSNorm(epsilon=1e-6)(x)))
        return x + nn.Dense(WIDTH, use_bias=False)(y)


class T5(nn.Module):
    @nn.compact
    def __call__(self, tokens, padding):
        distance = jnp.arange(T)[None] - jnp.arange(T)[:, None]
        bias = nn.Embed(8, HEADS)(t5_bucket(distance)).transpose(2, 0, 1)[None]
        bias = bias + jnp.where(padding[:, None, None], 0.0, jnp.finfo(jnp.float32).min)
        x = nn.Embed(VOCABULARY, WIDTH)(tokens)
        for _ in range(2):
            x = T5Layer()(x, bias)
        return nn.RMSNorm(epsilon=1e-6)(x)


def test_t5_encoder(check_fused, tokens, padding):
    model = T5()
    params = model.init(jax.random.key(0), tokens, padding)
    check_fused(
        model.apply,
        *(params, tokens, padding),
        counts={"attention": 2, "rms_norm": 1, "add_rms_norm": 4},
        floor_ulps=128,
    )


# --- a decoding step with a cache; equinox, without a batch, under vmap -----------------------------------------------


def test_decoding_with_a_cache(check_fused, rng):
    def step(q, k, v, keys, values, position):
        zero = jnp.zeros_like(position)
        keys = jax.lax.dynamic_update_slice(keys, k, (zero, position, zero, zero))
        values = jax.lax.dynamic_update_slice(values, v, (zero, position, zero, zero))
        allowed = jnp.arange(keys.shape[1]) <= position
        logits = jnp.where(allowed, jnp.einsum("bthd,bshd->bhts", q, keys) * D**-0.5, -1e10)
        return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(logits, -1), values), keys, values

    q, k, v = (jnp.asarray(rng.normal(size=(B, 1, HEADS, D)), jnp.float32) for _ in range(3))
    keys, values = (jnp.asarray(rng.normal(size=(B, T, HEADS, D)), jnp.float32) for _ in range(2))
    check_fused(step, q, k, v, keys, values, jnp.int32(3), counts={"attention": 1}, floor_ulps=64)


class Block(eqx.Module):
    attention: eqx.nn.MultiheadAttention
    mlp: eqx.nn.MLP
    first: eqx.nn.LayerNorm
    second: eqx.nn.LayerNorm

    def __init__(self, key):
        one, two = jax.random.split(key)
        self.attention = eqx.nn.MultiheadAttention(HEADS, WIDTH, key=one)
        self.mlp = eqx.nn.MLP(WIDTH, WIDTH, 32, depth=1, activation=jax.nn.silu, key=two)
        self.first, self.second = eqx.nn.LayerNorm(WIDTH), eqx.nn.LayerNorm(WIDTH)

    def __call__(self, x):
        y = jax.vmap(self.first)(x)
        x = x + self.attention(y, y, y, mask=jnp.tril(jnp.ones((T, T), bool)))
        return x + jax.vmap(self.mlp)(jax.vmap(self.second)(x))


def test_equinox_block_under_vmap(check_fused, rng):
    arrays, static = eqx.partition(Block(jax.random.key(0)), eqx.is_array)
    x = jnp.asarray(rng.normal(size=(B, T, WIDTH)), jnp.float32)
    check_fused(
        lambda arrays, x: jax.vmap(eqx.combine(arrays, static))(x),
        *(arrays, x),
        counts={"attention": 1, "layer_norm": 1, "add_layer_norm": 1, "silu": 1},
        floor_ulps=64,
    )


def test_dropout_on_attention_stays_as_it_is_drawn(rng):
    q, k, v = (jnp.asarray(rng.normal(size=(B, T, HEADS, D)), jnp.float32) for _ in range(3))

    def function(key, q, k, v):
        return nn.dot_product_attention(q, k, v, dropout_rng=key, dropout_rate=0.4, deterministic=False)

    report = zenith.explain(function)(jax.random.key(3), q, k, v)
    assert "attention" not in report.counts() and any("dropout" in s.reason for s in report.refused), str(report)
    np.testing.assert_allclose(
        zenith.jit(function)(jax.random.key(3), q, k, v), function(jax.random.key(3), q, k, v), rtol=1e-5, atol=1e-6
    )
