"""QuantizeLinear, DequantizeLinear and DynamicQuantizeLinear: per tensor, per axis and in blocks, to every type."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from zenith_jax.frontends.onnx import dtypes
from zenith_jax.frontends.onnx.ops.cast import convert
from zenith_jax.frontends.onnx.registry import operator
from zenith_jax.frontends.onnx.values import OnnxError, xp


@operator("QuantizeLinear", since=10)
def quantize_linear(x, y_scale, y_zero_point=None, *, axis=1, saturate=1, block_size=0, output_dtype=0, precision=0):
    """saturate(round(x / y_scale) + y_zero_point), ties to even, divided in `precision` or else in the scale's type."""
    dtype = np.dtype(np.uint8)
    if y_zero_point is not None:
        dtype = np.dtype(y_zero_point.dtype)
    elif output_dtype:
        dtype = dtypes.from_onnx(output_dtype)
    m = xp(x, y_scale, y_zero_point)
    divided_in = dtypes.from_onnx(precision) if precision else y_scale.dtype
    if not jnp.issubdtype(divided_in, jnp.floating) or dtypes.bits(divided_in) < 16:
        divided_in = np.float32
    scale = over_axis(y_scale, x.shape, axis, block_size)
    with np.errstate(all="ignore"):
        quotient = (x.astype(divided_in) / scale.astype(divided_in)).astype(m.float32)
    zero = None if y_zero_point is None else over_axis(y_zero_point, x.shape, axis, block_size).astype(m.float32)
    if not jnp.issubdtype(dtype, jnp.integer):
        return convert(quotient if zero is None else quotient + zero, dtype, saturate=bool(saturate))
    # Exact in float32: whatever is too large for it to hold every integer is beyond the range of any of the types.
    shifted = m.rint(quotient) if zero is None else m.rint(quotient) + zero
    return integer(shifted, dtype)


def integer(x: Any, dtype: Any) -> Any:
    """Whole float numbers as `dtype` of at most 16 bits, saturated."""
    m = xp(x)
    limits = ml_dtypes.iinfo(dtype)
    clipped = m.clip(x, int(limits.min), int(limits.max))
    with np.errstate(invalid="ignore"):
        return clipped.astype(m.int32).astype(dtype)


@operator("DequantizeLinear", since=10)
def dequantize_linear(x, x_scale, x_zero_point=None, *, axis=1, block_size=0, output_dtype=0):
    """(x - x_zero_point) * x_scale, in float32; the result has the scale's type unless `output_dtype` says another."""
    m = xp(x, x_scale, x_zero_point)
    scale = over_axis(x_scale, x.shape, axis, block_size).astype(m.float32)
    wide = np.int32 if jnp.issubdtype(x.dtype, jnp.integer) else np.float32
    shifted = x.astype(wide)
    if x_zero_point is not None:
        shifted = shifted - over_axis(x_zero_point, x.shape, axis, block_size).astype(wide)
    to = dtypes.from_onnx(output_dtype) if output_dtype else x_scale.dtype
    return (shifted.astype(m.float32) * scale).astype(to)


def over_axis(parameter: Any, shape: tuple[Any, ...], axis: int, block_size: int) -> Any:
    """A scale or zero point so that it broadcasts over an array of `shape`.

    One element is for the whole tensor, a vector for the axis, and one of the tensor's rank for blocks of the axis.
    """
    m = xp(parameter)
    if parameter.ndim == 0 or (parameter.ndim == 1 and parameter.shape[0] == 1):
        return parameter.reshape(())
    axis %= len(shape)
    if parameter.ndim == 1 and not block_size:
        if parameter.shape[0] != shape[axis]:
            raise OnnxError(f"a scale of {parameter.shape[0]} elements for axis {axis} of {shape}")
        return parameter.reshape([-1 if i == axis else 1 for i in range(len(shape))])
    block_size = block_size or -(-shape[axis] // parameter.shape[axis])
    if parameter.ndim != len(shape) or parameter.shape[axis] * block_size < shape[axis]:
        raise OnnxError(f"a scale of shape {parameter.shape} for blocks of {block_size} along axis {axis} of {shape}")
    spread = m.repeat(parameter, block_size, axis)
    return spread[(slice(None),) * axis + (slice(0, shape[axis]),)]


@operator("DynamicQuantizeLinear", since=11)
def dynamic_quantize_linear(x):
    """To uint8, scale and zero point from the range of `x`, which always takes in 0. All zeros have the scale 1."""
    m = xp(x)
    low, high = m.minimum(x.min(initial=0), 0), m.maximum(x.max(initial=0), 0)
    extent = high - low
    scale = m.where(extent == 0, m.ones((), x.dtype), extent / np.asarray(255, x.dtype)).astype(x.dtype)
    zero = integer(m.rint(-low / scale), np.uint8)
    y = integer(m.rint(x / scale) + zero.astype(x.dtype), np.uint8)
    return y, scale, zero
