"""Operators on 8-bit integers with scales and zero points.

Sums of products are exact in int32; what is not a product is dequantised, computed in float32 and quantised again,
which XLA fuses into one pass over the integers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zenith_jax.frontends.onnx.ops import conv, pool, quant
from zenith_jax.frontends.onnx.ops.linear import integer_matmul
from zenith_jax.frontends.onnx.ops.microsoft import contrib
from zenith_jax.frontends.onnx.values import UnsupportedError

contrib("QuantizeLinear")(quant.quantize_linear)
contrib("DequantizeLinear")(quant.dequantize_linear)


def dequantized(x: Any, scale: Any, zero_point: Any = None) -> Any:
    return quant.dequantize_linear(jnp.asarray(x), jnp.asarray(scale), zero_point)


def quantized(x: Any, scale: Any, zero_point: Any, like: Any) -> Any:
    """`like` has the dtype of the result where there is no zero point."""
    zero_point = np.zeros((), like.dtype) if zero_point is None else zero_point
    return quant.quantize_linear(x, jnp.asarray(scale), zero_point)


def _binary(name: str, function: Callable[[Any, Any], Any]) -> None:
    @contrib(name)
    def compute(a, a_scale, a_zero_point, b, b_scale, b_zero_point, c_scale, c_zero_point=None):
        result = function(dequantized(a, a_scale, a_zero_point), dequantized(b, b_scale, b_zero_point))
        return quantized(result, c_scale, c_zero_point, a)


_binary("QLinearAdd", jnp.add)
_binary("QLinearMul", jnp.multiply)


@contrib("QLinearSigmoid")
def qlinear_sigmoid(x, x_scale, x_zero_point, y_scale, y_zero_point=None):
    return quantized(jax.nn.sigmoid(dequantized(x, x_scale, x_zero_point)), y_scale, y_zero_point, x)


@contrib("QLinearLeakyRelu")
def qlinear_leaky_relu(x, x_scale, x_zero_point, y_scale, y_zero_point=None, *, alpha=0.01):
    wide = dequantized(x, x_scale, x_zero_point)
    return quantized(jnp.where(wide >= 0, wide, alpha * wide), y_scale, y_zero_point, x)


@contrib("QLinearSoftmax")
def qlinear_softmax(x, x_scale, x_zero_point, y_scale, y_zero_point, *, axis=-1, opset):
    """Before opset 13 over all axes from `axis` on."""
    wide = dequantized(x, x_scale, x_zero_point)
    axes = axis if opset >= 13 else tuple(range(axis % x.ndim, x.ndim))
    return quantized(jax.nn.softmax(wide, axes), y_scale, y_zero_point, x)


@contrib("QLinearAveragePool")
def qlinear_average_pool(x, x_scale, x_zero_point, y_scale, y_zero_point=None, *, channels_last=0, **geometry):
    wide = dequantized(x, x_scale, x_zero_point)
    return quantized(_channels_first(pool.average_pool, wide, channels_last, **geometry), y_scale, y_zero_point, x)


@contrib("QLinearGlobalAveragePool")
def qlinear_global_average_pool(x, x_scale, x_zero_point, y_scale, y_zero_point, *, channels_last=0):
    wide = dequantized(x, x_scale, x_zero_point)
    return quantized(_channels_first(pool.global_average_pool, wide, channels_last), y_scale, y_zero_point, x)


@contrib("QLinearConv")
def qlinear_conv(x, *operands, channels_last=0, **attributes):
    """ONNX's, and with channels_last that of an image (n, *spatial, c)."""
    return _channels_first(lambda x, **more: conv.qlinear_conv(x, *operands, **more), x, channels_last, **attributes)


def _channels_first(function: Callable[..., Any], x: Any, channels_last: int, **attributes: Any) -> Any:
    if not channels_last:
        return function(x, **attributes)
    return jnp.moveaxis(function(jnp.moveaxis(x, -1, 1), **attributes), 1, -1)


@contrib("QLinearReduceMean")
def qlinear_reduce_mean(x, x_scale, x_zero_point, y_scale, y_zero_point, *, axes=None, keepdims=1):
    wide = dequantized(x, x_scale, x_zero_point)
    mean = jnp.mean(wide, None if axes is None else tuple(axes), keepdims=bool(keepdims))
    return quantized(mean, y_scale, y_zero_point, x)


@contrib("QLinearConcat")
def qlinear_concat(y_scale, y_zero_point, *inputs, axis):
    """inputs: a tensor, its scale and its zero point, one after the other."""
    triples = zip(inputs[::3], inputs[1::3], inputs[2::3], strict=True)
    parts = [quantized(dequantized(*triple), y_scale, y_zero_point, triple[0]) for triple in triples]
    return jnp.concatenate(parts, axis)


@contrib("QLinearWhere")
def qlinear_where(condition, x, x_scale, x_zero_point, y, y_scale, y_zero_point, z_scale, z_zero_point):
    chosen = jnp.where(condition, dequantized(x, x_scale, x_zero_point), dequantized(y, y_scale, y_zero_point))
    return quantized(chosen, z_scale, z_zero_point, x)


@contrib("MatMulIntegerToFloat")
def matmul_integer_to_float(a, b, a_scale, b_scale, a_zero_point=None, b_zero_point=None, bias=None):
    """A matrix product of integers in int32, scaled. b_scale and b_zero_point: scalars or one for each column."""
    y = integer_matmul(a, b, a_zero_point, b_zero_point)
    y = y.astype(jnp.float32) * (jnp.asarray(a_scale) * jnp.asarray(b_scale))
    return y if bias is None else y + bias


@contrib("DynamicQuantizeMatMul")
def dynamic_quantize_matmul(a, b, b_scale, b_zero_point=None, bias=None):
    """A is quantised to uint8 by its range first."""
    quantized_a, scale, zero = quant.dynamic_quantize_linear(jnp.asarray(a))
    return matmul_integer_to_float(quantized_a, b, scale, b_scale, zero, b_zero_point, bias)


@contrib("QGemm")
def qgemm(
    a,
    a_scale,
    a_zero_point,
    b,
    b_scale,
    b_zero_point,
    c=None,
    y_scale=None,
    y_zero_point=None,
    *,
    alpha=1.0,
    transA=0,
    transB=0,
):
    """c: int32, quantised with alpha * a_scale * b_scale. Without y_scale the result is float32."""
    a = jnp.asarray(a).T if transA else a
    b = jnp.asarray(b).T if transB else b
    y = integer_matmul(a, b, a_zero_point, b_zero_point)
    y = y if c is None else y + c
    wide = y.astype(jnp.float32) * (alpha * jnp.asarray(a_scale) * jnp.asarray(b_scale))
    return wide if y_scale is None else quantized(wide, y_scale, y_zero_point, a)


@contrib("DynamicQuantizeLSTM")
def dynamic_quantize_lstm(
    x,
    w,
    r,
    b=None,
    sequence_lens=None,
    initial_h=None,
    initial_c=None,
    p=None,
    w_scale=None,
    w_zero_point=None,
    r_scale=None,
    r_zero_point=None,
    **attributes,
):
    """An LSTM with 8-bit weights, (directions, inputs, 4 * hidden) here; they are dequantised, x and h stay float."""
    from zenith_jax.frontends.onnx.registry import lookup

    lstm = lookup("LSTM", "", 14)
    if lstm is None:
        raise UnsupportedError("LSTM is not registered")
    w, r = (_weights(*v) for v in ((w, w_scale, w_zero_point), (r, r_scale, r_zero_point)))
    return lstm.function(jnp.asarray(x), w, r, b, sequence_lens, initial_h, initial_c, p, **attributes)


def _weights(w: Any, scale: Any, zero_point: Any) -> Any:
    """(directions, 4 * hidden, inputs) of (directions, inputs, 4 * hidden); scales by direction, or column as well."""
    scale, zero = (jnp.asarray(v).reshape(w.shape[0], 1, -1) for v in (scale, zero_point))
    wide = (jnp.asarray(w).astype(jnp.int32) - zero.astype(jnp.int32)).astype(jnp.float32) * scale
    return jnp.swapaxes(wide, 1, 2)
