"""Cast and CastLike: conversion between all element types, with ONNX's saturation."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import lax

from zenith_jax.frontends.onnx import dtypes
from zenith_jax.frontends.onnx.registry import operator
from zenith_jax.frontends.onnx.values import OnnxError, static, xp

_SATURATING = {
    np.dtype(t)
    for t in (
        ml_dtypes.float8_e4m3fn,
        ml_dtypes.float8_e4m3fnuz,
        ml_dtypes.float8_e5m2,
        ml_dtypes.float8_e5m2fnuz,
    )
}
_E8M0 = np.dtype(ml_dtypes.float8_e8m0fnu)
_NO_INFINITY = {np.dtype(t) for t in (ml_dtypes.float4_e2m1fn, ml_dtypes.float6_e2m3fn, ml_dtypes.float6_e3m2fn)}


@operator("Cast")
def cast(x, *, to, saturate=1, round_mode="up"):
    return convert(x, dtypes.from_onnx(_code(to)), saturate=bool(saturate), round_mode=round_mode)


def _code(to: int | str) -> int:
    """Opsets before 6 write the name of the type."""
    names = {"FLOAT": 1, "BFLOAT16": 16, "DOUBLE": 11, "STRING": 8}
    if isinstance(to, str):
        return names.get(to.upper()) or dtypes.to_onnx(to.lower())
    return to


@operator("CastLike")
def cast_like(x, like, *, saturate=1, round_mode="up"):
    return convert(x, like.dtype, saturate=bool(saturate), round_mode=round_mode)


def convert(x: Any, dtype: Any, *, saturate: bool = True, round_mode: str = "up") -> Any:
    """`x` in `dtype`, by the tables of ONNX's Cast. Strings are static on either side."""
    dtype = np.dtype(dtype)
    if x.dtype == dtype:
        return x
    if dtypes.is_string(dtype):
        return _to_strings(static(x, "input"))
    if dtypes.is_string(x.dtype):
        return _from_objects(x, dtype)
    m = xp(x)
    if dtype in _SATURATING and saturate:
        return _saturated(x, dtype)
    if dtype == _E8M0:
        return _power_of_two(x, saturate, round_mode)
    if dtype in _NO_INFINITY:  # saturates by itself, in NumPy as in XLA
        return x.astype(m.float32).astype(dtype)
    if _is_float(x.dtype) and dtype.kind != "b" and not _is_float(dtype) and dtype.kind != "c":
        # Through a type that both know: a narrow float to a narrow integer is no instruction anywhere.
        wide = m.trunc(x.astype(m.promote_types(x.dtype, m.float32)))
        if dtypes.bits(dtype) < 8:
            return wide.astype(m.int32).astype(dtype)
        with np.errstate(invalid="ignore"):  # out of range is undefined in ONNX
            return dtypes.cast(wide, dtype)
    if dtypes.bits(dtype) < 8 and dtype.kind != "b":  # integers keep their low bits
        return x.astype(m.int8 if x.dtype.itemsize == 1 else m.int32).astype(dtype)
    with np.errstate(over="ignore"):  # infinity, as ONNX has it
        return dtypes.cast(x, dtype)


def _is_float(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.floating)


def _saturated(x: Any, dtype: np.dtype) -> Any:
    """To a float8: what is too large, infinities included, becomes the largest finite value; NaN stays."""
    m = xp(x)
    largest = float(ml_dtypes.finfo(dtype).max)
    wide = x.astype(m.promote_types(x.dtype, m.float32)) if _is_float(x.dtype) else x.astype(m.float32)
    return m.clip(wide, -largest, largest).astype(dtype)


def _power_of_two(x: Any, saturate: bool, round_mode: str) -> Any:
    """To float8_e8m0, an exponent alone: 2**(code - 127), code 255 is NaN. `round_mode`: up, down or nearest."""
    m = xp(x)
    wide = x.astype(m.float32)
    bits = wide.view(np.uint32) if m is np else lax.bitcast_convert_type(wide, m.uint32)
    exponent, fraction = (bits >> 23).astype(m.int32) & 0xFF, bits & 0x7FFFFF
    # Below 2**-126 a float32 has no leading one: there the codes 0 and 1 are a fraction of 0x400000 and 0x800000.
    if round_mode == "up":
        more = m.where(exponent > 0, fraction > 0, fraction > 0x400000)
    elif round_mode == "nearest":
        more = m.where(exponent > 0, fraction >= 0x400000, fraction > 0x600000)
    elif round_mode == "down":
        more = m.zeros(fraction.shape, bool)
    else:
        raise OnnxError(f"Cast has no round_mode {round_mode!r}; they are up, down and nearest")
    code = exponent + more
    if saturate:
        code = m.where(m.isnan(wide), 255, m.minimum(code, 254))
    else:
        code = m.where((exponent == 255) | (wide == 0), 255, code)
    code = code.astype(m.uint8)
    return code.view(_E8M0) if m is np else lax.bitcast_convert_type(code, _E8M0)


def _to_strings(x: np.ndarray) -> np.ndarray:
    return np.array([_text(v) for v in x.reshape(-1)] + [None], object)[:-1].reshape(x.shape)


def _text(value: Any) -> str:
    if isinstance(value, bool | np.bool_):
        return "1" if value else "0"
    return str(value)


def _from_objects(x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Strings are parsed; symbolic dimensions, which are objects too, stay what they are."""
    if not all(isinstance(v, str | bytes) for v in x.reshape(-1)):
        return x
    if _is_float(dtype) or dtype.kind == "c":
        return x.astype(np.float64).astype(dtype)
    if dtype.kind == "b":
        return np.array([v.strip().lower() not in ("", "0", "false") for v in x.reshape(-1)], bool).reshape(x.shape)
    return np.array([_integer(v) for v in x.reshape(-1)] + [0], object)[:-1].astype(dtype).reshape(x.shape)


def _integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        return int(float(text))
