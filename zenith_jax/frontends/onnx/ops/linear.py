"""Matrix products, of floats and of quantised integers, and Einsum: https://onnx.ai/onnx/operators/"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from zenith_jax.frontends.onnx.dtypes import is_floating
from zenith_jax.frontends.onnx.ops._arrays import in_jax
from zenith_jax.frontends.onnx.registry import operator
from zenith_jax.frontends.onnx.values import is_static, xp


@operator("MatMul")
def matmul(a, b):
    return xp(a, b).matmul(a, b)


@operator("Gemm")
@in_jax
def gemm(a, b, c=None, *, alpha=1.0, beta=1.0, transA=0, transB=0, broadcast=0):
    """alpha * A' @ B' + beta * C. C broadcasts; before opset 7 only if `broadcast` said so."""
    del broadcast
    y = _scaled(jnp.matmul(a.T if transA else a, b.T if transB else b), alpha)
    return y if c is None else y + _scaled(c, beta)


def _scaled(x: Any, factor: float) -> Any:
    return x if factor == 1 else (factor * x).astype(x.dtype)  # of integers the product is truncated


@operator("Einsum", since=12)
@in_jax
def einsum(*operands, equation):
    return jnp.einsum(equation.replace(" ", ""), *operands)


# --- quantised --------------------------------------------------------------------------------------------------------


def as_int8(x: Any, zero_point: Any) -> tuple[Any, Any]:
    """(x, zero_point) as int8 and int32 with the same difference: 128 is taken off unsigned ones.

    One signedness for both operands of a product lets it run on int8 units; x XOR 128 is x - 128 in two's complement.
    """
    zero_point = None if is_zero(zero_point) else jnp.asarray(zero_point).astype(jnp.int32)
    if x.dtype == np.int8:
        return jnp.asarray(x), zero_point
    shifted = lax.bitcast_convert_type(jnp.asarray(x) ^ np.uint8(128), jnp.int8)
    return shifted, jnp.int32(-128) if zero_point is None else zero_point - 128


def is_zero(zero_point: Any) -> bool:
    return zero_point is None or (is_static(zero_point) and not np.any(np.asarray(zero_point)))


def _row_vector(x: Any) -> Any:
    """A zero point or scale of a: one for each row stands as a column."""
    return x[:, None] if x is not None and x.ndim == 1 and x.size > 1 else x


def integer_matmul(a: Any, b: Any, a_zero_point: Any, b_zero_point: Any) -> Any:
    """(a - a_zero_point) @ (b - b_zero_point) in int32, from int8 or uint8; exact modulo 2^32.

    The zero points are taken out of the product, which stays one of int8:
    sum (a - x)(b - y) = sum a b  -  x sum b  -  y sum a  +  k x y.
    """
    if a.ndim == 1:
        return integer_matmul(a[None], b, a_zero_point, b_zero_point)[..., 0, :]
    if b.ndim == 1:
        return integer_matmul(a, b[:, None], a_zero_point, b_zero_point)[..., 0]
    k = a.shape[-1]
    a, x = as_int8(a, _row_vector(a_zero_point))
    b, y = as_int8(b, b_zero_point)
    y_acc = jnp.matmul(a, b, preferred_element_type=jnp.int32)
    if x is not None:
        y_acc = y_acc - x * jnp.sum(b, axis=-2, keepdims=True, dtype=jnp.int32)
    if y is not None:
        y_acc = y_acc - y * jnp.sum(a, axis=-1, keepdims=True, dtype=jnp.int32)
    return y_acc + k * x * y if x is not None and y is not None else y_acc


def requantized(accumulator: Any, scale: Any, zero_point: Any) -> Any:
    """round(accumulator * scale) + zero_point, saturated to the dtype of zero_point; half to even."""
    dtype = zero_point.dtype
    y = jnp.rint(accumulator.astype(jnp.float32) * scale) + jnp.asarray(zero_point).astype(jnp.float32)
    limits = jnp.iinfo(dtype)
    return jnp.clip(y, limits.min, limits.max).astype(dtype)


@operator("MatMulInteger", since=10)
def matmul_integer(a, b, a_zero_point=None, b_zero_point=None):
    return integer_matmul(a, b, a_zero_point, b_zero_point)


@operator("QLinearMatMul", since=10)
def qlinear_matmul(a, a_scale, a_zero_point, b, b_scale, b_zero_point, y_scale, y_zero_point):
    """The product of dequantised a and b, quantised, with integers in between; of 8-bit floats, in float32."""
    a_scale, b_scale, y_scale = (jnp.asarray(s).astype(jnp.float32) for s in (_row_vector(a_scale), b_scale, y_scale))
    if is_floating(a):
        a, x, b, y = (jnp.asarray(v).astype(jnp.float32) for v in (a, _row_vector(a_zero_point), b, b_zero_point))
        product = jnp.matmul((a - x) * a_scale, (b - y) * b_scale) / y_scale
        limits = jnp.finfo(y_zero_point.dtype)
        result = product + y_zero_point.astype(jnp.float32)
        return jnp.clip(result, float(limits.min), float(limits.max)).astype(y_zero_point.dtype)
    accumulator = integer_matmul(a, b, a_zero_point, b_zero_point)
    return requantized(accumulator, a_scale * b_scale / y_scale, y_zero_point)
