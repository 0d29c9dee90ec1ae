"""Normalisations and Dropout: https://onnx.ai/onnx/operators/

Statistics of float16 and bfloat16 are float32. LayerNormalization and RMSNormalization are written as Zenith's rewriter
knows them, which also sees the residual sum in front.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import dtypes, lax

from zenith_jax.frontends.onnx.dtypes import from_onnx
from zenith_jax.frontends.onnx.limits import check_size
from zenith_jax.frontends.onnx.ops._arrays import in_jax
from zenith_jax.frontends.onnx.ops.random import key_of
from zenith_jax.frontends.onnx.registry import operator
from zenith_jax.frontends.onnx.values import is_static


def _wide(x: Any) -> Any:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _channels(v: Any, x: Any) -> Any:
    """v, one value for each channel, to be broadcast with x (n, c, *spatial); x of one axis has one channel."""
    return v.reshape(-1, *(1,) * (x.ndim - 2)) if x.ndim > 1 else v.reshape(())


# --- LayerNormalization, RMSNormalization -----------------------------------------------------------------------------


def _stash(stash_type: int) -> Any:
    """The dtype of stash_type; float64 is float32 without `jax_enable_x64`."""
    return dtypes.canonicalize_dtype(from_onnx(stash_type))


@operator("LayerNormalization")
@in_jax
def layer_normalization(x, scale, bias=None, *, axis=-1, epsilon=1e-5, stash_type=1, node):
    """(x - mean) / sqrt(variance + epsilon) * scale + bias over the axes from `axis` on; if wanted, mean and the
    reciprocal of the root, in the dtype of stash_type."""
    axes = tuple(range(axis % x.ndim, x.ndim))
    wide = x.astype(jnp.promote_types(x.dtype, _stash(stash_type)))
    mean = jnp.mean(wide, axis=axes, keepdims=True)
    centred = wide - mean
    inverse = lax.rsqrt(jnp.mean(centred * centred, axis=axes, keepdims=True) + epsilon)
    y = centred * inverse * scale.astype(wide.dtype)
    y = (y if bias is None else y + bias.astype(wide.dtype)).astype(x.dtype)
    stash = _stash(stash_type)
    return y, mean.astype(stash), inverse.astype(stash)


@operator("RMSNormalization", since=23)
@in_jax
def rms_normalization(x, scale, *, axis=-1, epsilon=1e-5, stash_type=1):
    """x / sqrt(mean(x^2) + epsilon) * scale over the axes from `axis` on, in the dtype of scale."""
    axes = tuple(range(axis % x.ndim, x.ndim))
    wide = x.astype(jnp.promote_types(x.dtype, _stash(stash_type)))
    inverse = lax.rsqrt(jnp.mean(wide * wide, axis=axes, keepdims=True) + epsilon)
    return (wide * inverse).astype(scale.dtype) * scale


# --- by channel -------------------------------------------------------------------------------------------------------


def _affine(x: Any, mean: Any, variance: Any, scale: Any, bias: Any, epsilon: float) -> Any:
    """(x - mean) / sqrt(variance + epsilon) * scale + bias in x's dtype, or in float32 where that is wider."""
    factor = _wide(scale) * lax.rsqrt(_wide(variance) + epsilon)
    return ((_wide(x) - _wide(mean)) * factor + _wide(bias)).astype(x.dtype)


@operator("BatchNormalization", since=14)
@in_jax
def batch_normalization(x, scale, bias, mean, variance, *, epsilon=1e-5, momentum=0.9, training_mode=0):
    """With training_mode the statistics are those of x; also returns the running ones, moved by 1 - momentum."""
    if not training_mode:
        return _affine(x, *(_channels(v, x) for v in (mean, variance, scale, bias)), epsilon=epsilon)
    y, running_mean, running_variance, _, _ = _trained(
        x, scale, bias, mean, variance, epsilon=epsilon, momentum=momentum
    )
    return y, running_mean, running_variance


def _trained(x: Any, scale: Any, bias: Any, mean: Any, variance: Any, epsilon: float, momentum: float) -> tuple:
    axes = (0, *range(2, x.ndim))
    batch_mean = jnp.mean(_wide(x), axis=axes).reshape(-1)
    batch_variance = jnp.var(_wide(x), axis=axes).reshape(-1)
    y = _affine(x, *(_channels(v, x) for v in (batch_mean, batch_variance, scale, bias)), epsilon=epsilon)
    running = [
        (_wide(old) * momentum + new * (1 - momentum)).astype(old.dtype)
        for old, new in ((mean, batch_mean), (variance, batch_variance))
    ]
    return y, *running, batch_mean.astype(mean.dtype), batch_variance.astype(variance.dtype)


@operator("BatchNormalization")
@in_jax
def batch_normalization_by_outputs(
    x, scale, bias, mean, variance, *, epsilon=1e-5, momentum=0.9, is_test=0, spatial=1, consumed_inputs=None, node
):
    """Before opset 14, training is when more outputs than the first are wanted: the running statistics, and those of
    the batch. Without `spatial` (before 9) each element of an image has its own statistics."""
    del consumed_inputs
    flat = x if spatial else x.reshape(x.shape[0], math.prod(x.shape[1:]))
    parameters = [v.reshape(-1) for v in (scale, bias, mean, variance)]
    if is_test or not any(node.wanted[1:]):
        y = batch_normalization(flat, *parameters, epsilon=epsilon)
        return y.reshape(x.shape)
    y, *statistics = _trained(flat, *parameters, epsilon=epsilon, momentum=momentum)
    return y.reshape(x.shape), *(s.reshape(mean.shape) for s in statistics)


@operator("InstanceNormalization")
@in_jax
def instance_normalization(x, scale=None, bias=None, *, epsilon=1e-5, consumed_inputs=None):
    """Without scale and bias: the pass `instance_norm` leaves out those of 1 and 0."""
    del consumed_inputs
    scale, bias = (None if v is None else _channels(v, x) for v in (scale, bias))
    return _by_group(x, x.shape[1], scale, bias, epsilon, np.float32)


@operator("GroupNormalization", since=18)
@in_jax
def group_normalization_by_group(x, scale, bias, *, num_groups, epsilon=1e-5):
    """scale and bias: one for each group; from opset 21 on, one for each channel."""
    repeats = x.shape[1] // num_groups
    scale, bias = (_channels(jnp.repeat(v, repeats), x) for v in (scale, bias))
    return _by_group(x, num_groups, scale, bias, epsilon, np.float32)


@operator("GroupNormalization", since=21)
@in_jax
def group_normalization(x, scale, bias, *, num_groups, epsilon=1e-5, stash_type=1):
    return _by_group(x, num_groups, _channels(scale, x), _channels(bias, x), epsilon, _stash(stash_type))


def _by_group(x: Any, groups: int, scale: Any, bias: Any, epsilon: float, stash: Any) -> Any:
    wide = x.reshape(x.shape[0], groups, -1).astype(jnp.promote_types(x.dtype, stash))
    mean = jnp.mean(wide, axis=-1, keepdims=True)
    centred = wide - mean
    variance = jnp.mean(centred * centred, axis=-1, keepdims=True)
    y = (centred * lax.rsqrt(variance + epsilon)).reshape(x.shape)
    y = y if scale is None else y * scale
    return (y if bias is None else y + bias).astype(x.dtype)


@operator("LRN")
@in_jax
def local_response_normalization(x, *, size, alpha=1e-4, beta=0.75, bias=1.0):
    """x / (bias + alpha / size * sum of squares over `size` channels around)^beta. Krizhevsky et al. 2012."""
    before = (size - 1) // 2
    wide = _wide(x)
    check_size((x.shape[0], x.shape[1] + size - 1, *x.shape[2:]), wide.dtype)
    squares = lax.reduce_window(
        wide * wide,
        np.zeros((), wide.dtype),
        lax.add,
        window_dimensions=(1, size, *(1,) * (x.ndim - 2)),
        window_strides=(1,) * x.ndim,
        padding=[(0, 0), (before, size - 1 - before), *[(0, 0)] * (x.ndim - 2)],
    )
    return (wide / (bias + alpha / size * squares) ** beta).astype(x.dtype)


@operator("MeanVarianceNormalization", since=9)
@in_jax
def mean_variance_normalization(x, *, axes=(0, 2, 3)):
    """(x - mean) / (standard deviation + 1e-9), the constant from the operator's function body."""
    wide = _wide(x)
    centred = wide - jnp.mean(wide, axis=tuple(axes), keepdims=True)
    deviation = jnp.sqrt(jnp.mean(centred * centred, axis=tuple(axes), keepdims=True))
    return (centred / (deviation + 1e-9)).astype(x.dtype)


@operator("LpNormalization")
@in_jax
def lp_normalization(x, *, axis=-1, p=2):
    """x / (sum |x|^p)^(1/p); zero where that norm is zero."""
    wide = _wide(x)
    total = jnp.sum(jnp.abs(wide) if p == 1 else wide * wide, axis=axis, keepdims=True)
    safe = jnp.where(total == 0, 1, total)
    return (wide / (safe if p == 1 else jnp.sqrt(safe))).astype(x.dtype)


# --- Dropout ----------------------------------------------------------------------------------------------------------


@operator("Dropout")
def dropout_inference(x, *, is_test=0, ratio=0.5, consumed_inputs=None, node):
    """x, and ones as mask: before opset 12 a model cannot say that it trains, and no runtime drops anything."""
    del is_test, ratio, consumed_inputs
    if len(node.wanted) < 2 or not node.wanted[1]:
        return x
    return x, jnp.ones(x.shape, jnp.bool_ if node.opset >= 10 else x.dtype)


@operator("Dropout", since=12)
def dropout(x, ratio=None, training_mode=None, *, seed=None, node):
    """Where training_mode is true, elements are kept with probability 1 - ratio and divided by it.

    The random numbers follow from `seed`, or from the node's name without one: the same at each call.
    """
    ratio = np.float32(0.5) if ratio is None else ratio
    training = np.False_ if training_mode is None else training_mode
    if any(is_static(v) and not np.any(v) for v in (training, ratio)):
        return x, np.ones(x.shape, np.bool_)
    x, ratio = jnp.asarray(x), jnp.asarray(ratio).reshape(()).astype(jnp.float32)
    training = jnp.asarray(training).reshape(())
    kept = (jax.random.uniform(key_of(seed, node), x.shape) >= ratio) | ~training
    factor = jnp.where(training, 1 / (1 - ratio), 1).astype(x.dtype)
    return jnp.where(kept, x * factor, jnp.zeros((), x.dtype)), kept
