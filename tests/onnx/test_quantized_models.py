"""Networks quantised by ONNX Runtime's own tool, in each of its formats, run in integers and agree with it."""

import jax
import numpy as np
import pytest
from onnx_one_node import runtime

from zenith_jax.frontends.onnx import load

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
quantization = pytest.importorskip("onnxruntime.quantization")
pytestmark = pytest.mark.filterwarnings("ignore")  # of the tool
SHAPE = (2, 3, 12, 12)


def network():
    """Residual convolutions, pooling, and a classifier."""
    node = onnx.helper.make_node
    nodes = [
        node("Conv", ["in0", "w1", "b1"], ["c1"], pads=[1, 1, 1, 1]),
        node("Relu", ["c1"], ["r1"]),
        node("Conv", ["r1", "w2", "b2"], ["c2"], pads=[1, 1, 1, 1], group=8),
        node("Add", ["r1", "c2"], ["a"]),
        node("MaxPool", ["a"], ["m"], kernel_shape=[2, 2], strides=[2, 2]),
        node("GlobalAveragePool", ["m"], ["g"]),
        node("Flatten", ["g"], ["f"]),
        node("MatMul", ["f", "w3"], ["h"]),
        node("Sigmoid", ["h"], ["s"]),
        node("Gemm", ["s", "w4", "b4"], ["out0"]),
    ]
    rng = np.random.default_rng(0)
    shapes = {"w1": (8, 3, 3, 3), "b1": (8,), "w2": (8, 1, 3, 3), "b2": (8,), "w3": (8, 16), "w4": (16, 5), "b4": (5,)}
    weights = {n: (rng.standard_normal(s) / 3).astype(np.float32) for n, s in shapes.items()}
    graph = onnx.helper.make_graph(
        nodes,
        "network",
        [onnx.helper.make_tensor_value_info("in0", 1, SHAPE)],
        [onnx.helper.make_tensor_value_info("out0", 1, (2, 5))],
        [onnx.numpy_helper.from_array(v, n) for n, v in weights.items()],
    )
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)


def samples(count):
    rng = np.random.default_rng(1)
    return [rng.standard_normal(SHAPE).astype(np.float32) for _ in range(count)]


class Calibration(quantization.CalibrationDataReader):
    def __init__(self):
        self.samples = iter([{"in0": x} for x in samples(8)])

    def get_next(self):
        return next(self.samples, None)


def quantised(kind, folder):
    source, target = folder / "float.onnx", folder / "quantised.onnx"
    onnx.save(network(), source)
    if kind == "dynamic":
        quantization.quantize_dynamic(source, target, op_types_to_quantize=["MatMul", "Gemm", "Conv"])
    else:
        quantization.quantize_static(
            source,
            target,
            Calibration(),
            quant_format=getattr(quantization.QuantFormat, kind.split("_")[0]),
            per_channel=kind.endswith("per_channel"),
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
        )
    return onnx.load(target)


def products(jaxpr):
    """The operand and result dtypes of every matrix product and convolution, in nested functions too."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("dot_general", "conv_general_dilated"):
            found.append((*(str(v.aval.dtype) for v in equation.invars), str(equation.outvars[0].aval.dtype)))
        for value in equation.params.values():
            for inner in value if isinstance(value, list | tuple) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    found += products(inner)
    return found


@pytest.mark.parametrize("kind", ["QDQ", "QDQ_per_channel", "QOperator", "dynamic"])
def test_a_quantised_network_runs_in_integers_and_agrees_with_onnx_runtime(kind, tmp_path):
    proto = quantised(kind, tmp_path)
    loaded = load(proto)
    (x,) = samples(1)
    function = lambda x: loaded.apply(loaded.params, x)[0]  # noqa: E731
    (expected,), (unquantised,) = runtime(proto, [x]), runtime(network(), [x])
    y = np.asarray(jax.jit(function)(x))
    loss_of_quantising = np.abs(expected - unquantised).max()
    assert 0.001 < loss_of_quantising < 0.2, "an oracle that says something"
    # Ours sums exactly; where ONNX Runtime rounds a float sum, a value between two integers may go the other way.
    assert np.abs(y - expected).max() <= loss_of_quantising / 4
    if kind == "QOperator":
        np.testing.assert_array_equal(y, expected)
    elif kind == "dynamic":
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)  # scaled and added up in float32
    # Convolutions on the CPU sum in float32, as many products as stay exact: see `integer_conv`.
    dots = [p for p in products(jax.make_jaxpr(function)(x).jaxpr) if p[0] != "float32"]
    assert dots and set(dots) == {("int8", "int8", "int32")}
    assert len([n for n in loaded.program.graph.nodes if n.op_type in ("Conv", "MatMul", "Gemm")]) == 0
