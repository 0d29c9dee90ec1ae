"""Reductions, and sums and products along an axis: https://onnx.ai/onnx/operators/

The axes are an attribute at first and an operand since opset 13 (ReduceSum) or 18; either comes as `axes` here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from zenith_jax.frontends.onnx.dtypes import cast, is_floating
from zenith_jax.frontends.onnx.registry import operator
from zenith_jax.frontends.onnx.values import ints, is_static, static, xp

# --- Reduce* ----------------------------------------------------------------------------------------------------------
# Each takes (numpy or jax.numpy, x, **axis and keepdims). A sum of integers stays in their dtype; means and roots of
# integers are computed in float and truncated.


def _sum(np_: Any, x: Any, **kwargs: Any) -> Any:
    return np_.sum(x, dtype=x.dtype, **kwargs)


def _product(np_: Any, x: Any, **kwargs: Any) -> Any:
    return np_.prod(x, dtype=x.dtype, **kwargs)


def _mean(np_: Any, x: Any, **kwargs: Any) -> Any:
    return np_.mean(x, **kwargs)


def _lowest(x: Any, sign: int) -> Any:
    """What a maximum (sign 1) or minimum (sign -1) of nothing is: an infinity, or the end of the integers."""
    if x.dtype == np.bool_:
        return sign < 0
    if is_floating(x):
        return -sign * np.inf
    return getattr(jnp.iinfo(x.dtype), "min" if sign > 0 else "max")


def _maximum(np_: Any, x: Any, **kwargs: Any) -> Any:
    return np_.max(x, initial=_lowest(x, 1), **kwargs)


def _minimum(np_: Any, x: Any, **kwargs: Any) -> Any:
    return np_.min(x, initial=_lowest(x, -1), **kwargs)


def _l1(np_: Any, x: Any, **kwargs: Any) -> Any:
    return _sum(np_, np_.abs(x), **kwargs)


def _l2(np_: Any, x: Any, **kwargs: Any) -> Any:
    return np_.sqrt(np_.sum(np_.square(x), **kwargs))


def _sum_square(np_: Any, x: Any, **kwargs: Any) -> Any:
    return _sum(np_, np_.square(x), **kwargs)


def _log_sum(np_: Any, x: Any, **kwargs: Any) -> Any:
    return np_.log(_sum(np_, x, **kwargs))


def _log_sum_exp(np_: Any, x: Any, *, axis: Any, keepdims: bool) -> Any:
    """log(sum(exp(x))) without overflow; -inf of nothing."""
    x = x if is_floating(x) else cast(x, np.float64)
    largest = _maximum(np_, x, axis=axis, keepdims=True)
    largest = np_.where(np_.isfinite(largest), largest, 0).astype(x.dtype)
    if np_ is jnp:
        largest = lax.stop_gradient(largest)
    result = np_.log(np_.sum(np_.exp(x - largest), axis=axis, keepdims=True)) + largest
    return result if keepdims else np_.squeeze(result, axis=tuple(range(x.ndim)) if axis is None else axis)


def _register(name: str, reduction: Callable, operand_since: int) -> None:
    def reduced(x: Any, axes: tuple[int, ...] | None, keepdims: int) -> Any:
        with np.errstate(all="ignore"):
            return cast(reduction(xp(x), x, axis=axes, keepdims=bool(keepdims)), x.dtype)

    @operator(name)
    def attribute(x, *, axes=None, keepdims=1):
        return reduced(x, None if axes is None else tuple(axes), keepdims)

    @operator(name, since=operand_since)
    def operand(x, axes=None, *, keepdims=1, noop_with_empty_axes=0):
        chosen = () if axes is None else ints(axes, "axes")
        return reduced(x, None if not chosen and not noop_with_empty_axes else chosen, keepdims)


for _name, _reduction in {
    "ReduceL1": _l1,
    "ReduceL2": _l2,
    "ReduceLogSum": _log_sum,
    "ReduceLogSumExp": _log_sum_exp,
    "ReduceMax": _maximum,
    "ReduceMean": _mean,
    "ReduceMin": _minimum,
    "ReduceProd": _product,
    "ReduceSum": _sum,
    "ReduceSumSquare": _sum_square,
}.items():
    _register(_name, _reduction, operand_since=13 if _name == "ReduceSum" else 18)


# --- ArgMax, ArgMin ---------------------------------------------------------------------------------------------------


def _arg(name: str, x: Any, axis: int, keepdims: int, select_last_index: int) -> Any:
    np_ = xp(x)
    if select_last_index:
        index = x.shape[axis] - 1 - getattr(np_, name)(np_.flip(x, axis), axis=axis, keepdims=bool(keepdims))
    else:
        index = getattr(np_, name)(x, axis=axis, keepdims=bool(keepdims))
    return cast(index, np.int64)


@operator("ArgMax")
def argmax(x, *, axis=0, keepdims=1, select_last_index=0):
    return _arg("argmax", x, axis, keepdims, select_last_index)


@operator("ArgMin")
def argmin(x, *, axis=0, keepdims=1, select_last_index=0):
    return _arg("argmin", x, axis, keepdims, select_last_index)


# --- CumSum, CumProd --------------------------------------------------------------------------------------------------


def _cumulative(name: str, neutral: int, x: Any, axis: Any, exclusive: int, reverse: int) -> Any:
    np_ = xp(x)
    axis = int(static(axis, "axis").reshape(()))
    x = np_.flip(x, axis) if reverse else x
    if exclusive and x.shape[axis]:
        first = np_.full_like(np_.take(x, np.array([0]), axis=axis), neutral)
        x = np_.concatenate([first, np_.take(x, np.arange(x.shape[axis] - 1), axis=axis)], axis=axis)
    y = getattr(np_, name)(x, axis=axis, dtype=x.dtype)
    return np_.flip(y, axis) if reverse else y


@operator("CumSum", since=11)
def cumsum(x, axis, *, exclusive=0, reverse=0):
    return _cumulative("cumsum", 0, x, axis, exclusive, reverse)


@operator("CumProd", since=26)
def cumprod(x, axis, *, exclusive=0, reverse=0):
    return _cumulative("cumprod", 1, x, axis, exclusive, reverse)


@operator("Det", since=11)
def det(x):
    """Determinants of the last two axes; float16 and bfloat16 are factorised in float32."""
    if is_static(x):
        x = jnp.asarray(x)
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return jax.numpy.linalg.det(x.astype(wide)).astype(x.dtype)
