"""Attention, MultiHeadAttention and QAttention, on Zenith's attention.

Axes: b batch, t queries, s keys, h heads, d features of a head. Masks of these operators add `mask_filter_value`
(-10000) to the logits; a row without any allowed key is therefore as if it had no mask, and so it is here.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zenith_jax import ops
from zenith_jax.frontends.onnx.ops.linear import integer_matmul
from zenith_jax.frontends.onnx.ops.microsoft import contrib
from zenith_jax.frontends.onnx.values import OnnxError, UnsupportedError

MASKED = -10000.0


@contrib("Attention")
def attention(
    x,
    weights,
    bias=None,
    mask_index=None,
    past=None,
    attention_bias=None,
    past_sequence_length=None,
    *,
    num_heads,
    unidirectional=0,
    qkv_hidden_sizes=None,
    mask_filter_value=MASKED,
    scale=None,
    do_rotary=0,
    rotary_embedding_dim=0,
    past_present_share_buffer=0,
):
    """x: (b, t, features); weights: (features, query + key + value sizes). Returns (b, t, h * d) and past and present.

    past: (2, b, h, s, d), keys and values.
    """
    _refuse(do_rotary=do_rotary, past_present_share_buffer=past_present_share_buffer)
    x = jnp.asarray(x)
    projected = jnp.matmul(x, weights)
    projected = projected if bias is None else projected + bias
    attributes = {"num_heads": num_heads, "unidirectional": unidirectional, "scale": scale}
    return _self_attention(
        projected, mask_index, past, attention_bias, qkv_hidden_sizes, mask_filter_value, **attributes
    )


@contrib("QAttention")
def quantized_attention(
    x,
    weight,
    bias,
    input_scale,
    weight_scale,
    mask_index=None,
    input_zero_point=None,
    weight_zero_point=None,
    past=None,
    *,
    num_heads,
    unidirectional=0,
    mask_filter_value=MASKED,
    scale=None,
    do_rotary=0,
    past_present_share_buffer=0,
):
    """Attention whose projection is a product of 8-bit integers."""
    _refuse(do_rotary=do_rotary, past_present_share_buffer=past_present_share_buffer)
    product = integer_matmul(x, weight, input_zero_point, weight_zero_point).astype(jnp.float32)
    projected = product * (jnp.asarray(input_scale) * jnp.asarray(weight_scale)) + bias
    attributes = {"num_heads": num_heads, "unidirectional": unidirectional, "scale": scale}
    return _self_attention(projected, mask_index, past, None, None, mask_filter_value, **attributes)


def _refuse(**attributes: Any) -> None:
    asked = [name for name, value in attributes.items() if value]
    if asked:
        raise UnsupportedError(f"{' and '.join(asked)} of com.microsoft's attention is not implemented")


def _self_attention(projected, mask, past, bias, sizes, filter_value, *, num_heads, unidirectional, scale):
    third = projected.shape[-1] // 3
    sizes = sizes or (third, third, third)
    query, key, value = (
        split_heads(part, num_heads) for part in jnp.split(projected, np.cumsum(sizes[:2]).tolist(), axis=-1)
    )
    present = None
    if key.shape == value.shape:  # else there is no such array, and no past
        present = jnp.stack([jnp.swapaxes(key, 1, 2), jnp.swapaxes(value, 1, 2)])
    if past is not None and present is not None:
        present = jnp.concatenate([jnp.asarray(past), present], 3)
        key, value = jnp.swapaxes(present[0], 1, 2), jnp.swapaxes(present[1], 1, 2)
    bias = _with_mask(bias, mask, query, key, filter_value)
    return merge_heads(attend(query, key, value, bias=bias, causal=bool(unidirectional), scale=scale)), present


@contrib("MultiHeadAttention")
def multi_head_attention(
    query,
    key=None,
    value=None,
    bias=None,
    key_padding_mask=None,
    attention_bias=None,
    past_key=None,
    past_value=None,
    past_sequence_length=None,
    cache_indirection=None,
    *,
    num_heads,
    mask_filter_value=MASKED,
    scale=None,
    unidirectional=0,
    node,
):
    """query: (b, t, h * d), or (b, t, h, 3, d) with key and value in it; key: (b, s, h * d), or (b, s, h, 2, d) with
    value, or (b, h, s, d). Returns (b, t, h * d), keys and values as (b, h, s, d), and the probabilities."""
    if past_sequence_length is not None or cache_indirection is not None:
        raise UnsupportedError("MultiHeadAttention with a shared cache buffer or cache_indirection is not implemented")
    query = jnp.asarray(query)
    if query.ndim == 5:
        query, key, value = query[:, :, :, 0], query[:, :, :, 1], query[:, :, :, 2]
    elif key is None or (value is None and key.ndim != 5):
        raise OnnxError("MultiHeadAttention needs key and value, or a query of shape (b, t, h, 3, d)")
    elif key.ndim == 5:
        query, key, value = split_heads(query, num_heads), key[:, :, :, 0], key[:, :, :, 1]
    else:
        query = split_heads(query, num_heads)
        key, value = _by_length(key, num_heads), _by_length(value, num_heads)
    if bias is not None:
        sizes = [v.shape[2] * v.shape[3] for v in (query, key, value)]
        parts = jnp.split(jnp.asarray(bias), np.cumsum(sizes[:2]).tolist())
        query, key, value = (
            v + part.reshape(num_heads, -1) for v, part in zip((query, key, value), parts, strict=True)
        )
    if past_key is not None:
        key, value = (
            jnp.concatenate([jnp.swapaxes(jnp.asarray(past), 1, 2), new], 1)
            for past, new in ((past_key, key), (past_value, value))
        )
    total = _with_mask(attention_bias, key_padding_mask, query, key, mask_filter_value)
    out = merge_heads(attend(query, key, value, bias=total, causal=bool(unidirectional), scale=scale))
    present = jnp.swapaxes(key, 1, 2), jnp.swapaxes(value, 1, 2)
    if not any(node.wanted[3:]):
        return out, *present
    logits = scores(query, key, scale) + (0 if total is None else total)
    if unidirectional:
        logits = jnp.where(_causal(query.shape[1], key.shape[1]), logits, -jnp.inf)
    return out, *present, jax.nn.softmax(logits, -1).astype(query.dtype)


def _by_length(x: Any, heads: int) -> Any:
    """(b, s, h * d) or (b, h, s, d) -> (b, s, h, d)"""
    x = jnp.asarray(x)
    return jnp.swapaxes(x, 1, 2) if x.ndim == 4 else split_heads(x, heads)


def split_heads(x: Any, heads: int) -> Any:
    """(b, t, h * d) -> (b, t, h, d)"""
    return x.reshape(*x.shape[:2], heads, x.shape[2] // heads)


def merge_heads(x: Any) -> Any:
    return x.reshape(*x.shape[:2], -1)


def attend(query: Any, key: Any, value: Any, *, bias: Any = None, causal: bool = False, scale: Any = None) -> Any:
    """(b, t, h, d), (b, s, k, d), (b, s, k, e) -> (b, t, h, e). causal: the last query is at the last key."""
    past = key.shape[1] - query.shape[1]
    window = None
    if causal:
        if past < 0:
            raise OnnxError(f"causal attention of {query.shape[1]} queries on {key.shape[1]} keys")
        window = (key.shape[1], past)
    bias = None if bias is None else jnp.asarray(bias).astype(query.dtype)
    scale = scale or 1 / math.sqrt(query.shape[-1])
    return ops.attention(query, key, value, bias=bias, local_window_size=window, scale=scale)


def scores(query: Any, key: Any, scale: Any) -> Any:
    """Scaled logits (b, h, t, s) in float32, also where several query heads share a key head."""
    b, t, h, d = query.shape
    grouped = query.reshape(b, t, key.shape[2], -1, d)
    logits = jnp.einsum("btkgd,bskd->bkgts", grouped, key, preferred_element_type=jnp.float32)
    return logits.reshape(b, h, t, key.shape[1]) * (scale or 1 / math.sqrt(d))


def _causal(t: int, s: int) -> np.ndarray:
    return np.arange(s) <= np.arange(t)[:, None] + (s - t)


def _with_mask(bias: Any, mask: Any, query: Any, key: Any, filter_value: float) -> Any:
    """The bias plus `filter_value` where the mask forbids; None for neither."""
    if mask is None:
        return bias
    b, t, s = query.shape[0], query.shape[1], key.shape[1]
    mask = jnp.asarray(mask)
    positions = np.arange(s)
    if mask.ndim == 1 and mask.shape[0] == 2 * b:  # where the keys of each row end, then where they begin
        allowed = (positions < mask[:b, None]) & (positions >= mask[b:, None])
        allowed = allowed[:, None, None]
    elif mask.ndim == 1:  # how many keys each row has
        allowed = (positions < mask[:b, None])[:, None, None]
    elif mask.ndim == 2:
        allowed = (mask > 0)[:, None, None]
    elif mask.ndim == 3:
        allowed = (mask > 0)[:, None]
    elif mask.ndim == 4:
        allowed = (mask > 0)[:, :, s - t : s, :s]
    else:
        raise OnnxError(f"an attention mask has 1 to 4 axes, got shape {mask.shape}")
    if allowed.shape[-1] not in (1, s):
        raise OnnxError(f"an attention mask for {s} keys has shape {mask.shape}")
    added = jnp.where(allowed, 0, filter_value).astype(query.dtype)
    return added if bias is None else added + bias
