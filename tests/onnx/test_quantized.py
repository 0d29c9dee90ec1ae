"""Models with QuantizeLinear and DequantizeLinear run in integers, and give what ONNX Runtime gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from onnx_one_node import runtime

from zenith_jax.frontends import onnx as zenith_onnx
from zenith_jax.frontends.onnx.ops import conv
from zenith_jax.frontends.onnx.ops._windows import windows

onnx = pytest.importorskip("onnx")
RNG = np.random.default_rng(0)
SCALE, ZERO = np.float32(0.05), np.uint8(117)


def model(op_type, x, weight, weight_scale, bias=None, *, weight_axis=0, weight_zero=None, **attributes):
    """x -> Q -> DQ -> product with DQ(weight) -> Relu -> Q -> DQ."""
    if weight_zero is None:
        weight_zero = np.zeros(weight_scale.shape, weight.dtype)
    constants = {
        "scale": SCALE,
        "zero": ZERO,
        "weight": weight,
        "weight_scale": weight_scale,
        "weight_zero": weight_zero,
        "out_scale": np.float32(0.02),
        "out_zero": np.uint8(0),
    }
    if bias is not None:
        constants["bias"] = bias
    make = onnx.helper.make_node
    nodes = [
        make("QuantizeLinear", ["in0", "scale", "zero"], ["q"]),
        make("DequantizeLinear", ["q", "scale", "zero"], ["dq"]),
        make("DequantizeLinear", ["weight", "weight_scale", "weight_zero"], ["w"], axis=weight_axis),
        make(op_type, ["dq", "w", *(["bias"] if bias is not None else [])], ["y"], **attributes),
        make("Relu", ["y"], ["r"]),
        make("QuantizeLinear", ["r", "out_scale", "out_zero"], ["yq"]),
        make("DequantizeLinear", ["yq", "out_scale", "out_zero"], ["out0"]),
    ]
    graph = onnx.helper.make_graph(
        nodes,
        "qdq",
        [onnx.helper.make_tensor_value_info("in0", 1, x.shape)],
        [onnx.ValueInfoProto(name="out0")],
        [onnx.numpy_helper.from_array(np.asarray(v), n) for n, v in constants.items()],
    )
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)


def f32(*shape, scale=1.0):
    return (scale * RNG.standard_normal(shape)).astype(np.float32)


def i8(*shape):
    return RNG.integers(-127, 128, shape).astype(np.int8)


def scales(n):
    return RNG.uniform(0.001, 0.01, n).astype(np.float32)


INTEGER = {
    "conv": model("Conv", f32(1, 3, 8, 8), i8(5, 3, 3, 3), scales(5), f32(5), pads=[1, 1, 1, 1]),
    "conv_grouped_one_scale": model("Conv", f32(1, 4, 8, 8), i8(6, 2, 3, 3), scales(())[()], group=2, strides=[2, 2]),
    "conv_of_many_channels": model("Conv", f32(1, 300, 5, 5), i8(2, 300, 3, 3), scales(2) / 10),
    "matmul_by_column": model("MatMul", f32(2, 3, 16), i8(16, 5), scales(5), weight_axis=1),
    "matmul_zero_points": model(
        "MatMul", f32(3, 16), i8(16, 5), scales(5), weight_axis=-1, weight_zero=np.array([1, -3, 0, 7, 100], np.int8)
    ),
    "gemm_transposed": model("Gemm", f32(3, 16), i8(5, 16), scales(5), f32(5), transB=1, alpha=0.5, beta=2.0),
}
FLOAT = {
    "matmul_scale_along_summed_axis": model("MatMul", f32(3, 16), i8(16, 5), scales(16), weight_axis=0),
    "matmul_int16": model("MatMul", f32(3, 16), i8(16, 5).astype(np.int16), scales(5), weight_axis=1),
}


def _products(loaded, x):
    """The dtypes that the products of the traced model multiply and sum in."""
    jaxpr = jax.make_jaxpr(lambda v: loaded.apply(loaded.params, v))(x)
    found = [e for e in jaxpr.eqns if e.primitive.name in ("dot_general", "conv_general_dilated")]
    for e in jaxpr.eqns:
        for inner in (p.jaxpr for p in e.params.values() if hasattr(p, "jaxpr")):
            found += [i for i in inner.eqns if i.primitive.name in ("dot_general", "conv_general_dilated")]
    return found


def _input(proto):
    dims = [d.dim_value for d in proto.graph.input[0].type.tensor_type.shape.dim]
    return np.random.default_rng(1).standard_normal(dims).astype(np.float32)


@pytest.mark.parametrize("name", [*INTEGER, *FLOAT])
def test_quantised_model_agrees_with_onnx_runtime(name):
    proto = {**INTEGER, **FLOAT}[name]
    x = _input(proto)
    (expected,) = runtime(proto, [x])
    assert 0.1 < (expected > 0).mean() < 1 and len(np.unique(expected)) > 4, "an oracle that says something"
    (got,) = zenith_onnx.load(proto)(x)
    # A step of the output's scale where a value lies between two; hardly anywhere.
    steps = np.abs(np.asarray(got) - expected) / 0.02
    assert steps.max() < 1.5 and (steps > 0.5).mean() < 0.02
    (as_written,) = zenith_onnx.load(proto, passes=())(x)
    np.testing.assert_allclose(as_written, expected, atol=0.021)


@pytest.mark.parametrize("name", ["matmul_by_column", "matmul_zero_points", "gemm_transposed"])
def test_products_multiply_int8_and_sum_int32(name):
    loaded = zenith_onnx.load(INTEGER[name])
    (product,) = _products(loaded, jnp.asarray(_input(INTEGER[name])))
    assert [v.aval.dtype for v in product.invars] == [np.int8, np.int8]
    assert product.outvars[0].aval.dtype == np.int32


@pytest.mark.parametrize("name", FLOAT)
def test_what_integers_cannot_say_stays_as_the_file_has_it(name):
    loaded = zenith_onnx.load(FLOAT[name])
    (product,) = _products(loaded, jnp.asarray(_input(FLOAT[name])))
    assert product.outvars[0].aval.dtype == np.float32


def test_pass_drops_dequantisations_that_nobody_reads():
    counts = {}
    for integers in (True, False):
        nodes = zenith_onnx.load(INTEGER["conv"], passes=None if integers else ()).program.graph.nodes
        counts[integers] = sorted(n.op_type for n in nodes)
    assert counts[True] == ["DequantizeLinear", "IntegerConv", "QuantizeLinear", "QuantizeLinear", "Relu"]
    assert counts[False].count("DequantizeLinear") == 3


@pytest.mark.parametrize("channels,kernel,group", [(300, (3, 3), 1), (8, (5, 2), 8), (4, (3, 3), 2)])
def test_integer_convolutions_are_exact_beyond_the_integers_of_float32(channels, kernel, group):
    x = RNG.integers(120, 128, (1, channels, 35, 34)).astype(np.int8)
    w = RNG.integers(-128, -120, (group * 2, channels // group, *kernel)).astype(np.int8)
    geometry = windows(x.shape[2:], kernel, strides=[2, 1], dilations=None, pads=None, auto_pad="VALID")
    exact = jax.lax.conv_general_dilated(
        x.astype(np.int32), w.astype(np.int32), geometry.stride, "VALID", feature_group_count=group
    )
    for way in (conv._sums_by_floats, conv._sums_by_taps):
        np.testing.assert_array_equal(way(jnp.asarray(x), jnp.asarray(w), geometry=geometry, group=group), exact)
    if channels * kernel[0] * kernel[1] // group > 1024:
        assert np.abs(exact).max() > 2**24
