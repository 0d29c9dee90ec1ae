"""Weights are held once: shared with JAX or copied once, and pages of the file that were copied are let go."""

import os
import textwrap

import jax
import numpy as np
import pytest
from fresh_process import run_script
from onnx_models import model, node, onnx

from zenith_jax.frontends import onnx as zenith_onnx
from zenith_jax.frontends.onnx.device import on_device

BIG = np.random.default_rng(0).normal(size=(300, 101)).astype(np.float32)


def placed(array: np.ndarray, offset: int) -> np.ndarray:
    """A copy that starts `offset` bytes after a multiple of 64."""
    room = np.empty(array.nbytes + 128, np.uint8)
    start = -room.ctypes.data % 64 + offset
    copy = room[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8", "uint8", "int32", "bool"])
@pytest.mark.parametrize("offset", [0, 4])
def test_array_on_the_device_is_the_array(dtype, offset):
    array = placed((10 * np.tile(BIG, (3, 1))).astype(dtype), offset)
    result = on_device(array)
    assert result.dtype == array.dtype
    np.testing.assert_array_equal(result, array)
    np.testing.assert_array_equal(jax.jit(lambda x: x[::-1])(result), array[::-1])


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="only the CPU shares NumPy's memory")
def test_aligned_array_is_shared_and_another_is_copied():
    shared, other = placed(BIG, 0), placed(BIG, 4)
    assert on_device(shared).unsafe_buffer_pointer() == shared.ctypes.data
    copied = on_device(other)
    other[:] = 0
    np.testing.assert_array_equal(copied, BIG)


def test_small_and_64_bit_arrays_are_converted():
    assert on_device(np.arange(3, dtype=np.int64)).dtype == jax.dtypes.canonicalize_dtype(np.int64)
    np.testing.assert_array_equal(on_device(np.tile(BIG, (3, 1)).astype(np.float64)), np.tile(BIG, (3, 1)))


def test_weights_of_a_mapped_file_stay_right_after_their_pages_were_let_go(tmp_path):
    """Of two loads of one file, and where pages are shared by neighbours."""
    weights = {f"w{i}": BIG + i for i in range(5)}
    proto = model([node("Sum", list(weights), ["y"])], **weights)
    onnx.save(proto, tmp_path / "m.onnx")
    for loaded in [zenith_onnx.load(tmp_path / "m.onnx") for _ in range(2)]:
        for name, weight in weights.items():
            np.testing.assert_array_equal(loaded.params[name], weight)


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="measured by Linux's peak of resident memory")
@pytest.mark.skipif(jax.default_backend() != "cpu", reason="weights go to another memory")
def test_loading_takes_about_as_much_memory_as_the_weights(tmp_path):
    weights = {f"w{i}": np.full((1000, 1000), i, np.float32) for i in range(16)}
    onnx.save(model([node("Sum", list(weights), ["y"])], **weights), tmp_path / "m.onnx")
    script = """
        import pathlib
        import jax, onnx
        import zenith_jax as zenith
        def status(key):
            line = next(x for x in pathlib.Path("/proc/self/status").read_text().splitlines() if x.startswith(key))
            return int(line.split()[1]) * 1024
        jax.block_until_ready(jax.jit(lambda x: x + 1)(1.0))
        pathlib.Path("/proc/self/clear_refs").write_text("5")
        before = status("VmRSS")
        model = zenith.onnx.load("m.onnx")
        jax.block_until_ready(model.params)
        print(status("VmHWM") - before)
    """
    grown = int(run_script(textwrap.dedent(script), tmp_path))
    size = sum(w.nbytes for w in weights.values())
    assert grown < 1.5 * size  # measured 1.2; with pages and copies both 2.7
