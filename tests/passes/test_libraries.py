"""What people write, in every library named in the README: the site is found, and its value and gradients are right."""

from __future__ import annotations

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import zenith_jax as zenith

B, T, S, H, D, E = 2, 9, 7, 4, 8, 6  # all different: a swapped axis cannot go unnoticed
WIDTH = H * D


def normal(rng, *shape, dtype=np.float32):
    return jnp.asarray(rng.normal(size=shape), dtype)


# --- flax.nnx ---------------------------------------------------------------------------------------------------------


def split(module):
    graph, state = nnx.split(module)
    return lambda state, *args, **kwargs: nnx.merge(graph, state)(*args, **kwargs), state


@pytest.mark.parametrize("mask", ["none", "causal", "padding and causal"])
def test_nnx_multi_head_attention_is_fused(rng, check_fused, mask):
    apply, state = split(nnx.MultiHeadAttention(H, WIDTH, decode=False, rngs=nnx.Rngs(0)))
    lengths = jnp.arange(T)[None] < jnp.array([T, 5])[:, None]

    def function(state, x):
        masks = {
            "none": None,
            "causal": nnx.make_causal_mask(x[..., 0]),
            "padding and causal": nnx.combine_masks(
                nnx.make_attention_mask(lengths, lengths), nnx.make_causal_mask(x[..., 0])
            ),
        }
        return apply(state, x, mask=masks[mask])

    report = check_fused(function, state, normal(rng, B, T, WIDTH), counts={"attention": 1}, floor_ulps=64)
    assert ("causal" in report.fused[0].detail) == (mask != "none")
    assert ("mask" in report.fused[0].detail) == ("padding" in mask)


def test_nnx_multi_head_attention_in_bfloat16_is_fused(rng, check_fused):
    make = lambda dtype: split(  # noqa: E731
        nnx.MultiHeadAttention(H, WIDTH, decode=False, dtype=dtype, use_bias=False, rngs=nnx.Rngs(0))
    )
    apply, state = make(jnp.bfloat16)
    check_fused(
        apply, state, normal(rng, B, T, WIDTH, dtype=jnp.bfloat16), counts={"attention": 1}, oracle=make(None)[0]
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(use_fast_variance=False),
        dict(use_bias=False),
        dict(use_scale=False),
        dict(dtype=jnp.bfloat16),
    ],
    ids=str,
)
def test_nnx_layer_norm_is_fused(rng, check_fused, options):
    apply, state = split(nnx.LayerNorm(WIDTH, rngs=nnx.Rngs(0), **options))
    wide, _ = split(nnx.LayerNorm(WIDTH, rngs=nnx.Rngs(0), **{**options, "dtype": None}))
    dtype = options.get("dtype", jnp.float32)
    check_fused(
        apply,
        state,
        normal(rng, B, T, WIDTH, dtype=dtype) * 3 + 1,
        counts={"layer_norm": 1},
        oracle=wide,
        # On a GPU XLA keeps float32 where the program rounds to bfloat16 and back; the kernel's cotangent is rounded,
        # as written, so that the float32 gradients of parameters are sums of terms off by half a bfloat16 ulp.
        floor_ulps=8.0 if dtype == jnp.float32 else 2.0,
        floor_dtype=dtype,
    )


def test_nnx_rms_norm_is_fused(rng, check_fused):
    apply, state = split(nnx.RMSNorm(WIDTH, rngs=nnx.Rngs(0)))
    check_fused(apply, state, normal(rng, B, T, WIDTH) + 1, counts={"rms_norm": 1})


# --- flax.linen -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("causal", [False, True])
def test_linen_attention_is_fused(rng, check_fused, causal, dtype):
    module, wide = nn.MultiHeadDotProductAttention(H, dtype=dtype), nn.MultiHeadDotProductAttention(H)
    x = normal(rng, B, T, WIDTH, dtype=dtype)
    params = module.init(jax.random.key(0), x, x)
    mask = (lambda x: nn.make_causal_mask(x[..., 0])) if causal else (lambda x: None)
    check_fused(
        lambda p, x: module.apply(p, x, x, mask=mask(x)),
        params,
        x,
        counts={"attention": 1},
        floor_ulps=64,
        oracle=lambda p, x: wide.apply(p, x, x, mask=mask(x)),
    )


@pytest.mark.parametrize(
    "module",
    [nn.LayerNorm(), nn.LayerNorm(use_fast_variance=False), nn.RMSNorm()],
    ids=["layer norm", "two-pass layer norm", "rms norm"],
)
def test_linen_norms_are_fused(rng, check_fused, module):
    x = normal(rng, B, T, WIDTH) * 2 + 1
    params = module.init(jax.random.key(0), x)
    name = "rms_norm" if isinstance(module, nn.RMSNorm) else "layer_norm"
    check_fused(module.apply, params, x, counts={name: 1})


# --- equinox ----------------------------------------------------------------------------------------------------------


def partition(module):
    params, static = eqx.partition(module, eqx.is_array)
    return (lambda params, *args, **kwargs: eqx.combine(params, static)(*args, **kwargs)), params


@pytest.mark.parametrize("masked", [False, True])
def test_equinox_attention_is_fused(rng, check_fused, masked):
    apply, params = partition(eqx.nn.MultiheadAttention(H, WIDTH, key=jax.random.key(0)))
    mask = jnp.tril(jnp.ones((T, T), bool)) if masked else None
    check_fused(
        lambda p, x: jax.vmap(lambda row: apply(p, row, row, row, mask=mask))(x),
        params,
        normal(rng, B, T, WIDTH),
        counts={"attention": 1},
        floor_ulps=64,
    )


@pytest.mark.parametrize("make, name", [(eqx.nn.LayerNorm, "layer_norm"), (eqx.nn.RMSNorm, "rms_norm")])
def test_equinox_norms_are_fused(rng, check_fused, make, name):
    apply, params = partition(make(WIDTH))
    check_fused(
        lambda p, x: jax.vmap(jax.vmap(lambda row: apply(p, row)))(x),
        params,
        normal(rng, B, T, WIDTH) + 1,
        counts={name: 1},
    )


# --- jax.nn -----------------------------------------------------------------------------------------------------------


def qkv(rng, heads=H, kv_heads=H, t=T, s=S, dtype=np.float32, e=D):
    return (
        normal(rng, B, t, heads, D, dtype=dtype),
        normal(rng, B, s, kv_heads, D, dtype=dtype),
        normal(rng, B, s, kv_heads, e, dtype=dtype),
    )


@pytest.mark.parametrize(
    "options, kv_heads",
    [
        ({}, H),
        ({}, 2),
        ({}, 1),
        (dict(is_causal=True), H),
        (dict(is_causal=True), 2),
        (dict(scale=0.2), H),
        (dict(is_causal=True, local_window_size=(3, 0)), H),
        (dict(local_window_size=(2, 1)), 2),
    ],
    ids=str,
)
def test_jax_nn_attention_is_fused(rng, check_fused, options, kv_heads):
    report = check_fused(
        lambda q, k, v: jax.nn.dot_product_attention(q, k, v, **options),
        *qkv(rng, kv_heads=kv_heads),
        counts={"attention": 1},
    )
    assert "mask" not in report.fused[0].detail  # bands are proved and not read from memory


@pytest.mark.parametrize("shape", [(B, H, T, S), (1, H, T, S), (B, 1, T, S), (1, 1, T, S), (B, 1, 1, S)], ids=str)
@pytest.mark.parametrize("kv_heads", [H, 2])
def test_jax_nn_attention_with_mask_and_bias_is_fused(rng, check_fused, shape, kv_heads):
    mask = jnp.asarray(rng.random(shape) < 0.7)
    check_fused(
        lambda q, k, v, bias, mask: jax.nn.dot_product_attention(q, k, v, bias=bias, mask=mask),
        *qkv(rng, kv_heads=kv_heads),
        normal(rng, *shape),
        mask,
        counts={"attention": 1},
    )


def test_jax_nn_attention_in_bfloat16_is_fused(rng, check_fused):
    # Not in float16: jax.nn's own gradient fails there on the CPU, "F16_F16_F32 is not supported by dot_general".
    check_fused(
        lambda *a: jax.nn.dot_product_attention(*a, is_causal=True),
        *qkv(rng, dtype=jnp.bfloat16),
        counts={"attention": 1},
    )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16], ids=lambda d: d.__name__)
@pytest.mark.parametrize(
    "name, function",
    [
        ("gelu_tanh", jax.nn.gelu),
        ("gelu_erf", lambda x: jax.nn.gelu(x, approximate=False)),
        ("silu", jax.nn.silu),
        ("softmax", jax.nn.softmax),
        ("softmax", lambda x: jax.nn.softmax(x, axis=1)),
    ],
    ids=["gelu_tanh", "gelu_erf", "silu", "softmax", "softmax axis 1"],
)
def test_jax_nn_activations_and_softmax_are_fused(rng, check_fused, name, function, dtype):
    check_fused(function, normal(rng, B, T, WIDTH, dtype=dtype) * 3, counts={name: 1})


# --- by hand ----------------------------------------------------------------------------------------------------------

FILLS = {"-inf": -jnp.inf, "finfo.min": float(np.finfo(np.float32).min), "-1e9": -1e9}


@pytest.mark.parametrize("fill", [None, *FILLS])
@pytest.mark.parametrize("scale", ["on query", "on logits", "divided"])
@pytest.mark.parametrize("layout", ["einsum bthd", "einsum bhtd", "matmul bhtd", "matmul bthd"])
def test_attention_by_hand_is_fused(rng, check_fused, layout, scale, fill):
    def function(q, k, v):
        q = q / np.sqrt(D) if scale == "on query" else q
        if layout == "einsum bthd":
            logits = jnp.einsum("bthd,bshd->bhts", q, k)
        elif layout == "matmul bthd":
            q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
            logits = q @ k.swapaxes(-1, -2)
        elif layout == "einsum bhtd":
            logits = jnp.einsum("bhtd,bhsd->bhts", q, k)
        else:
            logits = q @ k.swapaxes(-1, -2)
        logits = {"on logits": logits * D**-0.5, "divided": logits / np.sqrt(D)}.get(scale, logits)
        if fill is not None:
            logits = jnp.where(jnp.tril(jnp.ones((T, S), bool)), logits, FILLS[fill])
        p = jax.nn.softmax(logits, axis=-1)
        if layout == "einsum bthd":
            return jnp.einsum("bhts,bshd->bthd", p, v)
        if layout == "matmul bthd":
            return (p @ v).transpose(0, 2, 1, 3).reshape(B, T, WIDTH)
        return jnp.einsum("bhts,bhsd->bhtd", p, v) if layout == "einsum bhtd" else p @ v

    args = qkv(rng)
    if "bhtd" in layout:
        args = tuple(x.transpose(0, 2, 1, 3) for x in args)
    report = check_fused(function, *args, counts={"attention": 1})
    assert ("causal" in report.fused[0].detail) == (fill is not None)


def test_attention_without_batch_is_fused(rng, check_fused):
    def function(q, k, v):
        return jax.nn.softmax(q @ k.T / 3, axis=-1) @ v

    check_fused(function, normal(rng, T, D), normal(rng, S, D), normal(rng, S, E), counts={"attention": 1})


def test_attention_of_one_query_is_fused(rng, check_fused):
    def function(q, k, v):
        return jnp.einsum("bhs,bshe->bhe", jax.nn.softmax(jnp.einsum("bhd,bshd->bhs", q, k)), v)

    check_fused(
        function, normal(rng, B, H, D), normal(rng, B, S, H, D), normal(rng, B, S, H, E), counts={"attention": 1}
    )


def test_attention_with_value_heads_of_another_size_is_fused(rng, check_fused):
    check_fused(
        lambda q, k, v: jnp.einsum("bhts,bshe->bthe", jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k)), v),
        *qkv(rng, e=E),
        counts={"attention": 1},
    )


def test_attention_with_additive_mask_is_fused_as_a_band(rng, check_fused):
    def function(q, k, v):
        logits = jnp.einsum("bthd,bshd->bhts", q, k) + jnp.triu(jnp.full((T, S), -jnp.inf), 1)
        return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(logits), v)

    report = check_fused(function, *qkv(rng), counts={"attention": 1})
    assert "causal" in report.fused[0].detail and "bias" not in report.fused[0].detail


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bfloat16", "float16"])
def test_attention_upcast_to_float32_in_the_middle_is_fused(rng, check_fused, dtype):
    def function(q, k, v):
        logits = jnp.einsum("bthd,bshd->bhts", q, k).astype(jnp.float32) * D**-0.5
        logits = jnp.where(jnp.tril(jnp.ones((T, S), bool)), logits, jnp.finfo(jnp.float32).min)
        return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(logits).astype(q.dtype), v)

    check_fused(function, *qkv(rng, dtype=dtype), counts={"attention": 1})


@pytest.mark.parametrize(
    "make",
    [
        lambda: jnp.tril(jnp.ones((T, S), bool)),
        lambda: np.tril(np.ones((1, 1, T, S), bool)),
        lambda: jnp.arange(T)[:, None] >= jnp.arange(S)[None],
        lambda: np.tri(T, S) > 0,
    ],
    ids=["jnp.tril", "np.tril", "jnp.arange", "np.tri"],
)
def test_causal_mask_that_is_a_constant_is_a_band(rng, check_fused, make):
    mask = make()
    report = check_fused(
        lambda q, k, v: jax.nn.dot_product_attention(q, k, v, mask=mask), *qkv(rng), counts={"attention": 1}
    )
    assert "causal" in report.fused[0].detail and "mask" not in report.fused[0].detail


def test_longer_axis_of_a_grouped_query_is_its_length(rng, check_fused):
    report = check_fused(jax.nn.dot_product_attention, *qkv(rng, kv_heads=2), counts={"attention": 1})
    assert f"t{T} " in report.fused[0].detail


def test_grouped_attention_by_hand_is_fused(rng, check_fused):
    def function(q, k, v):
        q = q.reshape(B, T, 2, 2, D)
        p = jax.nn.softmax(jnp.einsum("btkgd,bskd->bkgts", q, k) * 0.3)
        return jnp.einsum("bkgts,bskd->btkgd", p, v).reshape(B, T, WIDTH)

    check_fused(function, *qkv(rng, kv_heads=2), counts={"attention": 1})


def test_attention_with_key_lengths_is_fused_with_a_mask(rng, check_fused):
    def function(q, k, v, lengths):
        mask = jnp.arange(S)[None, None, None, :] < lengths[:, None, None, None]
        return jax.nn.dot_product_attention(q, k, v, mask=mask)

    check_fused(function, *qkv(rng), jnp.array([S, 3]), counts={"attention": 1})


def layer_norm(x, scale, bias, eps=1e-3):
    mean = x.mean(-1, keepdims=True)
    return (x - mean) / jnp.sqrt(x.var(-1, keepdims=True) + eps) * scale + bias


def layer_norm_fast(x, scale, bias, eps=1e-3):
    mean = jnp.sum(x, -1, keepdims=True) / x.shape[-1]
    variance = jnp.mean(x * x, -1, keepdims=True) - mean * mean
    return scale * ((x - mean) * jax.lax.rsqrt(variance + eps)) + bias


def layer_norm_centred_once(x, scale, bias, eps=1e-3):
    centred = x - jnp.mean(x, -1)[..., None]
    return centred * (scale / jnp.sqrt(jnp.mean(centred**2, -1) + eps)[..., None]) + bias


def layer_norm_by_a_full_variance(x, scale, bias, eps=1e-3):
    variance = jnp.broadcast_to(x.var(-1, keepdims=True), x.shape)
    return (x - x.mean(-1, keepdims=True)) * jax.lax.rsqrt(variance + eps) * scale + bias


BY_HAND = [layer_norm, layer_norm_fast, layer_norm_centred_once, layer_norm_by_a_full_variance]


@pytest.mark.parametrize("function", BY_HAND)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_layer_norm_by_hand_is_fused(rng, check_fused, function, dtype):
    args = normal(rng, B, T, WIDTH, dtype=dtype) + 1, normal(rng, WIDTH, dtype=dtype), normal(rng, WIDTH, dtype=dtype)
    check_fused(function, *args, counts={"layer_norm": 1}, floor_ulps=16)


def test_long_rows_are_normalised_by_xla_unless_they_are_differentiated():
    def function(x):
        return jnp.sum(jnp.sin(jax.nn.standardize(x)))

    x = jax.ShapeDtypeStruct((32, 40960), jnp.float32)
    with zenith.configured(use_cost=True, platform="cpu"):
        report = zenith.explain(function)(x)
        assert report.counts() == {} and "rows of 40960" in report.refused[0].reason
        assert zenith.explain(jax.grad(function))(x).counts() == {"layer_norm": 1}


@pytest.mark.parametrize("cast", ["before scale", "after scale", "none"])
def test_rms_norm_by_hand_is_fused(rng, check_fused, cast):
    def function(x, scale):
        wide = x.astype(jnp.float32)
        y = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), -1, keepdims=True) + 1e-3)
        return {
            "before scale": lambda: y.astype(x.dtype) * scale,
            "after scale": lambda: (y * scale).astype(x.dtype),
            "none": lambda: y * scale,
        }[cast]()

    dtype = jnp.float32 if cast == "none" else jnp.bfloat16
    check_fused(
        function, normal(rng, B, T, WIDTH, dtype=dtype), normal(rng, WIDTH, dtype=dtype), counts={"rms_norm": 1}
    )


def test_residual_add_joins_the_norm(rng, check_fused):
    def function(x, y, scale, bias):
        total = x + y
        return layer_norm(total, scale, bias), total

    check_fused(
        function,
        normal(rng, B, T, WIDTH),
        normal(rng, B, T, WIDTH),
        normal(rng, WIDTH),
        normal(rng, WIDTH),
        counts={"add_layer_norm": 1},
    )


def test_two_norms_of_one_sum_are_both_fused(rng, check_fused):
    def function(x, y, scale, bias):
        total = x + y
        return layer_norm(total, scale, bias), layer_norm(total, bias, scale, eps=0.1)

    check_fused(
        function,
        normal(rng, B, T, WIDTH),
        normal(rng, B, T, WIDTH),
        normal(rng, WIDTH),
        normal(rng, WIDTH),
        counts={"add_layer_norm": 1, "layer_norm": 1},
    )


@pytest.mark.parametrize(
    "name, function",
    [
        ("silu", lambda x: x / (1 + jnp.exp(-x))),
        ("silu", lambda x: jax.nn.sigmoid(x) * x),
        ("gelu_tanh", lambda x: x * 0.5 * (1.0 + jnp.tanh(0.7978845608 * (x + 0.044715 * x * x * x)))),
        ("gelu_tanh", lambda x: 0.5 * x * (1 + jnp.tanh(0.7978845608 * x * (1 + 0.044715 * x**2)))),
        ("gelu_tanh", lambda x: x * jax.nn.sigmoid(1.5957691216 * (x + 0.044715 * x**3))),
        ("gelu_erf", lambda x: x / 2 * (1 + jax.lax.erf(x / np.sqrt(2)))),
        ("gelu_erf", lambda x: x * (0.5 + 0.5 * jax.scipy.special.erf(x * 0.7071067811865476))),
    ],
    ids=["x / (1 + exp)", "sigmoid", "products", "factored", "by sigmoid", "erf of a quotient", "halves"],
)
def test_activations_by_hand_are_fused(rng, check_fused, name, function):
    check_fused(function, normal(rng, B, T, WIDTH) * 2, counts={name: 1})


def test_gated_activation_is_fused_around_its_gate(rng, check_fused):
    x, y = normal(rng, B, WIDTH), normal(rng, B, WIDTH)
    check_fused(lambda x, y: jax.nn.silu(x * 1.5) * y, x, y, counts={"gated_silu": 1})


@pytest.mark.parametrize("name", ["gelu_erf", "gelu_tanh", "silu"])
def test_activation_of_a_linear_layer_is_fused(rng, check_fused, name):
    function = {
        "gelu_erf": lambda x: jax.nn.gelu(x, approximate=False), "gelu_tanh": jax.nn.gelu, "silu": jax.nn.silu
    }[name]  # fmt: skip
    check_fused(
        lambda x, kernel, bias: function(x @ kernel + bias),
        *(normal(rng, B, T, WIDTH), normal(rng, WIDTH, 2 * WIDTH), normal(rng, 2 * WIDTH)),
        counts={name: 1},
        floor_ulps=32.0,  # the products' own rounding
    )
