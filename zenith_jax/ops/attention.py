"""Scaled dot-product attention, exact, without the (t, s) matrix in memory.

Axes: *b batch (its last one the key/value heads), g query heads to a key/value head, t query length, s key length,
d query/key features, e value features.

  logits = scale * query . key + bias;  allowed = (-left <= s - t <= right) and mask
  out    = softmax(logits where allowed) . value

Dao et al. 2022, arXiv:2205.14135; Dao 2023, arXiv:2307.08691. The kernels' contract is ffi/kernels/attention.h.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zenith_jax.errors import DTypeError, Refusal, ShapeError
from zenith_jax.ops._op import absent, check_kernel_dtype, is_absent, kernel, widened

UNBOUNDED = 1 << 40  # kUnbounded of ffi/kernels/attention.h
# What a row without an allowed key returns: the softmax of -inf only, or of equal finite fills.
MASKED_ROW_NAN, MASKED_ROW_MEAN = 0, 1
# Physical order of query, key, value and out: that of the canonical shape, or with the length before the heads.
HEADS_MAJOR, LENGTH_MAJOR = 0, 1


def _allowed(mask: Any, t: int, s: int, left: int, right: int) -> Any | None:
    """The allowed (query, key) pairs, broadcastable to the logits; None if all are."""
    allowed = None if is_absent(mask) else mask
    if left < UNBOUNDED or right < UNBOUNDED:
        distance = jnp.arange(s)[None, :] - jnp.arange(t)[:, None]
        band = (distance >= -min(left, t + s)) & (distance <= min(right, t + s))
        allowed = band if allowed is None else allowed & band
    return allowed


def _logits(query, key, mask, bias, *, scale, left, right):
    """(logits in float32 or wider, allowed or None)."""
    wide = jnp.promote_types(query.dtype, jnp.float32)
    logits = jnp.einsum("...gtd,...sd->...gts", query, key, preferred_element_type=wide) * scale
    if not is_absent(bias):
        logits = logits + bias.astype(wide)
    return logits, _allowed(mask, query.shape[-2], key.shape[-2], left, right)


def _out(query, key, value, mask, bias, *, scale, left, right, masked_row):
    logits, allowed = _logits(query, key, mask, bias, scale=scale, left=left, right=right)
    if allowed is not None:
        fill = -jnp.inf if masked_row == MASKED_ROW_NAN else jnp.finfo(logits.dtype).min
        logits = jnp.where(allowed, logits, fill)
    # As jax.nn does: the probabilities are rounded to the inputs' dtype for the second product.
    probabilities = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
    if value.shape[-2] == 0:  # no key at all: the mean of nothing
        return jnp.full((*query.shape[:-1], value.shape[-1]), jnp.nan, query.dtype)
    out = jnp.einsum("...gts,...se->...gte", probabilities, value, preferred_element_type=logits.dtype)
    return out.astype(query.dtype)


def _supports(avals: Any, platform: str, **_: Any) -> Refusal | None:
    query, key, value = avals[:3]
    if not query.dtype == key.dtype == value.dtype:
        return Refusal("query, key and value have different dtypes")
    refusal = check_kernel_dtype("attention", query.dtype)
    if refusal is None and platform == "cuda" and max(query.shape[-1], value.shape[-1]) > 256:
        return Refusal("the head size {d} is over 256", dict(d=max(query.shape[-1], value.shape[-1])))
    return refusal


def _full_axes(operand: Any) -> int:
    """Bit set over (batch, kv_head, group, query, key): the axes that `operand` is not broadcast along. -1: absent."""
    if is_absent(operand):
        return -1
    *outer, kv_head, group, t, s = operand.shape
    full = (any(n != 1 for n in outer), kv_head != 1, group != 1, t != 1, s != 1)
    return sum(bit << i for i, bit in enumerate(full))


def _ffi(avals: Any, *, scale, left, right, masked_row, layout) -> dict[str, Any]:
    return dict(
        scale=np.float32(scale),
        left=np.int64(left),
        right=np.int64(right),
        masked_row=np.int32(masked_row),
        layout=np.int32(layout),
        mask_axes=np.int64(_full_axes(avals[3])),
        bias_axes=np.int64(_full_axes(avals[4])),
    )


def _orders(rank: int, layout: int) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
    """Major-to-minor orders of a query-like (*b, g, t, d) and a key-like (*b, s, d) array."""
    if layout == HEADS_MAJOR:
        return None, None
    outer = tuple(range(rank - 1))
    return (*outer, rank + 1, rank - 1, rank, rank + 2), (*outer, rank, rank - 1, rank + 1)


def _forward_layouts(rank: int, *, layout: int, **_: Any) -> tuple[list, list]:
    q, k = _orders(rank, layout)
    return [q, k, k, None, None], [q, None]


def _backward_layouts(rank: int, *, layout: int, **_: Any) -> tuple[list, list]:
    q, k = _orders(rank, layout)
    return [q, k, k, None, None, q, None, q], [q, k, k, None]


def _bias_backward_layouts(rank: int, *, layout: int, **_: Any) -> tuple[list, list]:
    operands, results = _backward_layouts(rank, layout=layout)
    return operands, [*results, None]


# --- kernels ----------------------------------------------------------------------------------------------------------

_F32 = jnp.float32
_OPERANDS = "*b g t d, *b s d, *b s e, ?*b g t s, ?*b g t s"
_BACKWARD_OPERANDS = f"{_OPERANDS}, *b g t e, *b g t, *b g t e"
_NATIVE = dict(supports=_supports, ffi_attributes=_ffi)


def _backward_reference(query, key, value, mask, bias, out, dout, *, with_bias, layout, **attributes):
    del layout
    delta = jnp.sum(widened(dout) * widened(out), axis=-1)
    if with_bias:
        full = (*query.shape[:-1], key.shape[-2])
        bias = jnp.broadcast_to(bias, full).astype(delta.dtype)
        function = lambda q, k, v, b: _out(q, k, v, mask, b, **attributes)  # noqa: E731
        cotangents = jax.vjp(function, query, key, value, bias)[1](dout)
        return *cotangents[:3], delta, cotangents[3]
    function = lambda q, k, v: _out(q, k, v, mask, bias, **attributes)  # noqa: E731
    return *jax.vjp(function, query, key, value)[1](dout), delta


@kernel(
    "attention_bwd",
    f"{_BACKWARD_OPERANDS} -> *b g t d, *b s d, *b s e, *b g t",
    (0, 1, 2, _F32),
    visible=3,
    layouts=_backward_layouts,
    **_NATIVE,
)
def attention_bwd(query, key, value, mask, bias, out, lse, dout, **attributes):
    del lse
    return _backward_reference(query, key, value, mask, bias, out, dout, with_bias=False, **attributes)


@kernel(
    "attention_bias_bwd",
    f"{_BACKWARD_OPERANDS} -> *b g t d, *b s d, *b s e, *b g t, *b g t s",
    (0, 1, 2, _F32, _F32),
    visible=5,
    layouts=_bias_backward_layouts,
    **_NATIVE,
)
def attention_bias_bwd(query, key, value, mask, bias, out, lse, dout, **attributes):
    del lse
    return _backward_reference(query, key, value, mask, bias, out, dout, with_bias=True, **attributes)


def _backward(operands, results, cotangents, needed, **attributes):
    out, lse = results
    bias = operands[4]
    if 4 not in needed:
        dquery, dkey, dvalue, _ = attention_bwd(*operands, out, lse, cotangents[0], **attributes)
        return {0: dquery, 1: dkey, 2: dvalue}
    dquery, dkey, dvalue, _, dbias = attention_bias_bwd(*operands, out, lse, cotangents[0], **attributes)
    broadcast = tuple(i for i, n in enumerate(bias.shape) if n == 1 and dbias.shape[i] != 1)
    dbias = jnp.sum(dbias, axis=broadcast, keepdims=True).astype(bias.dtype)
    return {0: dquery, 1: dkey, 2: dvalue, 4: dbias}


@kernel(
    "attention_fwd",
    f"{_OPERANDS} -> *b g t e, *b g t",
    (0, _F32),
    backward=_backward,
    layouts=_forward_layouts,
    **_NATIVE,
)
def attention_fwd(query, key, value, mask, bias, *, layout, **attributes):
    del layout
    out = _out(query, key, value, mask, bias, **attributes)
    rest = {k: v for k, v in attributes.items() if k != "masked_row"}
    logits, allowed = _logits(query, key, mask, bias, **rest)
    if allowed is not None:
        logits = jnp.where(allowed, logits, -jnp.inf)
    lse = jax.nn.logsumexp(logits, axis=-1) if key.shape[-2] else jnp.full(logits.shape[:-1], -jnp.inf)
    return out, lse.astype(jnp.float32)


# --- op ---------------------------------------------------------------------------------------------------------------


def attention_canonical(
    query,
    key,
    value,
    *,
    mask=None,
    bias=None,
    scale,
    left=UNBOUNDED,
    right=UNBOUNDED,
    masked_row=MASKED_ROW_MEAN,
    layout=HEADS_MAJOR,
):
    """Attention on canonical shapes: query (*b, g, t, d), key (*b, s, d), value (*b, s, e), mask and bias with the rank
    of (*b, g, t, s) and size 1 where broadcast, or None. `layout`: in which physical order the arrays come. No checks
    beyond shapes: `attention` is the function for people."""
    return attention_fwd(
        query,
        key,
        value,
        absent(jnp.bool_) if mask is None else mask,
        absent() if bias is None else bias,
        scale=float(scale),
        left=int(left),
        right=int(right),
        masked_row=masked_row,
        layout=layout,
    )[0]


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
):
    """softmax(scale * query . key + bias where mask) . value, without the (t, s) matrix in memory.

    query: (b, t, h, d); key: (b, s, k, d); value: (b, s, k, e); h a multiple of k (grouped-query attention: query head
    i reads key/value head i // (h // k)). float32, bfloat16 or float16, all alike. Without the axis b: b is 1.
    mask: bool, broadcastable to (b, h, t, s), True where a query may see a key. bias: float, broadcastable likewise.
    scale: default 1/sqrt(d). is_causal: key position <= query position, both counted from 0.
    local_window_size: (left, right) keys visible besides the query's own position, or one number for both.
    Returns (b, t, h, e) in query's dtype. Sums in float32. A query without any allowed key returns the mean of all
    values, as masking with a finite fill does in `jax.nn.dot_product_attention`; one whose bias is -inf everywhere
    returns NaN. Bit-reproducible.
    Differentiable in query, key, value and bias, forward and reverse, to any order.
    Raises ShapeError or DTypeError.
    """
    if query.ndim == 3:
        return attention(
            query[None],
            key[None],
            value[None],
            mask=mask,
            bias=bias,
            scale=scale,
            is_causal=is_causal,
            local_window_size=local_window_size,
        )[0]
    _check(query, key, value, mask, bias)
    b, t, h, d = query.shape
    s, k = key.shape[1:3]
    left, right = _band(is_causal, local_window_size)
    grouped = jnp.transpose(query.reshape(b, t, k, h // k, d), (0, 2, 3, 1, 4))
    out = attention_canonical(
        grouped,
        jnp.swapaxes(key, 1, 2),
        jnp.swapaxes(value, 1, 2),
        mask=_scores("mask", mask, (b, h, t, s), k),
        bias=_scores("bias", bias, (b, h, t, s), k),
        scale=1 / math.sqrt(d) if scale is None else scale,
        left=left,
        right=right,
        # Without a mask only a bias of -inf can empty a row: NaN, as softmax gives.
        masked_row=MASKED_ROW_NAN if mask is None and left == right == UNBOUNDED else MASKED_ROW_MEAN,
        layout=LENGTH_MAJOR,
    )
    return jnp.transpose(out, (0, 3, 1, 2, 4)).reshape(b, t, h, value.shape[-1])


def _band(is_causal: bool, window: int | tuple[int, int] | None) -> tuple[int, int]:
    left = right = UNBOUNDED
    if window is not None:
        left, right = (window, window) if isinstance(window, int) else window
        if left < 0 or right < 0:
            raise ShapeError(f"attention: local_window_size must not be negative, got {window}")
    return left, min(right, 0) if is_causal else right


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
