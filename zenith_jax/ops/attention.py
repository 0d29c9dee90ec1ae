"""Scaled dot-product attention, exact, without the (t, s) matrix in memory: the function for people."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp

from zenith_jax.errors import DTypeError, ShapeError
from zenith_jax.ops.attention_kernels import (
    LENGTH_MAJOR,
    MASKED_ROW_MEAN,
    MASKED_ROW_NAN,
    UNBOUNDED,
    attention_canonical,
    with_sink,
)


def attention(
    query,
    key,
    value,
    *,
    mask=None,
    bias=None,
    scale: float | None = None,
    is_causal: bool = False,
    local_window_size: int | tuple[int, int] | None = None,
    softcap: float | None = None,
    sinks=None,
    query_segments=None,
    key_segments=None,
    key_lengths=None,
    allow_tf32: bool = False,
):
    """softmax(scale * query . key + bias where mask) . value, without the (t, s) matrix in memory.

    query: (b, t, h, d); key: (b, s, k, d); value: (b, s, k, e); h a multiple of k (grouped-query attention: query head
    i reads key/value head i // (h // k)). float32, bfloat16 or float16, all alike. Without the axis b: b is 1.
    mask: bool, broadcastable to (b, h, t, s), True where a query may see a key. bias: float, broadcastable likewise.
    scale: default 1/sqrt(d). is_causal: key position <= query position, both counted from 0.
    local_window_size: (left, right) keys visible besides the query's own position, or one number for both.
    softcap: c in c * tanh(logits / c), before bias and mask. sinks: (h,), one more logit for each head that takes part
    in the softmax and has no value. query_segments (b, t), key_segments (b, s): integers; a query sees keys of its own
    segment only. key_lengths: (b,), integers; keys from there on are padding. allow_tf32: a GPU may round float32
    factors of products to TensorFloat-32, as jnp.matmul does by default: errors of 1e-3 in place of 1e-6, three times
    as fast.
    Returns (b, t, h, e) in query's dtype. Sums in float32. A query without any allowed key returns the mean of all
    values, as masking with a finite fill does in `jax.nn.dot_product_attention`, and 0 with sinks; one whose bias is
    -inf everywhere returns NaN. Bit-reproducible.
    Differentiable in query, key, value, bias and sinks, forward and reverse, to any order.
    Raises ShapeError or DTypeError.
    """
    if query.ndim == 3:
        batched = [None if x is None else jnp.asarray(x)[None] for x in (query_segments, key_segments, key_lengths)]
        return attention(
            query[None],
            key[None],
            value[None],
            mask=mask,
            bias=bias,
            scale=scale,
            is_causal=is_causal,
            local_window_size=local_window_size,
            softcap=softcap,
            sinks=sinks,
            query_segments=batched[0],
            key_segments=batched[1],
            key_lengths=batched[2],
            allow_tf32=allow_tf32,
        )[0]
    _check(query, key, value, mask, bias)
    _check_structure(query, key, softcap, sinks, query_segments, key_segments, key_lengths)
    b, t, h, d = query.shape
    s, k = key.shape[1:3]
    left, right = _band(is_causal, local_window_size)
    grouped = jnp.transpose(query.reshape(b, t, k, h // k, d), (0, 2, 3, 1, 4))
    structured = any(x is not None for x in (mask, sinks, query_segments, key_lengths))
    out, lse = attention_canonical(
        grouped,
        jnp.swapaxes(key, 1, 2),
        jnp.swapaxes(value, 1, 2),
        mask=_scores("mask", mask, (b, h, t, s), k),
        bias=_scores("bias", bias, (b, h, t, s), k),
        interval=None if key_lengths is None else _up_to(key_lengths),
        query_segments=None if query_segments is None else query_segments.astype(jnp.int32)[:, None],
        key_segments=None if key_segments is None else key_segments.astype(jnp.int32)[:, None],
        scale=1 / math.sqrt(d) if scale is None else scale,
        softcap=softcap or 0.0,
        left=left,
        right=right,
        # Without a mask only a bias of -inf can empty a row: NaN, as softmax gives.
        masked_row=MASKED_ROW_MEAN if structured or min(left, right) < UNBOUNDED else MASKED_ROW_NAN,
        layout=LENGTH_MAJOR,
        allow_tf32=allow_tf32,
    )
    if sinks is not None:
        out = with_sink(out, lse, sinks.reshape(1, k, h // k, 1))
    return jnp.transpose(out, (0, 3, 1, 2, 4)).reshape(b, t, h, value.shape[-1])


def _band(is_causal: bool, window: int | tuple[int, int] | None) -> tuple[int, int]:
    left = right = UNBOUNDED
    if window is not None:
        left, right = (window, window) if isinstance(window, int) else window
        if left < 0 or right < 0:
            raise ShapeError(f"attention: local_window_size must not be negative, got {window}")
    return left, min(right, 0) if is_causal else right


def _up_to(lengths: Any) -> Any:
    """The interval [0, length) for all queries of an example: (b, 1, 1, 1, 2)."""
    lengths = jnp.clip(jnp.asarray(lengths), 0, jnp.iinfo(jnp.int32).max).astype(jnp.int32)
    return jnp.stack([jnp.zeros_like(lengths), lengths], axis=-1)[:, None, None, None]


def _scores(name: str, x: Any, full: tuple[int, int, int, int], kv_heads: int) -> Any | None:
    """mask or bias, broadcastable to (b, h, t, s), as (b, k, g, t, s) with size 1 where broadcast."""
    if x is None:
        return None
    x = x.reshape((1,) * (4 - x.ndim) + x.shape)
    b, h, t, s = x.shape
    heads = (kv_heads, full[1] // kv_heads) if h != 1 else (1, 1)
    return x.reshape(b, *heads, t, s)


def _check(query: Any, key: Any, value: Any, mask: Any, bias: Any) -> None:
    axes = "Axes are (batch, length, heads, features); is a transpose left over from (batch, heads, length, features)?"
    if not query.ndim == key.ndim == value.ndim == 4:
        raise ShapeError(
            f"attention: query, key and value must have rank 4 (or all rank 3), got shapes "
            f"{query.shape}, {key.shape}, {value.shape}. {axes}"
        )
    if query.shape[-1] != key.shape[-1]:
        raise ShapeError(
            f"attention: query and key must have the same number of features, got query {query.shape} and key "
            f"{key.shape}. {axes}"
        )
    if key.shape[:3] != value.shape[:3]:
        raise ShapeError(
            f"attention: key and value must agree in batch, length and heads, got key {key.shape} and value "
            f"{value.shape}. {axes}"
        )
    if query.shape[0] != key.shape[0]:
        raise ShapeError(f"attention: query and key must agree in batch, got query {query.shape} and key {key.shape}.")
    if not key.shape[2] or query.shape[2] % key.shape[2]:
        raise ShapeError(
            f"attention: the number of query heads must be a multiple of the key/value heads, got query {query.shape} "
            f"and key {key.shape}. {axes}"
        )
    if not query.dtype == key.dtype == value.dtype or not jnp.issubdtype(query.dtype, jnp.floating):
        raise DTypeError(
            f"attention: query, key and value must have one real floating dtype, got {query.dtype}, {key.dtype}, "
            f"{value.dtype}; convert them first"
        )
    full = (query.shape[0], query.shape[2], query.shape[1], key.shape[1])
    for name, x in (("mask", mask), ("bias", bias)):
        if x is None:
            continue
        padded = (1,) * (4 - x.ndim) + tuple(x.shape)
        if x.ndim > 4 or any(n not in (1, f) for n, f in zip(padded, full, strict=True)):
            raise ShapeError(
                f"attention: {name} must be broadcastable to (batch, heads, query length, key length) = {full}, "
                f"got {x.shape}"
            )
    if mask is not None and mask.dtype != jnp.bool_:
        raise DTypeError(f"attention: mask must be bool (True = attend), got {mask.dtype}; an additive mask is a bias")
    if bias is not None and not jnp.issubdtype(bias.dtype, jnp.floating):
        raise DTypeError(f"attention: bias must have a real floating dtype, got {bias.dtype}")


def _check_structure(query, key, softcap, sinks, query_segments, key_segments, key_lengths) -> None:
    (b, t, h, _), s = query.shape, key.shape[1]
    if softcap is not None and not softcap > 0:
        raise ShapeError(f"attention: softcap must be positive, or None for no cap, got {softcap}")
    if sinks is not None and tuple(sinks.shape) != (h,):
        raise ShapeError(f"attention: sinks must have one logit for each query head, shape ({h},), got {sinks.shape}")
    if (query_segments is None) != (key_segments is None):
        raise ShapeError("attention: query_segments and key_segments must be given together; one alone was")
    shapes = dict(query_segments=(b, t), key_segments=(b, s), key_lengths=(b,))
    for (name, shape), x in zip(shapes.items(), (query_segments, key_segments, key_lengths), strict=True):
        if x is None:
            continue
        if tuple(x.shape) != shape:
            raise ShapeError(f"attention: {name} must have shape {shape}, got {x.shape}")
        if not jnp.issubdtype(x.dtype, jnp.integer):
            raise DTypeError(f"attention: {name} must be integers, got {x.dtype}")
