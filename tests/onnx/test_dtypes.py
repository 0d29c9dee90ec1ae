import ml_dtypes
import numpy as np
import pytest

from zenith_jax.errors import DTypeError
from zenith_jax.frontends.onnx import dtypes

onnx = pytest.importorskip("onnx")
CODES = {name: code for name, code in onnx.TensorProto.DataType.items() if code}


@pytest.mark.parametrize("name", CODES)
def test_table_agrees_with_onnx_both_ways(name):
    dtype = onnx.helper.tensor_dtype_to_np_dtype(CODES[name])
    assert dtypes.from_onnx(CODES[name]) == dtype
    assert dtypes.to_onnx(dtype) == CODES[name]


def test_every_numpy_string_type_is_string():
    assert {dtypes.to_onnx(d) for d in ("U3", "S2", object)} == {dtypes.STRING}


def test_undefined_and_unknown_types_are_errors():
    with pytest.raises(DTypeError, match="element type 0 is not one of ONNX's 1 to 28"):
        dtypes.from_onnx(0)
    with pytest.raises(DTypeError, match="datetime64"):
        dtypes.to_onnx("datetime64[s]")


def test_bits_counts_packed_types():
    sizes = {np.float32: 32, ml_dtypes.int4: 4, ml_dtypes.uint2: 2, ml_dtypes.float4_e2m1fn: 4, ml_dtypes.bfloat16: 16}
    assert {d: dtypes.bits(d) for d in sizes} == sizes
