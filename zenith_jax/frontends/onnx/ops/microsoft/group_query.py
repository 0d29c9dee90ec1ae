"""GroupQueryAttention and RotaryEmbedding: the attention of decoders with a cache of keys and values.

Axes: b batch, t new tokens, s tokens in the cache, h query heads, k key and value heads, d features of a head.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zenith_jax import ops
from zenith_jax.frontends.onnx.ops.microsoft import contrib
from zenith_jax.frontends.onnx.ops.microsoft.attention import merge_heads, scores, split_heads
from zenith_jax.frontends.onnx.values import OnnxError, UnsupportedError, ints


@contrib("RotaryEmbedding")
def rotary_embedding(
    x,
    position_ids,
    cos_cache,
    sin_cache,
    *,
    interleaved=0,
    num_heads=0,
    rotary_embedding_dim=0,
    is_packed_batching=0,
    scale=1.0,
):
    """x: (b, t, h * d) or (b, h, t, d). position_ids: (b, t), or one number at which the first token stands."""
    if is_packed_batching or scale != 1.0:
        raise UnsupportedError("RotaryEmbedding with is_packed_batching or scale is not implemented")
    x, cos_cache, sin_cache = jnp.asarray(x), jnp.asarray(cos_cache), jnp.asarray(sin_cache)
    if x.ndim == 4:
        heads = jnp.swapaxes(x, 1, 2)
    else:
        size = x.shape[2] // num_heads if rotary_embedding_dim and num_heads else 2 * cos_cache.shape[1]
        heads = x.reshape(*x.shape[:2], -1, size)
    positions = jnp.asarray(position_ids)
    if positions.size == 1 and positions.ndim < 2:
        positions = jnp.broadcast_to(positions.reshape(()) + np.arange(heads.shape[1]), heads.shape[:2])
    y = rotated(heads, cos_cache, sin_cache, positions, bool(interleaved))
    return jnp.swapaxes(y, 1, 2) if x.ndim == 4 else y.reshape(x.shape)


def rotated(x: Any, cos_cache: Any, sin_cache: Any, positions: Any, interleaved: bool) -> Any:
    """x: (b, t, h, d), of which the first 2 * (width of the caches) features turn by the angle of their position."""
    half = cos_cache.shape[1]
    cos, sin = (jnp.take(jnp.asarray(c), positions, 0)[:, :, None] for c in (cos_cache, sin_cache))
    turning, rest = x[..., : 2 * half], x[..., 2 * half :]
    if interleaved:
        real, imaginary = turning[..., ::2], turning[..., 1::2]
    else:
        real, imaginary = turning[..., :half], turning[..., half:]
    parts = real * cos - imaginary * sin, real * sin + imaginary * cos
    turned = jnp.stack(parts, -1).reshape(turning.shape) if interleaved else jnp.concatenate(parts, -1)
    return jnp.concatenate([turned, rest], -1).astype(x.dtype) if rest.shape[-1] else turned.astype(x.dtype)


@contrib("GroupQueryAttention")
def group_query_attention(
    query,
    key,
    value,
    past_key,
    past_value,
    seqlens_k,
    total_sequence_length,
    cos_cache=None,
    sin_cache=None,
    position_ids=None,
    attention_bias=None,
    head_sink=None,
    k_scale=None,
    v_scale=None,
    q_norm_weight=None,
    k_norm_weight=None,
    query_seqlens=None,
    *,
    num_heads,
    kv_num_heads,
    causal=1,
    scale=None,
    do_rotary=0,
    rotary_interleaved=0,
    local_window_size=-1,
    softcap=0.0,
    smooth_softmax=0,
    qk_output=0,
    qk_norm_epsilon=1e-6,
    q_norm_epsilon=None,
    k_norm_epsilon=None,
    k_quant_type="NONE",
    v_quant_type="NONE",
    kv_cache_bit_width=0,
    sliding_window_cache=0,
):
    """query: (b, t, h * d), or (b, t, (h + 2 k) * d) with key and value in it. past: (b, k, s, d).

    seqlens_k: for each row its tokens after this step, less one. total_sequence_length: the most of them; it sizes the
    cache, so it must be known while tracing unless the past already has room for it. If it equals t this is the first
    step, and shorter rows are padded on the right; else the new tokens are the last t of each row.
    """
    if k_quant_type != "NONE" or v_quant_type != "NONE" or sliding_window_cache or query_seqlens is not None:
        raise UnsupportedError(
            "GroupQueryAttention with a quantised or sliding cache or with query_seqlens is not implemented"
        )
    query = jnp.asarray(query)
    if key is None:
        size = query.shape[2] // (num_heads + 2 * kv_num_heads)
        ends = np.cumsum([num_heads * size, kv_num_heads * size]).tolist()
        query, key, value = jnp.split(query, ends, axis=-1)
    query = split_heads(query, num_heads)
    key, value = (split_heads(jnp.asarray(v), kv_num_heads) for v in (key, value))
    if q_norm_weight is not None:
        query = ops.rms_norm(query, jnp.asarray(q_norm_weight), eps=q_norm_epsilon or qk_norm_epsilon)
        key = ops.rms_norm(key, jnp.asarray(k_norm_weight), eps=k_norm_epsilon or qk_norm_epsilon)
    b, t = query.shape[:2]
    (total,) = ints(total_sequence_length, "total_sequence_length")
    tokens = jnp.asarray(seqlens_k).reshape(-1) + 1
    first = jnp.zeros_like(tokens) if total == t else tokens - t  # where the new tokens begin
    positions = first[:, None] + np.arange(t)
    if do_rotary:
        if cos_cache is None or sin_cache is None:
            raise OnnxError("GroupQueryAttention with do_rotary needs cos_cache and sin_cache")
        at = positions if position_ids is None or total == t else jnp.asarray(position_ids)
        query, key = (rotated(v, cos_cache, sin_cache, at, bool(rotary_interleaved)) for v in (query, key))
    key, value = (_cached(p, v, first, total) for p, v in ((past_key, key), (past_value, value)))
    present = jnp.swapaxes(key, 1, 2), jnp.swapaxes(value, 1, 2)
    key, value = key[:, :total], value[:, :total]

    along = np.arange(total)
    seen = positions[:, :, None] if causal else (tokens - 1)[:, None, None]
    allowed = along <= seen
    if local_window_size > 0:
        allowed = allowed & (along > positions[:, :, None] - local_window_size)
    allowed = jnp.broadcast_to(allowed, (b, t, total))[:, None]
    bias = None if attention_bias is None else jnp.asarray(attention_bias)[..., :total].astype(query.dtype)
    if not softcap and not smooth_softmax and head_sink is None and not qk_output:
        out = ops.attention(query, key, value, mask=allowed, bias=bias, scale=scale or None)
        return merge_heads(out), *present
    out, matrix = _explicit(query, key, value, allowed, bias, scale, softcap, smooth_softmax, head_sink, qk_output)
    return (merge_heads(out), *present, matrix)


def _cached(past: Any, new: Any, first: Any, total: int) -> Any:
    """(b, s, k, d): the past with the new tokens from `first` on, as long as the longer of the past and `total`."""
    b, t, k, d = new.shape
    room = 0 if past is None else past.shape[2]
    if room == 0 and total == t:
        return new
    cache = jnp.zeros((b, max(room, total), k, d), new.dtype)
    if room:
        cache = cache.at[:, :room].set(jnp.swapaxes(jnp.asarray(past), 1, 2))
    return jax.vmap(lambda row, tokens, at: jax.lax.dynamic_update_slice(row, tokens, (at, 0, 0)))(
        cache, new, jnp.asarray(first).astype(jnp.int32)
    )


def _explicit(query, key, value, allowed, bias, scale, softcap, smooth_softmax, head_sink, qk_output):
    """With the matrix of probabilities, for what Zenith's attention does not know."""
    logits = scores(query, key, scale)
    logits = softcap * jnp.tanh(logits / softcap) if softcap else logits
    logits = logits if bias is None else logits + bias
    logits = jnp.where(allowed, logits, -jnp.inf)
    if smooth_softmax or head_sink is not None:  # one more key, whose value is zero
        sink = jnp.zeros(query.shape[2]) if head_sink is None else jnp.asarray(head_sink)
        sink = jnp.broadcast_to(sink.astype(logits.dtype).reshape(1, -1, 1, 1), (*logits.shape[:3], 1))
        weights = jax.nn.softmax(jnp.concatenate([logits, sink], -1), -1)[..., :-1]
    else:
        weights = jax.nn.softmax(logits, -1)
    b, t, h, _ = query.shape
    k = key.shape[2]
    grouped = weights.reshape(b, k, h // k, t, -1).astype(value.dtype)
    out = jnp.einsum("bkgts,bske->btkge", grouped, value).reshape(b, t, h, -1).astype(query.dtype)
    matrix = {0: None, 1: logits, 2: weights}[qk_output]
    return out, None if matrix is None else matrix.astype(query.dtype)
