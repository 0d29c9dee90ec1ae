"""What the ops compute, in plain jnp: the tests' oracle, evaluated in float64. Shares no code with the ops."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import lax


def layer_norm(x, scale=1.0, bias=0.0, *, eps=1e-5):
    centred = x - x.mean(-1, keepdims=True)
    return centred / jnp.sqrt(jnp.mean(centred**2, -1, keepdims=True) + eps) * scale + bias


def group_norm(x, scale=1.0, bias=0.0, *, groups, eps=1e-5, channel_axis=-1, activation=None):
    """Group by group."""
    x = jnp.moveaxis(x, channel_axis, -1)
    axes = tuple(range(1, x.ndim))
    normal = []
    for part in jnp.split(x, groups, axis=-1):
        centred = part - part.mean(axes, keepdims=True)
        normal.append(centred / jnp.sqrt(jnp.mean(centred**2, axes, keepdims=True) + eps))
    y = jnp.concatenate(normal, axis=-1) * scale + bias
    return jnp.moveaxis(silu(y) if activation == "silu" else y, -1, channel_axis)


def rms_norm(x, scale=1.0, *, eps=1e-6):
    return x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + eps) * scale


def add_layer_norm(x, y, *parameters, eps=1e-5):
    return layer_norm(x + y, *parameters, eps=eps), x + y


def add_rms_norm(x, y, *parameters, eps=1e-6):
    return rms_norm(x + y, *parameters, eps=eps), x + y


def softmax(x, axis=-1):
    e = jnp.exp(x - lax.stop_gradient(x.max(axis, keepdims=True)))
    return e / e.sum(axis, keepdims=True)


def cross_entropy(logits, labels, label_smoothing=0.0, z_loss=0.0):
    """By the log-probabilities and the smoothed distribution of labels."""
    wide = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    top = wide.max(-1, keepdims=True)
    log_total = jnp.log(jnp.exp(wide - top).sum(-1, keepdims=True)) + top
    hot = (labels[..., None] == jnp.arange(wide.shape[-1])).astype(wide.dtype)
    target = hot * (1 - label_smoothing) + label_smoothing / wide.shape[-1]
    return -((wide - log_total) * target).sum(-1) + z_loss * log_total[..., 0] ** 2


def gelu(x, approximate=True):
    if approximate:
        return x / 2 * (1 + jnp.tanh(jnp.sqrt(2 / jnp.pi) * (x + 0.044715 * x**3)).astype(x.dtype))
    return x / 2 * lax.erfc(-x * 0.5**0.5)  # erfc and not 1 + erf: the left tail would cancel


def silu(x):
    return x * lax.logistic(x)


LINEAR_ACTIVATIONS = {
    "none": lambda x: x,
    "relu": lambda x: x * (x > 0),
    "relu_squared": lambda x: x * x * (x > 0),
    "tanh": jnp.tanh,
    "silu": silu,
    "gelu_tanh": gelu,
    "gelu_erf": lambda x: gelu(x, approximate=False),
}


def linear(x, w, bias=0.0, residual=0.0, activation="none", transposed=False):
    return LINEAR_ACTIVATIONS[activation](x @ (w.T if transposed else w) + bias) + residual


def conv(x, w, bias=0.0, residual=0.0, scale=1.0, strides=(1, 1), padding=((0, 0),) * 2, dilation=(1, 1), relu=False,
         pool=(1, 1)):  # fmt: skip
    """Element of the filter by element; padding is not negative, and windows are full ones."""
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    reach = [(k - 1) * d for k, d in zip(w.shape, dilation, strict=False)]
    y = 0.0
    for i, j in np.ndindex(*w.shape[:2]):
        top, left = i * dilation[0], j * dilation[1]
        bottom, right = x.shape[1] - reach[0] + top, x.shape[2] - reach[1] + left
        y += jnp.einsum("bpqc,cn->bpqn", x[:, top : bottom : strides[0], left : right : strides[1]], w[i, j])
    y = y * scale + bias + residual
    y = LINEAR_ACTIVATIONS["relu" if relu else "none"](y)
    b, p, q, n = y.shape
    return y.reshape(b, p // pool[0], pool[0], q // pool[1], pool[1], n).max((2, 4))


def quantized_linear(x, w, scale, bias=0.0, transposed=False):
    """The weights are widened, and rounded to x's dtype."""
    w = (w.T if transposed else w).astype(scale.dtype)
    scales = jnp.repeat(scale, w.shape[0] // scale.shape[0], axis=0) if scale.ndim == 2 else scale
    return x @ (w * scales).astype(x.dtype) + bias


def gated(gate, value):
    return silu(gate) * value


def gated_linear(x, w_gate, w_value, activation="silu", transposed=False):
    gate, value = (x @ (w.T if transposed else w) for w in (w_gate, w_value))
    return LINEAR_ACTIVATIONS[activation](gate) * value


def gated_by_the_second_half(x):
    value, gate = jnp.split(x, 2, axis=-1)
    return value * gelu(gate, approximate=False)


def rope(x, cos, sin, *, interleaved=False, rotary_dim=None):
    """By a matrix for each pair. One coefficient for each pair."""
    features = x.shape[-1] if rotary_dim is None else rotary_dim
    order = [(2 * j, 2 * j + 1) if interleaved else (j, j + features // 2) for j in range(features // 2)]
    pairs = jnp.stack([jnp.stack([x[..., i] for i in pair], -1) for pair in order], -2)
    turn = jnp.stack([jnp.stack([cos, -sin], -1), jnp.stack([sin, cos], -1)], -2)
    turned = jnp.sum(turn * pairs[..., None, :], -1)
    columns = {i: turned[..., j, k] for j, pair in enumerate(order) for k, i in enumerate(pair)}
    return jnp.stack([columns.get(i, x[..., i]).astype(x.dtype) for i in range(x.shape[-1])], -1)


def attention(
    q,
    k,
    v,
    *more,
    mask=None,
    bias=None,
    sinks=None,
    query_segments=None,
    key_segments=None,
    key_lengths=None,
    scale=None,
    softcap=None,
    is_causal=False,
    local_window_size=None,
):
    """more: a mask, a bias and sinks, told apart by dtype and rank."""
    for x in more:
        if x.ndim == 1:
            sinks = x
        else:
            mask, bias = (x, bias) if x.dtype == bool else (mask, x)
    groups = q.shape[2] // k.shape[2]
    k, v = jnp.repeat(k, groups, axis=2), jnp.repeat(v, groups, axis=2)
    wide = jnp.promote_types(q.dtype, jnp.float32)
    logits = jnp.einsum("bthd,bshd->bhts", q, k).astype(wide) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    if bias is not None:
        logits = logits + bias
    distance = jnp.arange(k.shape[1])[None] - jnp.arange(q.shape[1])[:, None]
    allowed = jnp.ones(distance.shape, bool)
    if is_causal:
        allowed &= distance <= 0
    if local_window_size is not None:
        left, right = local_window_size
        allowed &= (distance >= -left) & (distance <= right)
    if mask is not None:
        allowed = allowed & mask
    if query_segments is not None:
        allowed = allowed & (query_segments[:, None, :, None] == key_segments[:, None, None])
    if key_lengths is not None:
        allowed = allowed & (jnp.arange(k.shape[1]) < key_lengths[:, None, None, None])
    logits = jnp.where(allowed, logits, -1e30)  # a row of these only is uniform
    if sinks is not None:
        column = jnp.broadcast_to(sinks.astype(logits.dtype)[:, None, None], (*logits.shape[:3], 1))
        p = softmax(jnp.concatenate([logits, column], axis=-1))[..., :-1]
        return jnp.einsum("bhts,bshd->bthd", p.astype(v.dtype), v)
    return jnp.einsum("bhts,bshd->bthd", softmax(logits).astype(v.dtype), v)


def paged_attention(
    q, k_pages, v_pages, tables, lengths, *, heads_axis=2, is_causal=True, local_window_size=None, softcap=None
):
    """The last queries of sequences of these lengths over the gathered pages; 0 where there is no key."""
    k, v = (jnp.moveaxis(x, heads_axis, 2)[tables] for x in (k_pages, v_pages))
    k, v = (x.reshape(x.shape[0], -1, *x.shape[3:]) for x in (k, v))
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    t = q.shape[1]
    wide = jnp.promote_types(q.dtype, jnp.float32)
    logits = jnp.einsum("bthd,bshd->bhts", q, k).astype(wide) * q.shape[-1] ** -0.5
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    s, position = jnp.arange(k.shape[1]), (lengths[:, None] - t + jnp.arange(t))[..., None]
    allowed = (s < lengths[:, None, None]) & ((s <= position) | (not is_causal))
    if local_window_size is not None:
        allowed &= s >= position - local_window_size
    allowed = allowed[:, None]
    p = softmax(jnp.where(allowed, logits, -1e30)) * allowed
    return jnp.einsum("bhts,bshd->bthd", p.astype(v.dtype), v)
