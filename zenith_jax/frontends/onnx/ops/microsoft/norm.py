"""Layer and RMS normalisation with the sum before them, on Zenith's kernels."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zenith_jax import ops
from zenith_jax.frontends.onnx.ops import norm
from zenith_jax.frontends.onnx.ops.index import gather
from zenith_jax.frontends.onnx.ops.microsoft import contrib
from zenith_jax.frontends.onnx.registry import operator
from zenith_jax.frontends.onnx.values import xp

contrib("LayerNormalization")(norm.layer_normalization)


@operator("SimplifiedLayerNormalization")
@contrib("SimplifiedLayerNormalization")
def simplified_layer_normalization(x, scale, *, axis=-1, epsilon=1e-5, stash_type=1, node):
    """RMS normalisation; ONNX Runtime writes it into the default domain too. If wanted, also 1 / root mean square."""
    y = norm.rms_normalization(x, scale, axis=axis, epsilon=epsilon, stash_type=stash_type)
    if not any(node.wanted[1:]):
        return y
    wide = jnp.asarray(x).astype(jnp.float32)
    axes = tuple(range(axis % x.ndim, x.ndim))
    return y, jax.lax.rsqrt(jnp.mean(wide * wide, axes, keepdims=True) + epsilon)


@contrib("SkipLayerNormalization")
def skip_layer_normalization(x, skip, gamma, beta=None, bias=None, *, epsilon=1e-12, node):
    """layer_norm(x + skip + bias), mean, 1 / standard deviation, and the sum."""
    x, skip = _summands(x, skip, bias)
    y, total = ops.add_layer_norm(x, skip, jnp.asarray(gamma), _array(beta), eps=epsilon)
    wide = total.astype(jnp.float32)
    mean = jnp.mean(wide, -1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.var(wide, -1, keepdims=True) + epsilon)
    return (y, mean, inverse, total) if any(node.wanted[1:3]) else (y, None, None, total)


@contrib("SkipSimplifiedLayerNormalization")
def skip_simplified_layer_normalization(x, skip, gamma, bias=None, *, epsilon=1e-12, node):
    """rms_norm(x + skip + bias), nothing, 1 / root mean square, and the sum."""
    x, skip = _summands(x, skip, bias)
    y, total = ops.add_rms_norm(x, skip, jnp.asarray(gamma), eps=epsilon)
    if not any(node.wanted[1:3]):
        return y, None, None, total
    wide = total.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + epsilon)
    return y, jnp.zeros_like(inverse), inverse, total


def _array(x: Any) -> Any:
    return None if x is None else jnp.asarray(x)


def _summands(x: Any, skip: Any, bias: Any) -> tuple[Any, Any]:
    """Two of one shape: the bias goes to the smaller one, and `skip` may lack the batch."""
    x, skip = jnp.asarray(x), jnp.asarray(skip)
    skip = skip if bias is None else skip + bias
    return x, jnp.broadcast_to(skip, x.shape)


@contrib("EmbedLayerNormalization")
def embed_layer_normalization(
    input_ids,
    segment_ids,
    word_embedding,
    position_embedding,
    segment_embedding,
    gamma,
    beta,
    mask=None,
    position_ids=None,
    *,
    epsilon=1e-12,
    mask_index_type=None,
):
    """layer_norm of the sum of BERT's embeddings; how many tokens of each row the mask keeps; the sum."""
    del mask_index_type
    words = gather(word_embedding, input_ids)
    length = input_ids.shape[1]
    places = position_embedding[:length] if position_ids is None else gather(position_embedding, position_ids)
    total = jnp.asarray(words + places)
    if segment_embedding is not None and segment_ids is not None:
        total = total + gather(segment_embedding, segment_ids)
    y = ops.layer_norm(total, jnp.asarray(gamma), jnp.asarray(beta), eps=epsilon)
    rows = np.zeros((input_ids.shape[0], 1), np.int32) if mask is None else mask
    return y, xp(rows).sum(rows, 1).astype(np.int32), total


@contrib("GroupNorm")
def group_norm(x, gamma, beta, *, groups, activation, channels_last=1, epsilon=1e-5):
    """activation 1: followed by x * sigmoid(x)."""
    x = jnp.moveaxis(jnp.asarray(x), -1, 1) if channels_last else jnp.asarray(x)
    y = norm.group_normalization(x, jnp.asarray(gamma), jnp.asarray(beta), num_groups=groups, epsilon=epsilon)
    y = ops.silu(y) if activation else y
    return jnp.moveaxis(y, 1, -1) if channels_last else y


@contrib("SkipGroupNorm")
def skip_group_norm(x, gamma, beta, skip, bias=None, *, groups, activation, channels_last=1, epsilon=1e-5):
    """GroupNorm of x + skip + bias, and the sum."""
    skip = skip if skip.ndim == x.ndim else skip.reshape(skip.shape[0], 1, 1, -1)
    total = x + skip if bias is None else x + skip + bias
    attributes = {"groups": groups, "activation": activation, "channels_last": channels_last, "epsilon": epsilon}
    return group_norm(total, gamma, beta, **attributes), total
