"""What exporters write that ONNX does not allow, and how it is read."""

import math

import numpy as np
import pytest

from zenith_jax.frontends.onnx import load

onnx = pytest.importorskip("onnx")
node = onnx.helper.make_node
RNG = np.random.default_rng(0)


def f32(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def outputs(nodes, inputs, opset):
    code = onnx.helper.np_dtype_to_tensor_dtype
    infos = [onnx.helper.make_tensor_value_info(n, code(v.dtype), v.shape) for n, v in inputs.items()]
    graph = onnx.helper.make_graph(nodes, "g", infos, [onnx.ValueInfoProto(name="y")])
    loaded = load(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=10))
    assert loaded.opset == opset and not loaded.unsupported()
    return np.asarray(loaded(**inputs)[0])


HEADS = (2, 4, 3, 8)
NEWER = {
    "Attention": (
        [node("Attention", ["q", "k", "v"], ["y"], is_causal=1)],
        {"q": f32(*HEADS), "k": f32(*HEADS), "v": f32(*HEADS)},
    ),
    "RMSNormalization": ([node("RMSNormalization", ["x", "s"], ["y"], epsilon=1e-3)], {"x": f32(3, 8), "s": f32(8)}),
    "RotaryEmbedding": (
        [node("RotaryEmbedding", ["x", "cos", "sin", "at"], ["y"])],
        {"x": f32(*HEADS), "cos": f32(5, 4), "sin": f32(5, 4), "at": np.array([[0, 1, 2], [2, 3, 4]])},
    ),
    "Gelu": ([node("Gelu", ["x"], ["y"], approximate="tanh")], {"x": f32(3, 8)}),
    "Swish": ([node("Swish", ["x"], ["y"], alpha=1.5)], {"x": f32(3, 8)}),
}


@pytest.mark.parametrize("name", NEWER)
def test_operators_newer_than_the_declared_opset(name):
    """PyTorch's exporter declares 18 where it is asked for 26 or more, and writes operators of 20 to 24."""
    nodes, inputs = NEWER[name]
    np.testing.assert_array_equal(outputs(nodes, inputs, 18), outputs(nodes, inputs, 24))


def test_erfc_which_is_no_operator_of_onnx():
    """tf2onnx leaves TensorFlow's own for the gelu of Keras: x / 2 * erfc(-x / sqrt(2))."""
    x = f32(3, 8)
    constants = {"root": np.float32(-np.sqrt(0.5)), "half": np.float32(0.5)}
    nodes = [
        node("Mul", ["x", "root"], ["r"]),
        node("Erfc", ["r"], ["e"]),
        node("Mul", ["e", "half"], ["h"]),
        node("Mul", ["x", "h"], ["y"]),
    ]
    expected = x * (1 + np.vectorize(math.erf)(x / np.sqrt(2))) / 2
    np.testing.assert_allclose(outputs(nodes, {"x": x, **constants}, 15), expected, rtol=1e-5, atol=1e-6)
