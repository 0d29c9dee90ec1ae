"""Arithmetic, comparison, logic and bits, element by element: https://onnx.ai/onnx/operators/

Static operands give static results: shapes are computed with these.
"""

from __future__ import annotations

import functools as ft
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from zenith_jax.frontends.onnx.dtypes import bits, cast, from_onnx, is_floating
from zenith_jax.frontends.onnx.ops._arrays import in_jax, silent
from zenith_jax.frontends.onnx.registry import operator
from zenith_jax.frontends.onnx.values import is_static, xp

# ONNX's name -> the name of the same function in numpy and in jax.numpy.
_UNARY = {
    "Abs": "abs",
    "Acos": "arccos",
    "Acosh": "arccosh",
    "Asin": "arcsin",
    "Asinh": "arcsinh",
    "Atan": "arctan",
    "Atanh": "arctanh",
    "BitwiseNot": "invert",
    "Ceil": "ceil",
    "Cos": "cos",
    "Cosh": "cosh",
    "Exp": "exp",
    "Floor": "floor",
    "IsNaN": "isnan",
    "Log": "log",
    "Neg": "negative",
    "Not": "logical_not",
    "Round": "rint",  # half to even
    "Sign": "sign",
    "Sin": "sin",
    "Sinh": "sinh",
    "Sqrt": "sqrt",
    "Tan": "tan",
    "Tanh": "tanh",
}
_BINARY = {
    "Add": "add",
    "And": "logical_and",
    "BitwiseAnd": "bitwise_and",
    "BitwiseOr": "bitwise_or",
    "BitwiseXor": "bitwise_xor",
    "Equal": "equal",
    "Greater": "greater",
    "GreaterOrEqual": "greater_equal",
    "Less": "less",
    "LessOrEqual": "less_equal",
    "Mul": "multiply",
    "Or": "logical_or",
    "Sub": "subtract",
    "Xor": "logical_xor",
}
_VARIADIC = {"Max": "maximum", "Min": "minimum", "Sum": "add"}


def _aligned(a: Any, b: Any, axis: int | None) -> Any:
    """b, whose first dimension stands at `axis` of a: broadcasting before opset 7."""
    return b if axis is None else b.reshape(b.shape + (1,) * (a.ndim - axis % max(a.ndim, 1) - b.ndim))


def _register_tables() -> None:
    def unary(name: str) -> Callable:
        @silent
        def function(x: Any, *, consumed_inputs: Any = None) -> Any:
            del consumed_inputs  # of opset 1
            return getattr(xp(x), name)(x)

        return function

    def binary(name: str) -> Callable:
        @silent
        def function(a: Any, b: Any, *, axis: Any = None, broadcast: int = 0, consumed_inputs: Any = None) -> Any:
            del broadcast, consumed_inputs
            return getattr(xp(a, b), name)(a, _aligned(a, b, axis))

        return function

    def variadic(name: str) -> Callable:
        @silent
        def function(*xs: Any, consumed_inputs: Any = None) -> Any:
            del consumed_inputs
            return ft.reduce(getattr(xp(*xs), name), xs)

        return function

    for table, make in ((_UNARY, unary), (_BINARY, binary), (_VARIADIC, variadic)):
        for onnx_name, name in table.items():
            operator(onnx_name)(make(name))


_register_tables()


@operator("Reciprocal")
@silent
def reciprocal(x, *, consumed_inputs=None):
    del consumed_inputs
    return np.reciprocal(x) if is_static(x) else 1 / x  # jnp.reciprocal is a power, which no matcher takes for 1/sqrt


@operator("Mean")
def mean(*xs, consumed_inputs=None):
    del consumed_inputs
    total = ft.reduce(xp(*xs).add, xs)
    return total / np.asarray(len(xs), total.dtype)


@operator("Div")
@silent
def div(a, b, *, axis=None, broadcast=0, consumed_inputs=None):
    """a / b; integers are truncated, where Python and NumPy round down."""
    del broadcast, consumed_inputs
    b = _aligned(a, b, axis)
    np_ = xp(a, b)
    if is_floating(a) or jnp.issubdtype(a.dtype, jnp.complexfloating):
        return np_.divide(a, b)
    if np_ is jnp:
        return lax.div(*jnp.broadcast_arrays(a, b))
    down = a // b
    return down + ((down * b != a) & ((a < 0) != (b < 0))).astype(down.dtype)


@operator("Mod")
@silent
def mod(a, b, *, fmod=0):
    """a - b * floor(a / b), with the sign of b; with `fmod` truncated, with the sign of a."""
    np_ = xp(a, b)
    if fmod:
        return np_.fmod(a, b)
    rest = np_.mod(a, b)
    # Of floats -0 is told from 0 since opset 28; lax.rem keeps the sign of a there.
    return np_.where(rest == 0, np_.copysign(rest, b), rest) if is_floating(rest) else rest


@operator("Pow")
@silent
def power(x, y, *, axis=None, broadcast=0):
    """x ** y in the dtype of x, whatever the dtype of y."""
    del broadcast
    y = _aligned(x, y, axis)
    np_ = xp(x, y)
    if not is_floating(x):
        return _integer_base(np_, x, y)
    if np_ is jnp and is_static(y) and y.size == 1 and y.ndim <= x.ndim and float(y.reshape(())) in (1, 2, 3):
        return lax.integer_pow(x, int(y.reshape(())))  # as people write x**2 in JAX; matchers know it
    return np_.power(x, cast(y, x.dtype))


def _integer_base(np_: Any, x: Any, y: Any) -> Any:
    if is_floating(y):
        return cast(np_.power(cast(x, np.float64), cast(y, np.float64)), x.dtype)
    if jnp.issubdtype(y.dtype, jnp.unsignedinteger):
        return cast(np_.power(x, y), x.dtype)
    # 1/x**n truncated: only 1 and -1 have one that is not 0.
    positive = np_.power(x, cast(np_.maximum(y, 0), x.dtype))
    inverse = np_.where(x == 1, 1, np_.where(x == -1, np_.where(y % 2 == 0, 1, -1), 0))
    return cast(np_.where(y >= 0, positive, inverse), x.dtype)


@operator("BitShift")
@silent
def bit_shift(x, y, *, direction):
    """x shifted by y bits. A y outside [0, bits) shifts everything out; to the right the sign stays."""
    np_ = xp(x, y)
    inside = (y >= 0) & (y < bits(x.dtype))
    amount = np_.where(inside, y, 0).astype(x.dtype)
    zero = np_.zeros((), x.dtype)
    if direction == "LEFT":
        return np_.where(inside, np_.left_shift(x, amount), zero)
    sign = np_.where(x < 0, ~zero, zero)
    return np_.where(inside, np_.right_shift(x, amount), sign)


@operator("Clip")
@silent
def clip_attributes(x, *, min=None, max=None, consumed_inputs=None):
    del consumed_inputs
    limits = jnp.finfo(x.dtype)  # ±3.4e38, the attributes' defaults, are infinite in float16
    low = None if min is None else np.maximum(min, float(limits.min)).astype(x.dtype)
    high = None if max is None else np.minimum(max, float(limits.max)).astype(x.dtype)
    return clip(x, low, high)


@operator("Clip", since=11)
def clip(x, min=None, max=None):
    """Min(max, Max(x, min)): where the bounds cross, the result is max."""
    x = x if min is None else xp(x, min).maximum(x, min)
    return x if max is None else xp(x, max).minimum(x, max)


@operator("Where")
def where(condition, x, y):
    return xp(condition, x, y).where(condition, x, y)


@operator("IsInf")
def is_inf(x, *, detect_negative=1, detect_positive=1):
    np_ = xp(x)
    wanted = (detect_negative, detect_positive)
    infinite = np_.isinf(x)
    if wanted == (1, 1):
        return infinite
    return infinite & {(1, 0): x < 0, (0, 1): x > 0, (0, 0): np_.zeros_like(infinite)}[wanted]


@operator("Erf")
@in_jax
def erf(x):
    return lax.erf(x) if is_floating(x) else jax.scipy.special.erf(x).astype(x.dtype)


@operator("Erfc")
@in_jax
def erfc(x):
    """No ONNX operator: tf2onnx leaves TensorFlow's in the graph, in the default domain, for the gelu of Keras."""
    return lax.erfc(x)


@operator("BitCast", since=26)
def bit_cast(x, *, to):
    """The bits of x as another dtype of the same width."""
    dtype = from_onnx(to)
    if is_static(x) and dtype.itemsize == x.dtype.itemsize and bits(dtype) == 8 * dtype.itemsize:
        return np.asarray(x).view(dtype)
    x = jnp.asarray(x)
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    elif jnp.iscomplexobj(x):
        x = jnp.stack([x.real, x.imag], axis=-1)
    if dtype == np.bool_:
        return lax.bitcast_convert_type(x, jnp.uint8) != 0
    if np.issubdtype(dtype, np.complexfloating):
        half = np.float32 if dtype == np.complex64 else np.float64
        parts = x if x.dtype == half else lax.bitcast_convert_type(x, half)
        return lax.complex(parts[..., 0], parts[..., 1])
    return lax.bitcast_convert_type(x, dtype)
