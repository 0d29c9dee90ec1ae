"""ONNX's element types and NumPy's, which are JAX's too: `TensorProto.DataType` of onnx 1.23.

Strings are NumPy object arrays of `str` and exist only while tracing. JAX before 0.11 cannot hold 6-bit floats.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import dtypes

from zenith_jax.errors import DTypeError

STRING = 8

_BY_CODE = {
    1: np.dtype(np.float32),
    2: np.dtype(np.uint8),
    3: np.dtype(np.int8),
    4: np.dtype(np.uint16),
    5: np.dtype(np.int16),
    6: np.dtype(np.int32),
    7: np.dtype(np.int64),
    STRING: np.dtype(object),
    9: np.dtype(np.bool_),
    10: np.dtype(np.float16),
    11: np.dtype(np.float64),
    12: np.dtype(np.uint32),
    13: np.dtype(np.uint64),
    14: np.dtype(np.complex64),
    15: np.dtype(np.complex128),
    16: np.dtype(ml_dtypes.bfloat16),
    17: np.dtype(ml_dtypes.float8_e4m3fn),
    18: np.dtype(ml_dtypes.float8_e4m3fnuz),
    19: np.dtype(ml_dtypes.float8_e5m2),
    20: np.dtype(ml_dtypes.float8_e5m2fnuz),
    21: np.dtype(ml_dtypes.uint4),
    22: np.dtype(ml_dtypes.int4),
    23: np.dtype(ml_dtypes.float4_e2m1fn),
    24: np.dtype(ml_dtypes.float8_e8m0fnu),
    25: np.dtype(ml_dtypes.uint2),
    26: np.dtype(ml_dtypes.int2),
    27: np.dtype(ml_dtypes.float6_e2m3fn),
    28: np.dtype(ml_dtypes.float6_e3m2fn),
}
_CODES = {dtype: code for code, dtype in _BY_CODE.items()}


def from_onnx(elem_type: int) -> np.dtype:
    """The dtype of a `TensorProto.DataType`. Raises DTypeError for UNDEFINED and for types newer than onnx 1.23."""
    if (dtype := _BY_CODE.get(int(elem_type))) is None:
        raise DTypeError(f"element type {elem_type} is not one of ONNX's {min(_BY_CODE)} to {max(_BY_CODE)}")
    return dtype


def to_onnx(dtype: np.typing.DTypeLike) -> int:
    """The `TensorProto.DataType` of a dtype; every NumPy string type is STRING."""
    dtype = np.dtype(dtype)
    if dtype.kind in "USOT":
        return STRING
    if (code := _CODES.get(dtype)) is None:
        raise DTypeError(f"dtype {dtype} has no element type in ONNX")
    return code


def is_string(dtype: np.typing.DTypeLike) -> bool:
    return np.dtype(dtype).kind in "USOT"


def bits(dtype: np.typing.DTypeLike) -> int:
    """How many bits an element holds: 4 for int4, though NumPy stores it in a byte."""
    dtype = np.dtype(dtype)
    if dtype in _SUB_BYTE:
        return _SUB_BYTE[dtype]
    return 8 * dtype.itemsize


_SUB_BYTE = {from_onnx(code): width for code, width in {21: 4, 22: 4, 23: 4, 25: 2, 26: 2, 27: 6, 28: 6}.items()}


def is_floating(x: Any) -> bool:
    """Whether the array x is of a real floating type, bfloat16 and smaller ones included."""
    return jnp.issubdtype(x.dtype, jnp.floating)


def held(dtype: np.typing.DTypeLike) -> np.dtype:
    """The dtype that a JAX array of `dtype` gets: 32 bits for 64 unless `jax_enable_x64` is on."""
    return dtypes.canonicalize_dtype(dtype)


def cast(x: Any, dtype: np.typing.DTypeLike) -> Any:
    """x.astype(dtype); where x is a JAX array, 64 bits become 32 without `jax_enable_x64`, and without a warning."""
    return x.astype(dtype if isinstance(x, np.ndarray | np.generic) else held(dtype))
