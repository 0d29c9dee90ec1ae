"""Attention and rotary embeddings: https://onnx.ai/onnx/operators/onnx__Attention.html

Written in the form that Zenith's rewriter knows: it then chooses kernel, layout and whether the kernel pays, and
reports it, as for attention that comes decomposed.

Letters: b batch, h query heads, k key/value heads, g = h/k query heads to each of them, t queries, s keys,
d query/key features, e value features.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import dtypes

from zenith_jax.frontends.onnx.dtypes import from_onnx
from zenith_jax.frontends.onnx.errors import OnnxError
from zenith_jax.frontends.onnx.ops._arrays import in_jax
from zenith_jax.frontends.onnx.registry import operator

# qk_matmul_output_mode
RAW, CAPPED, BIASED, PROBABILITIES = range(4)


@operator("Attention", since=23)
@in_jax
def attention(
    q,
    k,
    v,
    attn_mask=None,
    past_key=None,
    past_value=None,
    nonpad_kv_seqlen=None,
    *,
    is_causal=0,
    kv_num_heads=None,
    left_window_size=-1,
    q_num_heads=None,
    qk_matmul_output_mode=RAW,
    right_window_size=-1,
    scale=None,
    softcap=0.0,
    softmax_precision=None,
    node,
):
    """softmax(scale * q k^T + mask) v, with a cache of keys and values in front and a row of zeros where no key may be
    seen. Returns (output, present key, present value, what qk_matmul_output_mode says).

    q: (b, h, t, d) or (b, t, h * d); k, v likewise; the output as q. Query t stands at position t + offset among the
    keys, offset the length of the cache; with nonpad_kv_seqlen (b,), how many keys count, that less t.
    """
    flat = q.ndim == 3
    if flat:
        if not q_num_heads or not kv_num_heads:
            raise OnnxError("Attention: q_num_heads and kv_num_heads must be given where Q, K and V have rank 3")
        q, k, v = _heads(q, q_num_heads), _heads(k, kv_num_heads), _heads(v, kv_num_heads)
    if (past_key is None) != (past_value is None):
        raise OnnxError("Attention: past_key and past_value must be given together")
    if past_key is not None and past_value is not None:
        k, v = jnp.concatenate([past_key, k], axis=2), jnp.concatenate([past_value, v], axis=2)
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise OnnxError(f"Attention: query heads must be a multiple of key/value heads, got {q.shape[1]}, {k.shape[1]}")
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    offset = past_key.shape[2] if past_key is not None else 0
    if nonpad_kv_seqlen is not None and past_key is None:
        offset = (nonpad_kv_seqlen - q.shape[2]).reshape(-1, 1, 1, 1)
    mask = _Mask.of(
        q.shape[2],
        k.shape[2],
        attn_mask,
        lengths=nonpad_kv_seqlen,
        offset=offset,
        left=None if left_window_size < 0 else left_window_size,
        right=0 if is_causal else None if right_window_size < 0 else right_window_size,
    )
    y, scores = _attended(q, k, v, mask, scale, softcap, softmax_precision, qk_matmul_output_mode)
    if flat:
        y = jnp.swapaxes(y, 1, 2).reshape(y.shape[0], y.shape[2], -1)
    return y, k, v, scores


def _heads(x: Any, heads: int) -> Any:
    """(b, t, h * d) -> (b, h, t, d)."""
    return jnp.swapaxes(x.reshape(*x.shape[:2], heads, -1), 1, 2)


@dataclasses.dataclass(frozen=True)
class _Mask:
    """Which keys a query may see: left <= s - t <= right, in numbers where those are known, and what `allowed` says.

    allowed: bool, broadcastable to (b, h, t, s), or None for all. bias: added to the logits, broadcastable likewise.
    """

    left: int | None
    right: int | None
    allowed: Any
    bias: Any
    t: int
    s: int

    @classmethod
    def of(cls, t: int, s: int, mask: Any, *, lengths: Any, offset: Any, left: Any, right: Any) -> _Mask:
        low = None if left is None else offset - left
        high = None if right is None else offset + right
        allowed = bias = None
        if mask is not None:
            is_bool = mask.dtype == jnp.bool_
            missing = s - mask.shape[-1]  # the last axis may be shorter than the keys: those behind are not seen
            if missing > 0 and mask.shape[-1] != 1:
                fill = False if is_bool else -jnp.inf
                mask = jnp.pad(mask, [(0, 0)] * (mask.ndim - 1) + [(0, missing)], constant_values=fill)
            mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
            allowed, bias = (mask, None) if is_bool else (None, mask)
        if lengths is not None:
            valid = jnp.arange(s) < lengths.reshape(-1, 1, 1, 1)
            allowed = valid if allowed is None else allowed & valid
        if not isinstance(offset, int):
            band = _band(t, s, low, high)
            if band is not None:
                allowed = band if allowed is None else allowed & band
            low = high = None
        return cls(low, high, allowed, bias, t, s)

    def everything(self) -> Any:
        """`allowed` with the band, or None."""
        band = _band(self.t, self.s, self.left, self.right)
        if band is None or self.allowed is None:
            return band if self.allowed is None else self.allowed
        return self.allowed & band

    def rows(self) -> Any:
        """Whether a query sees any key, broadcastable to (b, h, t, 1); None if each one does."""
        if self.allowed is None and self.bias is None:
            if self.left is None and (self.right is None or self.right >= 0):
                return None  # each sees the first key; so sizes may be symbolic here
            queries = np.arange(self.t)
            first = np.zeros_like(queries) if self.left is None else np.maximum(0, queries + self.left)
            last = np.full_like(queries, self.s - 1)
            last = last if self.right is None else np.minimum(last, queries + self.right)
            return None if (first <= last).all() else jnp.asarray(first <= last)[:, None]
        seen = self.everything()
        if self.bias is not None:
            finite = self.bias != -jnp.inf
            seen = finite if seen is None else seen & finite
        return jnp.any(seen, axis=-1, keepdims=True)


def _band(t: int, s: int, low: Any, high: Any) -> Any:
    """low <= s - t <= high, (t, s) or, for bounds that vary, (b, 1, t, s); None without bounds."""
    distance = jnp.arange(s)[None, :] - jnp.arange(t)[:, None]
    above = None if low is None else distance >= low
    below = None if high is None else distance <= high
    return above if below is None else below if above is None else above & below


def _attended(
    q: Any, k: Any, v: Any, mask: _Mask, scale: float, softcap: float, precision: int | None, mode: int
) -> tuple[Any, Any]:
    """(output, scores). A query without a key sees all of them, so that nothing is NaN, and its row is zero after."""
    dtype = q.dtype
    b, h, t, d = q.shape
    heads, s = k.shape[1:3]
    root = np.asarray(math.sqrt(abs(scale)), dtype)
    query = (q * np.copysign(root, scale)).reshape(b, heads, h // heads, t, d)
    logits = raw = jnp.einsum("bkgtd,bksd->bkgts", query, k * root).reshape(b, h, t, s)
    if softcap:
        cap = np.asarray(softcap, dtype)
        logits = cap * jnp.tanh(logits / cap)
    capped = logits
    rows = mask.rows()
    bias, allowed = mask.bias, mask.everything()
    if rows is not None:
        bias = None if bias is None else jnp.where(rows, bias, jnp.zeros((), bias.dtype))
        allowed = None if allowed is None else allowed | ~rows
    if bias is not None:
        logits = logits + bias
    if allowed is not None:
        logits = jnp.where(allowed, logits, -jnp.inf)
    wide = dtype if precision is None else dtypes.canonicalize_dtype(from_onnx(precision))
    p = jax.nn.softmax(logits.astype(wide), axis=-1).astype(dtype) if s else logits
    y = jnp.einsum("bkgts,bkse->bkgte", p.reshape(b, heads, h // heads, t, s), v.astype(dtype))
    y = y.reshape(b, h, t, v.shape[-1])
    if rows is not None:
        y, p = jnp.where(rows, y, jnp.zeros((), dtype)), jnp.where(rows, p, jnp.zeros((), dtype))
        logits = jnp.where(rows, logits, -jnp.inf)
    return y, (raw, capped, logits, p)[mode]


@operator("RotaryEmbedding", since=23)
@in_jax
def rotary_embedding(x, cos_cache, sin_cache, position_ids=None, *, interleaved=0, num_heads=0, rotary_embedding_dim=0):
    """Pairs of features turned by an angle that grows with the position. Su et al. 2021, arXiv:2104.09864.

    x: (b, h, t, d) or (b, t, h * d). cos, sin: (b or 1, t, r/2), or (positions, r/2) with position_ids (b, t); the
    first r features are turned, all of them by default. A pair is (i, i + r/2), or (2i, 2i + 1) if interleaved.
    """
    if x.ndim == 3 and not num_heads:
        raise OnnxError("RotaryEmbedding: num_heads must be given where X has rank 3")
    heads = _heads(x, num_heads) if x.ndim == 3 else x
    size = rotary_embedding_dim or heads.shape[-1]
    if position_ids is not None:
        cos_cache, sin_cache = cos_cache[position_ids], sin_cache[position_ids]
    cos, sin = cos_cache[:, None], sin_cache[:, None]
    if cos.shape[-1] != size // 2:
        raise OnnxError(f"RotaryEmbedding: the last axis of cos must be half of {size}, got shape {cos_cache.shape}")
    turned, rest = heads[..., :size], heads[..., size:]
    if interleaved:
        first, second = turned[..., 0::2], turned[..., 1::2]
    else:
        first, second = turned[..., : size // 2], turned[..., size // 2 :]
    pair = [cos * first - sin * second, sin * first + cos * second]
    y = jnp.stack(pair, axis=-1).reshape(turned.shape) if interleaved else jnp.concatenate(pair, axis=-1)
    y = jnp.concatenate([y, rest], axis=-1) if rest.shape[-1] else y
    return jnp.swapaxes(y, 1, 2).reshape(x.shape) if x.ndim == 3 else y
