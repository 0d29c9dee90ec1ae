"""Vision, audio and recurrent models, tiny: what is fused; of ResNet, Mamba and RWKV next to nothing, and no harm."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import zenith_jax as zenith

B, T, WIDTH, HEADS = 2, 6, 16, 2


def normal(rng, *shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


# --- ViT: flax.linen, patches by a convolution, a class token, exact gelu ---------------------------------------------


class VitLayer(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = nn.LayerNorm(epsilon=1e-6)(x)
        x = x + nn.MultiHeadDotProductAttention(HEADS)(y, y)
        y = nn.gelu(nn.Dense(32)(nn.LayerNorm(epsilon=1e-6)(x)), approximate=False)
        return x + nn.Dense(WIDTH)(y)


class Vit(nn.Module):
    @nn.compact
    def __call__(self, images):
        x = nn.Conv(WIDTH, (4, 4), strides=(4, 4), padding="VALID")(images).reshape(B, -1, WIDTH)
        cls = self.param("cls", nn.initializers.zeros, (1, 1, WIDTH))
        x = jnp.concatenate([jnp.tile(cls, (B, 1, 1)), x], axis=1)
        x = x + self.param("position", nn.initializers.normal(0.02), (1, x.shape[1], WIDTH))
        for _ in range(2):
            x = VitLayer()(x)
        return nn.Dense(5)(nn.LayerNorm(epsilon=1e-6)(x)[:, 0])


def test_vit_with_its_loss(check_fused, rng):
    model, images = Vit(), normal(rng, B, 8, 8, 3)
    params = model.init(jax.random.key(0), images)

    def loss(params, images):
        target = optax.smooth_labels(jax.nn.one_hot(jnp.array([1, 4]), 5), 0.1)
        return optax.softmax_cross_entropy(model.apply(params, images), target).mean()

    check_fused(
        loss,
        *(params, images),
        counts={"attention": 2, "layer_norm": 1, "add_layer_norm": 4, "gelu_erf": 2, "linear_cross_entropy": 1},
        floor_ulps=64,
    )


# --- Whisper encoder: convolutions and gelu in front, sinusoids, keys without a bias ----------------------------------


def sinusoids(length, width):
    rate = jnp.exp(-jnp.log(1e4) / (width // 2 - 1) * jnp.arange(width // 2))
    angle = jnp.arange(length)[:, None] * rate
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


class WhisperLayer(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = nn.LayerNorm(epsilon=1e-5)(x)
        split = lambda a: a.reshape(*a.shape[:2], HEADS, -1).transpose(0, 2, 1, 3)  # noqa: E731
        query = split(nn.Dense(WIDTH)(y) * (WIDTH // HEADS) ** -0.5)
        key, value = split(nn.Dense(WIDTH, use_bias=False)(y)), split(nn.Dense(WIDTH)(y))
        out = (jax.nn.softmax(query @ key.swapaxes(-1, -2), axis=-1) @ value).transpose(0, 2, 1, 3).reshape(x.shape)
        x = x + nn.Dense(WIDTH)(out)
        return x + nn.Dense(WIDTH)(nn.gelu(nn.Dense(32)(nn.LayerNorm(epsilon=1e-5)(x)), approximate=False))


class WhisperEncoder(nn.Module):
    @nn.compact
    def __call__(self, mel):
        x = nn.gelu(nn.Conv(WIDTH, (3,), padding=1)(mel), approximate=False)
        x = nn.gelu(nn.Conv(WIDTH, (3,), strides=(2,), padding=1)(x), approximate=False)
        x = x + sinusoids(x.shape[1], WIDTH)
        for _ in range(2):
            x = WhisperLayer()(x)
        return nn.LayerNorm(epsilon=1e-5)(x)


def test_whisper_encoder(check_fused, rng):
    model, mel = WhisperEncoder(), normal(rng, B, 2 * T, 4)
    params = model.init(jax.random.key(0), mel)
    check_fused(
        model.apply,
        *(params, mel),
        counts={"attention": 2, "layer_norm": 1, "add_layer_norm": 4, "gelu_erf": 4},
        floor_ulps=128,
    )


# --- a block of a diffusion UNet: group norm and silu, a time embedding, attention over pixels and over a text --------


class UnetBlock(nn.Module):
    @nn.compact
    def __call__(self, x, time, text):
        h = nn.Conv(WIDTH, (3, 3))(nn.silu(nn.GroupNorm(4)(x)))
        h = h + nn.Dense(WIDTH)(nn.silu(time))[:, None, None]
        x = x + nn.Conv(WIDTH, (3, 3))(nn.silu(nn.GroupNorm(4)(h)))
        pixels = nn.Dense(WIDTH)(nn.GroupNorm(4)(x).reshape(B, -1, WIDTH))
        for context in (None, text):
            y = nn.LayerNorm(epsilon=1e-5)(pixels)
            context = y if context is None else context
            heads = lambda a: a.reshape(B, -1, HEADS, WIDTH // HEADS).transpose(0, 2, 1, 3)  # noqa: E731
            query, key, value = (
                heads(nn.Dense(WIDTH, use_bias=False)(a)).reshape(B * HEADS, -1, WIDTH // HEADS)
                for a in (y, context, context)
            )
            weights = jax.nn.softmax(jnp.einsum("b i d, b j d->b i j", query, key) * (WIDTH // HEADS) ** -0.5, axis=-1)
            out = jnp.einsum("b i j, b j d->b i d", weights, value).reshape(B, HEADS, -1, WIDTH // HEADS)
            pixels = pixels + nn.Dense(WIDTH)(out.transpose(0, 2, 1, 3).reshape(B, -1, WIDTH))
        gate, up = jnp.split(nn.Dense(2 * WIDTH)(nn.LayerNorm(epsilon=1e-5)(pixels)), 2, axis=-1)
        pixels = pixels + nn.Dense(WIDTH)(gate * nn.gelu(up))
        return x + pixels.reshape(x.shape)


def test_unet_block(check_fused, rng):
    model = UnetBlock()
    args = normal(rng, B, 2, 2, WIDTH), normal(rng, B, 8), normal(rng, B, 3, WIDTH)
    params = model.init(jax.random.key(0), *args)
    check_fused(
        model.apply,
        *(params, *args),
        counts={
            "group_norm": 3,
            "attention": 2,
            "layer_norm": 1,
            "add_layer_norm": 2,
            "silu": 1,
            "gated_gelu_tanh": 1,
        },
        floor_ulps=256,
    )


# --- what has little or nothing to match ------------------------------------------------------------------------------


class ResNetBlock(nn.Module):
    train: bool

    @nn.compact
    def __call__(self, x):
        norm = lambda: nn.BatchNorm(use_running_average=not self.train, momentum=0.9)  # noqa: E731
        y = nn.relu(norm()(nn.Conv(8, (3, 3), strides=(2, 2), use_bias=False)(x)))
        y = norm()(nn.Conv(8, (3, 3), use_bias=False)(y))
        x = norm()(nn.Conv(8, (1, 1), strides=(2, 2), use_bias=False)(x))
        return nn.relu(x + y)


@pytest.mark.usefixtures("without_conv")
def test_resnet_block_has_no_site_in_training_and_else_its_batch_norms(rng):
    x = normal(rng, B, 4, 4, 3)
    for train in (False, True):
        model = ResNetBlock(train)
        variables = model.init(jax.random.key(0), x)
        function = lambda v, x, model=model: model.apply(v, x, mutable=["batch_stats"])[0]  # noqa: E731
        report = zenith.explain(function)(variables, x)  # convolutions are laid out anew, which is no site
        assert report.counts() == ({} if train else {"batch_norm": 3})
        assert all("batch norm in training" in site.reason for site in report.refused)
        np.testing.assert_allclose(zenith.jit(function)(variables, x), function(variables, x), rtol=1e-5, atol=1e-5)


class InvertedResidual(nn.Module):
    """Of MobileNetV2: Sandler et al. 2018, arXiv:1801.04381."""

    @nn.compact
    def __call__(self, x):
        norm = lambda: nn.BatchNorm(use_running_average=True)  # noqa: E731
        y = jnp.minimum(nn.relu(norm()(nn.Conv(16, (1, 1), use_bias=False)(x))), 6)
        y = nn.Conv(16, (3, 3), feature_group_count=16, use_bias=False)(y)
        y = norm()(nn.Conv(4, (1, 1), use_bias=False)(jnp.minimum(nn.relu(norm()(y)), 6)))
        return x + y


def test_of_mobilenet_the_depthwise_convolution(rng):
    model, x = InvertedResidual(), normal(rng, B, 4, 4, 4)
    variables = model.init(jax.random.key(0), x)
    with zenith.configured(use_cost=True):  # the batch norm after it is not worth folding on a CPU
        assert zenith.explain(model.apply)(variables, x).counts() == {"grouped_conv": 1}
    np.testing.assert_allclose(zenith.jit(model.apply)(variables, x), model.apply(variables, x), rtol=1e-5, atol=1e-5)


def mamba(p, x):
    """A selective state space: gates, a causal convolution, an associative scan."""
    u, gate = jnp.split(x @ p["in"], 2, axis=-1)
    padded = jnp.pad(u, ((0, 0), (2, 0), (0, 0)))
    u = jax.nn.silu(sum(padded[:, i : i + T] * p["conv"][i] for i in range(3)))
    step = jax.nn.softplus(u @ p["step"])
    b, c = jnp.split(u @ p["bc"], 2, axis=-1)
    decay = jnp.exp(-step[..., None] * jnp.exp(p["a"]))
    drive = (step * u)[..., None] * b[:, :, None]
    combine = lambda a, b: (a[0] * b[0], b[0] * a[1] + b[1])  # noqa: E731
    state = jax.lax.associative_scan(combine, (decay, drive), axis=1)[1]
    y = jnp.einsum("btdn,btn->btd", state, c) + p["d"] * u
    return (y * jax.nn.silu(gate)) @ p["out"]


def test_of_mamba_the_activations(check_fused, rng):
    shapes = dict(step=(16, 16), bc=(16, 8), a=(16, 4), d=(16,), conv=(3, 16), out=(16, WIDTH))
    p = {"in": normal(rng, WIDTH, 32) / 4} | {k: normal(rng, *s) / 4 for k, s in shapes.items()}
    check_fused(mamba, p, normal(rng, B, T, WIDTH), counts={"silu": 1, "gated_silu": 1}, floor_ulps=64)


def rwkv(p, x):
    """Time mixing: exponentials over a running maximum that are not a softmax; channel mixing with relu squared."""
    shift = lambda a: jnp.pad(a, ((0, 0), (1, 0), (0, 0)))[:, :-1]  # noqa: E731
    mix = lambda name: x * p[f"mix_{name}"] + shift(x) * (1 - p[f"mix_{name}"])  # noqa: E731
    r, k, v = jax.nn.sigmoid(mix("r") @ p["r"]), mix("k") @ p["k"], mix("v") @ p["v"]

    def step(carry, kv):
        a, b, top = carry
        k, v = kv
        now = jnp.maximum(top, p["first"] + k)
        old, new = jnp.exp(top - now), jnp.exp(p["first"] + k - now)
        out = (old * a + new * v) / (old * b + new)
        later = jnp.maximum(top + p["decay"], k)
        old, new = jnp.exp(top + p["decay"] - later), jnp.exp(k - later)
        return (old * a + new * v, old * b + new, later), out

    zero = jnp.zeros((B, WIDTH))
    _, out = jax.lax.scan(step, (zero, zero, zero - 1e30), (k.swapaxes(0, 1), v.swapaxes(0, 1)))
    x = x + (r * out.swapaxes(0, 1)) @ p["o"]
    return x + jnp.square(jax.nn.relu(x @ p["up"])) @ p["down"]


def test_rwkv_has_no_site(rng):
    vectors = ("mix_r", "mix_k", "mix_v", "first", "decay")
    p = {k: normal(rng, WIDTH) for k in vectors} | {k: normal(rng, WIDTH, WIDTH) / 4 for k in "rkvo"}
    p |= {k: normal(rng, WIDTH, WIDTH) for k in ("up", "down")}
    x = normal(rng, B, T, WIDTH)
    assert str(jax.make_jaxpr(zenith.fuse(rwkv))(p, x)) == str(jax.make_jaxpr(rwkv)(p, x))
