"""The patterns that tests/passes/test_mutations.py mutates, each as somebody writes it, with its arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

N = 4  # every size: batch, heads, lengths, features
L = 256  # every size of a linear layer, which is none for fewer weights
SEED = 20260102


def attention_einsum(q, k, v, mask, bias):
    logits = jnp.einsum("bthd,bshd->bhts", q, k) / np.sqrt(N) + bias
    logits = jnp.where(jnp.tril(jnp.ones((N, N), bool)) & mask, logits, -jnp.inf)
    return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(logits, axis=-1), v)


def attention_matmul(q, k, v, mask, bias):
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q * 0.37, k, v))
    logits = jnp.where(mask, q @ k.swapaxes(-1, -2) - bias, -1e9)
    e = jnp.exp(logits - logits.max(-1, keepdims=True))
    return ((e / e.sum(-1, keepdims=True)) @ v).transpose(0, 2, 1, 3)


def attention_additive_mask(q, k, v, mask, bias):
    del mask, bias
    logits = jnp.einsum("bthd,bshd->bhts", q, k) * 0.5 + jnp.triu(jnp.full((N, N), -jnp.inf), 1)
    return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(logits, axis=-1), v)


def attention_jax_nn(q, k, v, mask, bias):
    return jax.nn.dot_product_attention(q, k, v, bias=bias, mask=mask, is_causal=True)


def attention_window(q, k, v, mask, bias):
    del mask, bias
    return jax.nn.dot_product_attention(q, k[:, :, :2], v[:, :, :2], local_window_size=(2, 1))


def attention_repeated(q, k, v, mask, bias):
    k, v = (jnp.repeat(x[:, :, :2], 2, axis=2) for x in (k, v))
    logits = jnp.einsum("bthd,bshd->bhts", q, k) * 0.5 + bias + mask.astype(jnp.float32)
    t, s = jnp.arange(N)[:, None], jnp.arange(N)
    logits = jnp.where(jnp.abs(t - s) <= 2, logits, -1e30)
    return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(logits, axis=-1), v)


def attention_split_heads(q, k, v, mask, bias):
    del bias
    q, k, v = q.reshape(N, N, 2, 2, N), k[:, :, :2], v[:, :, :2]
    logits = jnp.einsum("btkgd,bskd->btkgs", q, k).reshape(N, N, N, N)
    p = jax.nn.softmax(jnp.where(mask, logits, -1e30), axis=-1).reshape(N, N, 2, 2, N)
    return jnp.einsum("btkgs,bskd->btkgd", p, v).reshape(N, N, N, N)


def attention_capped_prefix(q, k, v, mask, bias):
    del mask, bias
    t, s = jnp.arange(N)[:, None], jnp.arange(N)
    logits = 1.5 * jnp.tanh(jnp.einsum("bthd,bshd->bhts", q, k) * 0.4 / 1.5)
    logits = jnp.where(((s <= t) | (s < 2)) & (s < 3), logits, -1e30)
    return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(logits, axis=-1), v)


def attention_sink_column(q, k, v, mask, bias):
    """And the guard against rows of NaN."""
    logits = jnp.where(mask, jnp.einsum("bthd,bshd->bhts", q, k) * 0.5, -jnp.inf)
    p = jax.nn.softmax(jnp.concatenate([logits, bias[:, :, :, :1]], axis=-1), axis=-1)[..., :-1]
    return jnp.einsum("bhts,bshd->bthd", jnp.where(jnp.isnan(p), 0.0, p), v)


def attention_sink_addend(q, k, v, mask, bias):
    del mask
    logits, sink = jnp.einsum("bthd,bshd->bhts", q, k) * 0.5, bias[0, 0, 0][:, None, None]
    top = jnp.maximum(logits.max(-1, keepdims=True), sink)
    e = jnp.exp(logits - top)
    return jnp.einsum("bhts,bshd->bthd", e / (e.sum(-1, keepdims=True) + jnp.exp(sink - top)), v)


def attention_segments(q, k, v, labels):
    logits = jnp.einsum("bthd,bshd->bhts", q, k) * 0.5
    allowed = (labels[:, None, :, None] == labels[:, None, None]) & (jnp.arange(N) <= jnp.arange(N)[:, None] + 1)
    return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(jnp.where(allowed, logits, -1e30), axis=-1), v)


def paged_attention(q, k_pages, v_pages, tables, lengths):
    k, v = (x[tables].reshape(N, N * N, N, N) for x in (k_pages, v_pages))
    logits = jnp.einsum("bthd,bshd->bhts", q, k) * 0.37
    allowed = jnp.arange(N * N) <= (N * lengths)[:, None, :, None]
    return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(jnp.where(allowed, logits, -1e30), axis=-1), v)


def layer_norm_two_pass(x, scale, bias):
    mean = x.mean(-1, keepdims=True)
    return (x - mean) / jnp.sqrt(x.var(-1, keepdims=True) + 0.03) * scale + bias


def layer_norm_fast(x, scale, bias):
    mean, square = x.mean(-1, keepdims=True), jnp.square(x).mean(-1, keepdims=True)
    variance = jnp.maximum(0.0, square - mean * mean)
    return (x - mean) * (jax.lax.rsqrt(variance + 0.03) * scale) + bias


def layer_norm_distributed(x, scale, bias):
    """As batch norm is written, which Keras does for layer norm too."""
    mean = x.mean(-1, keepdims=True)
    s = 1 / jnp.sqrt(jnp.square(x - mean).mean(-1, keepdims=True) + 0.03) * scale
    return x * s + (bias - mean * s)


def group_norm_channels_first(x, scale):
    """Two groups of two channels, (N, N, N) as batch, channels, positions."""
    grouped = x.reshape(N, 2, 2, N)
    centred = grouped - grouped.mean((2, 3), keepdims=True)
    rstd = jax.lax.rsqrt(jnp.square(centred).mean((2, 3), keepdims=True) + 0.03)
    return (centred * rstd).reshape(x.shape) * scale[:, None]


def group_norm_repeated_silu(x, scale, bias):
    grouped = x.reshape(N, N, N, 2, 2)
    mean, square = grouped.mean((1, 2, 4)), jnp.square(grouped).mean((1, 2, 4))
    variance = jnp.maximum(0.0, square - jnp.square(mean))
    mean, variance = (jnp.repeat(a, 2, axis=1)[:, None, None] for a in (mean, variance))
    return jax.nn.silu((x - mean) * (jax.lax.rsqrt(variance + 0.03) * scale) + bias)


def add_layer_norm(x, y, scale):
    total = x + y
    centred = total - total.mean(-1, keepdims=True)
    return total, centred * jax.lax.rsqrt((centred**2).mean(-1, keepdims=True) + 0.03) * scale


def rms_norm(x, scale):
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 0.03) * scale


def rms_norm_cast(x, scale):
    wide = x.astype(jnp.float32)
    return scale * (wide / jnp.sqrt(jnp.square(wide).mean(-1, keepdims=True) + 0.03)).astype(x.dtype)


def gelu_erf(x):
    return jax.nn.gelu(x, approximate=False)


def gelu_tanh(x):
    return 0.5 * x * (1 + jnp.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def gelu_cdf(x):
    return x * jax.scipy.stats.norm.cdf(x)


def silu(x):
    return x / (1 + jnp.exp(-x))


def cross_entropy_integer(x, labels):
    return optax.softmax_cross_entropy_with_integer_labels(x, labels)


def cross_entropy_smoothed(x, labels):
    hot = jax.nn.one_hot(labels, N) * 0.9 + 0.1 / N
    return -jnp.sum(hot * jax.nn.log_softmax(x), axis=-1)


def cross_entropy_smoothed_by_the_mean(x, labels):
    p = jax.nn.log_softmax(x)
    return -0.9 * jnp.take_along_axis(p, labels[..., None], axis=-1)[..., 0] - 0.1 * p.mean(-1)


def cross_entropy_z_loss(x, labels):
    top = x.max(-1, keepdims=True)
    lse = jnp.log(jnp.exp(x - top).sum(-1)) + top[..., 0]
    return lse - jnp.sum(jnp.where(labels[..., None] == jnp.arange(N), x, 0.0), axis=-1) + 0.01 * lse**2


def linear_cross_entropy(x, w, labels, weights):
    """The mean of the losses of all tokens but the first ones."""
    logits = (x @ w[0] + w[1, 0])[:, 1:]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels[:, 1:])
    return (losses * weights[1:]).sum() / weights[1:].sum()


def softmax_middle(x):
    return jax.nn.softmax(x, axis=1)


def softmax_by_hand(x):
    e = jnp.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def linear_gelu(x, w, bias):
    return jax.nn.gelu(x @ w + bias, approximate=False)


def linear_residual(x, w, bias, residual):
    return jax.nn.silu(jnp.einsum("bk,nk->bn", x, w) + bias) + residual


def linear_reshaped(x, w, bias):
    return jnp.tanh((x @ w).reshape(2, L // 2, L) + bias)


def quantized_linear(x, w, scale, bias):
    return (x @ w.astype(x.dtype)) * scale + bias


def quantized_linear_groups(x, w, scale):
    wide = w.reshape(N, 2, N // 2).astype(x.dtype) * scale[0, :, :2, None]
    return jnp.einsum("abk,nk->abn", x, wide.reshape(N, N))


def swiglu(x, y):
    return jax.nn.silu(x * 1.5) * (y + 0.5)


def geglu_of_halves(x):
    value, gate = jnp.split(x, 2, axis=-1)
    return value * jax.nn.gelu(gate, approximate=False)


def swiglu_of_slices(x):
    return jax.nn.silu(x[..., : N // 2]) * x[..., N // 2 :]


def rope_split(x, cos, sin):
    first, second = jnp.split(x, 2, axis=-1)
    cos, sin = cos[:, :1, :2], sin[:, :1, :2]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def rope_rotate_half(x, cos, sin):
    """With a coefficient for each feature."""
    return x * cos[:, :1] + jnp.concatenate([-x[..., 2:], x[..., :2]], axis=-1) * sin[:, :1]


def rope_neighbours(x, cos, sin):
    first, second = x[..., ::2], x[..., 1::2]
    cos, sin = cos[..., :2], sin[..., :2]
    return jnp.stack([first * cos - second * sin, second * cos + first * sin], axis=-1).reshape(x.shape)


def rope_first_features(x, cos, sin):
    turned = x[..., :2] * cos[:, :1, :2] + jnp.concatenate([-x[..., 1:2], x[..., :1]], -1) * jnp.repeat(
        sin[:, :1, :1], 2, -1
    )
    return jnp.concatenate([turned, x[..., 2:]], axis=-1)


def rope_complex(x, cos, sin):
    pairs = x.reshape(N, N, N, 2, 2)
    turned = jax.lax.complex(pairs[..., 0], pairs[..., 1]) * jax.lax.complex(cos, sin)[:, :1, :2]
    return jnp.stack([jnp.real(turned), jnp.imag(turned)], axis=-1).reshape(x.shape)


def depthwise_conv(x, w):
    return jax.lax.conv_general_dilated(
        x, w[:, :1, :3, :2], (1, 2), ((1, 0), (1, 1)), rhs_dilation=(1, 2), feature_group_count=N
    )


def grouped_conv_channels_last(x, w):
    return jax.lax.conv_general_dilated(
        x, w[:2, :3, :2], (2, 1), "SAME", feature_group_count=2, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def batch_norm(x, w, mean, variance, scale, bias):
    y = jax.lax.conv_general_dilated(x, w[:2, :3], (1, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return jnp.maximum((y + bias - mean) * (scale / jnp.sqrt(jnp.square(variance) + 0.03)) + bias, 0.0)


def batch_norm_of_product(x, w, mean, variance, scale, bias):
    return (x @ w[0] - mean) * (scale / jnp.sqrt(jnp.square(variance) + 0.03)) + bias


def conv_residual(x, w, bias):
    """Channels last, with a filter that passes the image's edges, as large as a filter's gradient."""
    y = jax.lax.conv_general_dilated(x, w, (1, 1), ((2, 1), (1, 2)), dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return jnp.maximum(y + bias + x, 0.0)


def conv_channels_first(x, w, bias):
    y = jax.lax.conv_general_dilated(x, w[:, :, :3, :2], (1, 2), ((1, 0), (1, 1)), rhs_dilation=(1, 2))
    return jnp.maximum(y + bias[:, None, None], 0.0)


def conv_max_pool(x, w, bias):
    """Of 4 x 5 pixels, the last column of which is in no window."""
    y = jax.lax.conv_general_dilated(x, w, (1, 1), ((1, 2), (2, 2)), dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return jax.lax.reduce_window(jnp.maximum(y + bias, 0.0), -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")


def inputs(kinds: str) -> list[np.ndarray]:
    """x: (N, N, N, N) floats; p: (N,) floats; r: (N, N, N) floats; m: a mask with one row that allows nothing;
    n: a mask without such a row; l: (N, N) labels below N; q: (N, N) int8; w: (L, L) floats, of variance 1 / L;
    v: (L,) floats."""
    rng = np.random.default_rng(SEED)
    arrays = []
    for kind in kinds:
        if kind in "mn":
            mask = rng.random((N, N, N, N)) < 0.7
            mask[0, 1, 2] = False
            mask[..., 0] |= kind == "n"
            arrays.append(mask)
        elif kind == "l":
            arrays.append(rng.integers(N, size=(N, N)).astype(np.int32))
        elif kind == "q":
            arrays.append(rng.integers(-128, 128, size=(N, N)).astype(np.int8))
        else:
            shape = {"x": (N,) * 4, "p": (N,), "r": (N,) * 3, "w": (L, L), "v": (L,)}[kind]
            scale = L**-0.5 if kind == "w" else 1
            arrays.append(scale * rng.normal(size=shape).astype(np.float32) + (kind == "p"))
    return arrays


PATTERNS: dict[Callable[..., Any], str] = {
    attention_einsum: "xxxnx",
    attention_matmul: "xxxmx",
    attention_additive_mask: "xxxmx",
    attention_jax_nn: "xxxmx",
    attention_window: "xxxmx",
    attention_repeated: "xxxmx",
    attention_split_heads: "xxxmx",
    attention_capped_prefix: "xxxmx",
    attention_sink_column: "xxxmx",
    attention_sink_addend: "xxxmx",
    attention_segments: "xxxl",
    paged_attention: "xxxll",
    layer_norm_two_pass: "rpp",
    layer_norm_fast: "rpp",
    layer_norm_distributed: "rpp",
    add_layer_norm: "rrp",
    rms_norm: "rp",
    rms_norm_cast: "rp",
    group_norm_channels_first: "rp",
    group_norm_repeated_silu: "xpp",
    gelu_erf: "r",
    gelu_tanh: "r",
    gelu_cdf: "r",
    silu: "r",
    cross_entropy_integer: "rl",
    cross_entropy_smoothed: "rl",
    cross_entropy_smoothed_by_the_mean: "rl",
    cross_entropy_z_loss: "rl",
    linear_cross_entropy: "rrlp",
    linear_gelu: "wwv",
    linear_residual: "wwvw",
    linear_reshaped: "wwv",
    quantized_linear: "rqpp",
    quantized_linear_groups: "rqr",
    swiglu: "rr",
    geglu_of_halves: "r",
    swiglu_of_slices: "r",
    rope_split: "xrr",
    rope_rotate_half: "xrr",
    rope_neighbours: "xrr",
    rope_first_features: "xrr",
    rope_complex: "xrr",
    depthwise_conv: "xx",
    grouped_conv_channels_last: "xx",
    batch_norm: "xxpppp",
    batch_norm_of_product: "rrpppp",
    conv_residual: "xxp",
    conv_channels_first: "xxp",
    conv_max_pool: "xxp",
    softmax_middle: "r",
    softmax_by_hand: "r",
}

# A product of other rounding may lie on the other side of an integer: mutants that truncate it are another function.
ROUNDED_OTHERWISE = {linear_gelu, linear_residual}
