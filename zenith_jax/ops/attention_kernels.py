"""The kernels of attention, their references, and attention on canonical shapes.

Axes: *b batch (its last one the key/value heads), g query heads to a key/value head, t query length, s key length,
d query/key features, e value features.

  logits  = cap(scale * query . key) + bias;  cap(x) = softcap * tanh(x / softcap), or x where softcap is 0
  allowed = (-left <= s - t <= right) and mask and first <= s < last and query_segments == key_segments
  out     = softmax(logits where allowed) . value;  lse = log(sum(exp(logits where allowed)))

The forward kernel has a hidden result, lse_rest: what float32 rounds off lse in rows that a bias moves far from 0, for
the backward kernels. The last result of each, w words for each element of *b, is scratch.

`interval` holds (first, last) of each query. An attention sink, one more logit without a value, is arithmetic on out
and lse: out * sigmoid(lse - sink).

Dao et al. 2022, arXiv:2205.14135; Dao 2023, arXiv:2307.08691. The kernels' contract is ffi/kernels/attention.h.
"""

from __future__ import annotations

import functools as ft
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zenith_jax.errors import Refusal
from zenith_jax.ops._op import WIDENED, absent, check_kernel_dtype, dense, is_absent, is_zero, kernel, widened

UNBOUNDED = 1 << 40  # kUnbounded of ffi/kernels/attention.h
# What a row without an allowed key returns: the softmax of -inf only, or of equal finite fills.
MASKED_ROW_NAN, MASKED_ROW_MEAN = 0, 1
# Physical order of query, key, value and out: that of the canonical shape, or with the length before the heads.
HEADS_MAJOR, LENGTH_MAJOR = 0, 1


def _structure_mask(structure: Sequence[Any], s: int) -> Any | None:
    """What interval and segments allow, broadcastable to the logits; None if everything."""
    interval, query_segments, key_segments = structure
    allowed = None
    if not is_absent(interval):
        position = jnp.arange(s, dtype=interval.dtype)
        allowed = (interval[..., :1] <= position) & (position < interval[..., 1:])
    if not is_absent(query_segments):
        same = query_segments[..., None, :, None] == key_segments[..., None, None, :]
        allowed = same if allowed is None else allowed & same
    return allowed


def _allowed(mask, structure: Sequence[Any], t: int, s: int, left: int, right: int) -> Any | None:
    """The allowed (query, key) pairs, broadcastable to the logits; None if all are."""
    parts = [_structure_mask(structure, s), None if is_absent(mask) else mask]
    if left < UNBOUNDED or right < UNBOUNDED:
        distance = jnp.arange(s)[None, :] - jnp.arange(t)[:, None]
        parts.append((distance >= -min(left, t + s)) & (distance <= min(right, t + s)))
    parts = [x for x in parts if x is not None]
    return ft.reduce(jnp.logical_and, parts) if parts else None


def _logits(query, key, mask, bias, *structure, scale, softcap, left, right):
    """(logits in float32 or wider, allowed or None)."""
    wide = jnp.promote_types(query.dtype, jnp.float32)
    logits = jnp.einsum("...gtd,...sd->...gts", query, key, preferred_element_type=wide) * scale
    if softcap:
        logits = softcap * jnp.tanh(logits / softcap)
    if not is_absent(bias):
        logits = logits + bias.astype(wide)
    return logits, _allowed(mask, structure, query.shape[-2], key.shape[-2], left, right)


def _out(query, key, value, mask, bias, *structure, masked_row, **attributes):
    logits, allowed = _logits(query, key, mask, bias, *structure, **attributes)
    if allowed is not None:
        fill = -jnp.inf if masked_row == MASKED_ROW_NAN else jnp.finfo(logits.dtype).min
        logits = jnp.where(allowed, logits, fill)
    # As jax.nn does: the probabilities are rounded to the inputs' dtype for the second product.
    probabilities = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
    if value.shape[-2] == 0:  # no key at all: the mean of nothing
        return jnp.full((*query.shape[:-1], value.shape[-1]), jnp.nan, query.dtype)
    out = jnp.einsum("...gts,...se->...gte", probabilities, value, preferred_element_type=logits.dtype)
    return out.astype(query.dtype)


def _lse(query, key, mask, bias, *structure, **attributes):
    logits, allowed = _logits(query, key, mask, bias, *structure, **attributes)
    if allowed is not None:
        logits = jnp.where(allowed, logits, -jnp.inf)
    return jax.nn.logsumexp(logits, axis=-1) if key.shape[-2] else jnp.full(logits.shape[:-1], -jnp.inf)


def unsupported(platform: str, *, head_size: int) -> Refusal | None:
    """What no kernel of the platform computes."""
    if platform == "cuda" and head_size > 256:
        return Refusal("the head size {d} is over 256", dict(d=head_size))
    return None


def _scratch_words(query: Any, value: Any, mask: Any, structure: Sequence[Any], softcap: float) -> int:
    """32-bit words for each element of *b: MaskScratchWords of ffi/kernels/attention.h, where kernels for Hopper would
    use them (cuda/attention.cu), at least 1. With other batch sizes of mask or structure they do without."""
    (*batch, _, t, d), (s, e) = query.shape, value.shape[-2:]
    # (*b, g, t) of what masks, 1 where it does not vary
    interval, query_segments, key_segments = structure
    shapes = [x.shape[:-1] for x in (mask, interval) if not is_absent(x)]
    shapes += [(*x.shape[:-1], 1, n) for x, n in ((query_segments, t), (key_segments, 1)) if not is_absent(x)]
    if not shapes or query.dtype.itemsize != 2 or max(d, e) > 128 or max(t, s) <= 128 or softcap:
        return 1
    *outer, queries = (max(sizes) for sizes in zip(*shapes, strict=True))
    matrices = math.prod(outer)
    row_words, column_words = -(-s // 128) * 4, -(-queries // 128) * 4
    bits = 0 if is_absent(mask) else queries * row_words + s * column_words
    words = matrices * bits + -(-matrices * -(-queries // 64) * row_words // 16) * 4
    return max(1, -(-words // max(1, math.prod(batch))))


def _supports(avals: Any, platform: str, **_: Any) -> Refusal | None:
    query, key, value = avals[:3]
    if not query.dtype == key.dtype == value.dtype:
        return Refusal("query, key and value have different dtypes")
    return check_kernel_dtype("attention", query.dtype) or unsupported(
        platform, head_size=max(query.shape[-1], value.shape[-1])
    )


def _adapted(operands: Any, platform: str, **_: Any) -> list[Any]:
    """On cuda, segments as an interval too, from the first key of a query's segment to the last: the kernels skip what
    is outside of intervals. The CPU's look at the segments of each block."""
    interval, query_segments, key_segments = operands[5:8]
    if platform != "cuda" or is_absent(query_segments):
        return list(operands)
    same = query_segments[..., :, None] == key_segments[..., None, :]  # never an array: reduced as it is computed
    position = jnp.arange(same.shape[-1], dtype=jnp.int32)
    first = jnp.min(jnp.where(same, position, same.shape[-1]), axis=-1)[..., None, :]
    last = jnp.max(jnp.where(same, position + 1, 0), axis=-1)[..., None, :]
    if not is_absent(interval):
        first, last = jnp.maximum(first, interval[..., 0]), jnp.minimum(last, interval[..., 1])
    return [*operands[:5], jnp.stack([first, last], axis=-1), *operands[6:]]


_BATCH, _KV_HEAD, _GROUP, _QUERY, _KEY = 1, 2, 4, 8, 16  # ScoreAxis of ffi/attention.cc
_SCORES, _QUERIES, _KEYS = (_KV_HEAD, _GROUP, _QUERY, _KEY), (_KV_HEAD, _QUERY), (_KV_HEAD, _KEY)


def _full_axes(operand: Any, bits: tuple[int, ...]) -> np.int64:
    """Bit set: the axes that `operand` is not broadcast along; `bits`: of its last axes. -1: absent."""
    if is_absent(operand):
        return np.int64(-1)
    outer, inner = operand.shape[: -len(bits)], operand.shape[-len(bits) :]
    varies = any(n != 1 for n in outer) * _BATCH
    return np.int64(varies + sum(bit for bit, n in zip(bits, inner, strict=True) if n != 1))


def _ffi(avals: Any, *, scale, softcap, left, right, masked_row, layout, allow_tf32, w) -> dict[str, Any]:
    del w
    return dict(
        scale=np.float32(scale),
        softcap=np.float32(softcap),
        left=np.int64(left),
        right=np.int64(right),
        masked_row=np.int32(masked_row),
        layout=np.int32(layout),
        allow_tf32=np.int32(allow_tf32),
        mask_axes=_full_axes(avals[3], _SCORES),
        bias_axes=_full_axes(avals[4], _SCORES),
        interval_axes=_full_axes(avals[5], _SCORES),
        query_segments_axes=_full_axes(avals[6], _QUERIES),
        key_segments_axes=_full_axes(avals[7], _KEYS),
    )


def _orders(rank: int, layout: int) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
    """Major-to-minor orders of a query-like (*b, g, t, d) and a key-like (*b, s, d) array."""
    if layout == HEADS_MAJOR:
        return None, None
    outer = tuple(range(rank - 1))
    return (*outer, rank + 1, rank - 1, rank, rank + 2), (*outer, rank, rank - 1, rank + 1)


def _forward_layouts(rank: int, *, layout: int, **_: Any) -> tuple[list, list]:
    q, k = _orders(rank, layout)
    return [q, k, k, *[None] * 5], [q, None, None, None]


def _backward_layouts(rank: int, *, layout: int, **_: Any) -> tuple[list, list]:
    q, k = _orders(rank, layout)
    return [q, k, k, *[None] * 5, q, None, None, q, None], [q, k, k, None, None]


def _bias_backward_layouts(rank: int, *, layout: int, **_: Any) -> tuple[list, list]:
    operands, results = _backward_layouts(rank, layout=layout)
    return operands, [*results, None]


# --- kernels ----------------------------------------------------------------------------------------------------------

_F32 = jnp.float32
_OPERANDS = "*b g t d, *b s d, *b s e, ?*b g t s, ?*b g t s, ?*b g t i, ?*b t, ?*b s"
_BACKWARD_OPERANDS = f"{_OPERANDS}, *b g t e, *b g t, ?*b g t, *b g t e, ?*b g t"
_NATIVE = dict(
    supports=_supports,
    adapted=_adapted,
    ffi_attributes=_ffi,
    shapes_in_layout=lambda attributes: {"layout": np.int32(2)} if attributes["layout"] == LENGTH_MAJOR else None,
    scratch=1,
)


def _scratch(query, w: int) -> Any:
    return jnp.zeros((*query.shape[:-3], w), jnp.uint32)


def _forward_reference(*operands, masked_row, **attributes):
    lse = _lse(*operands[:2], *operands[3:], **attributes)
    return _out(*operands, masked_row=masked_row, **attributes), lse, jnp.zeros(lse.shape, _F32)


def _backward_reference(query, key, value, mask, bias, *rest, with_bias, layout, allow_tf32, w, **attributes):
    del layout, allow_tf32
    *structure, out, _, _, dout, dlse = rest
    delta = jnp.sum(widened(dout) * widened(out), axis=-1)

    def function(query, key, value, bias):
        operands = (query, key, value, mask, bias, *structure)
        return _out(*operands, **attributes) if is_absent(dlse) else _forward_reference(*operands, **attributes)[:2]

    if not is_absent(dlse):
        delta, dout = delta - dlse, (dout, dlse.astype(delta.dtype))
    if with_bias:
        bias = jnp.broadcast_to(bias, (*query.shape[:-1], key.shape[-2])).astype(delta.dtype)
    cotangents = jax.vjp(function, query, key, value, bias)[1](dout)
    return *cotangents[:3], delta, *([cotangents[3]] if with_bias else []), _scratch(query, w)


@kernel(
    "attention_bwd",
    f"{_BACKWARD_OPERANDS} -> *b g t d, *b s d, *b s e, *b g t, *b w",
    (0, 1, 2, _F32, jnp.uint32),
    visible=3,
    layouts=_backward_layouts,
    **_NATIVE,
)
def attention_bwd(*operands, **attributes):
    return _backward_reference(*operands, with_bias=False, **attributes)


@kernel(
    "attention_bias_bwd",
    f"{_BACKWARD_OPERANDS} -> *b g t d, *b s d, *b s e, *b g t, *b g t s, *b w",
    (0, 1, 2, _F32, _F32, jnp.uint32),
    visible=5,
    layouts=_bias_backward_layouts,
    **_NATIVE,
)
def attention_bias_bwd(*operands, **attributes):
    return _backward_reference(*operands, with_bias=True, **attributes)


def _backward(operands, results, cotangents, needed, **attributes):
    bias = operands[4]
    out, lse, lse_rest = results
    dout, dlse = dense(cotangents)
    if is_zero(cotangents[1]):
        dlse = absent()
    if is_absent(bias):
        lse_rest = absent()
    operands = (*operands, out, lse, lse_rest, dout, dlse)
    if 4 not in needed:
        dquery, dkey, dvalue, *_ = attention_bwd(*operands, **attributes)
        return {0: dquery, 1: dkey, 2: dvalue}
    dquery, dkey, dvalue, _, dbias, _ = attention_bias_bwd(*operands, **attributes)
    broadcast = tuple(i for i, n in enumerate(bias.shape) if n == 1 and dbias.shape[i] != 1)
    dbias = jnp.sum(dbias, axis=broadcast, keepdims=True).astype(bias.dtype)
    return {0: dquery, 1: dkey, 2: dvalue, 4: dbias}


@kernel(
    "attention_fwd",
    f"{_OPERANDS} -> *b g t e, *b g t, *b g t, *b w",
    (0, WIDENED, _F32, jnp.uint32),
    visible=2,
    backward=_backward,
    layouts=_forward_layouts,
    **_NATIVE,
)
def attention_fwd(*operands, layout, allow_tf32, w, **attributes):
    del layout, allow_tf32
    return *_forward_reference(*operands, **attributes), _scratch(operands[0], w)


# --- on canonical shapes ----------------------------------------------------------------------------------------------


def attention_canonical(
    query,
    key,
    value,
    *,
    mask=None,
    bias=None,
    interval=None,
    query_segments=None,
    key_segments=None,
    scale,
    softcap=0.0,
    left=UNBOUNDED,
    right=UNBOUNDED,
    masked_row=MASKED_ROW_MEAN,
    layout=HEADS_MAJOR,
    allow_tf32=False,
):
    """(out, lse) on canonical shapes: query (*b, g, t, d), key (*b, s, d), value (*b, s, e); with the rank of these and
    size 1 where broadcast, or None, mask and bias (*b, g, t, s) and in int32 interval (*b, g, t, 2), query_segments
    (*b, t), key_segments (*b, s). lse: (*b, g, t), float32 or wider, -inf for a query without an allowed key.
    `layout`: in which physical order the arrays come. allow_tf32: whether a GPU's products may round float32. No checks
    beyond shapes: `attention` is the one for people."""

    def optional(x: Any, dtype: Any) -> Any:
        return absent(dtype) if x is None else x

    mask = optional(mask, jnp.bool_)
    structure = [optional(x, jnp.int32) for x in (interval, query_segments, key_segments)]
    out, lse, *_ = attention_fwd(
        query,
        key,
        value,
        mask,
        optional(bias, jnp.float32),
        *structure,
        scale=float(scale),
        softcap=float(softcap),
        left=int(left),
        right=int(right),
        masked_row=masked_row,
        layout=layout,
        allow_tf32=bool(allow_tf32),
        w=_scratch_words(query, value, mask, structure, softcap),
    )
    return out, lse


def value_share(lse, sink=None, masked_row: int = MASKED_ROW_MEAN):
    """What the probabilities of a row's keys sum to, (*b, g, t): 1, less what a sink takes; NaN where softmax is NaN.

    lse: of `attention_canonical`. sink: one more logit for each row, without a value, (*b, g, t), 1 where broadcast.
    masked_row: what a row is without an allowed key, and with a sink of -inf, if there is one.
    """
    empty = lse == -jnp.inf
    of_empty = 1.0 if masked_row == MASKED_ROW_MEAN else jnp.nan
    if sink is None:
        return jnp.where(jnp.isnan(lse), jnp.nan, jnp.where(empty, of_empty, 1.0))
    sink = sink.astype(lse.dtype)
    share = jax.nn.sigmoid(jnp.where(empty, 0, lse) - sink)
    share = jnp.where(empty, jnp.where(sink == -jnp.inf, of_empty, 0.0), share)
    return jnp.where(sink == jnp.inf, jnp.nan, share)


def with_sink(out, lse, sink, masked_row: int = MASKED_ROW_MEAN):
    """Attention whose softmax has one more logit, without a value: see `value_share`.

    out, lse: of `attention_canonical` with MASKED_ROW_MEAN, so that out is finite where no key is allowed.
    """
    return (out * value_share(lse, sink, masked_row)[..., None]).astype(out.dtype)


def with_nan_rows_zero(out, lse, sink=None, masked_row: int = MASKED_ROW_NAN):
    """`with_sink`, or out as it is, where softmax's rows of NaN are made 0 before the product with value. Their
    gradients are 0 too."""
    share = value_share(lse, sink, masked_row)[..., None]
    nan = jnp.isnan(share)
    kept = out if sink is None else out * jnp.where(nan, 0, share)
    return jnp.where(nan, 0, kept).astype(out.dtype)
