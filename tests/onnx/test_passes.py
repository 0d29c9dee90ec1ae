"""Each pass alone, on small graphs: what it changes, what it must leave, and that values and gradients stay."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zenith_jax.frontends.onnx import OnnxError, load
from zenith_jax.frontends.onnx.parsed import text

onnx = pytest.importorskip("onnx")
node = onnx.helper.make_node
RNG = np.random.default_rng(0)


def f32(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def model(nodes, inputs, weights, outputs=("y",), *, opset=21, defaults=(), types=None):
    """inputs: shapes by name. defaults: weights that are inputs too."""
    info = onnx.helper.make_tensor_value_info
    listed = [info(n, 1, shape) for n, shape in inputs.items()] + [info(n, 1, weights[n].shape) for n in defaults]
    graph = onnx.helper.make_graph(
        nodes,
        "small",
        listed,
        [onnx.helper.make_tensor_value_info(o, (types or {}).get(o, 1), None) for o in outputs],
        [onnx.numpy_helper.from_array(np.asarray(v), n) for n, v in weights.items()],
    )
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=10)


def operators(proto, *passes):
    return [n.op_type for n in load(proto, passes=passes).program.graph.nodes]


def outputs(proto, passes, **inputs):
    loaded = load(proto, passes=passes)
    results = jax.jit(lambda p, x: loaded.apply(p, **x))(loaded.params, inputs)
    return [np.asarray(r) for r in results]


def test_load_runs_the_passes_that_are_named_and_knows_their_names():
    proto = model([node("Identity", ["x"], ["a"]), node("Relu", ["a"], ["y"])], {"x": (2,)}, {})
    assert operators(proto) == ["Identity", "Relu"]
    assert operators(proto, "identities") == ["Relu"]
    assert [n.op_type for n in load(proto).program.graph.nodes] == ["Relu"]
    with pytest.raises(OnnxError, match=r"passes=\['fold'\]: there are \['transposes', 'identities'"):
        load(proto, passes=["fold"])


def test_a_pass_that_raises_leaves_the_model_as_it_was(caplog):
    proto = model(
        [node("Transpose", ["x"], ["a"], perm=[0, 1]), node("Transpose", ["a"], ["y"], perm=[0, 7])], {"x": (2, 2)}, {}
    )
    loaded = load(proto)
    assert "the pass 'transposes' left this ONNX model as it was" in caplog.text
    with pytest.raises(OnnxError, match="node Transpose 'y'"):
        loaded(f32(2, 2))


def test_a_model_prints_one_line_for_each_node():
    body = onnx.helper.make_graph([node("Neg", ["x"], ["z"])], "then", [], [onnx.ValueInfoProto(name="z")])
    proto = model(
        [node("If", ["c"], ["y"], then_branch=body, else_branch=body), node("Clip", ["y", "", "m"], ["k"])],
        {"x": (2,)},
        {"c": np.array(True), "m": np.float32(1)},
        ["k"],
    )
    assert text(load(proto, passes=()).program.graph).splitlines() == [
        "(x: float32[2])",
        "  y = If(c)",
        "      ()",
        "        z = Neg(x)",
        "      -> z",
        "      ()",
        "        z = Neg(x)",
        "      -> z",
        "  k = Clip(y, -, m)",
        "-> k",
    ]


# --- identities -------------------------------------------------------------------------------------------------------


def test_identities_are_looked_through_and_results_keep_their_names():
    nodes = [
        node("Identity", ["w"], ["w2"]),
        node("Dropout", ["x", "ratio", "training"], ["d"]),
        node("MatMul", ["d", "w2"], ["m"]),
        node("Mul", ["one", "m"], ["s"]),
        node("Transpose", ["s"], ["t"], perm=[0, 1]),
        node("Concat", ["t"], ["y"], axis=0),
    ]
    weights = {"w": f32(3, 2), "ratio": np.float32(0.5), "training": np.array(False), "one": np.float32(1)}
    proto = model(nodes, {"x": (4, 3)}, weights)
    loaded = load(proto, passes=["identities"])
    (product,) = loaded.program.graph.nodes
    assert (product.op_type, product.inputs, product.outputs) == ("MatMul", ("x", "w"), ("y",))
    x = f32(4, 3)
    np.testing.assert_array_equal(outputs(proto, ["identities"], x=x), outputs(proto, (), x=x))


def branch(op_type):
    return onnx.helper.make_graph([node(op_type, ["a"], ["z"])], "branch", [], [onnx.ValueInfoProto(name="z")])


ONES = np.ones((3, 1), np.float32)
KEPT = {
    "an input that is a result": ([node("Identity", ["x"], ["y"])], {}, ["y"]),
    "a weight that is a result": ([node("Identity", ["w"], ["y"])], {"w": f32(2)}, ["y"]),
    "training": ([node("Dropout", ["x", "", "t"], ["y"])], {"t": np.array(True)}, ["y"]),
    "training by the caller": ([node("Dropout", ["x", "", "t"], ["y"])], {}, ["y"]),
    "a mask": ([node("Dropout", ["x"], ["a", "y"]), node("Neg", ["a"], ["b"])], {}, ["y", "b"]),
    "ones that broadcast": ([node("Mul", ["x", "w"], ["m"]), node("Neg", ["m"], ["y"])], {"w": ONES}, ["y"]),
    "a two": ([node("Mul", ["x", "w"], ["m"]), node("Neg", ["m"], ["y"])], {"w": np.float32(2)}, ["y"]),
    "one divided by": ([node("Div", ["w", "x"], ["m"]), node("Neg", ["m"], ["y"])], {"w": np.float32(1)}, ["y"]),
    "a value that a graph within reads": (
        [
            node("Identity", ["x"], ["a"]),
            node("If", ["c"], ["y"], then_branch=branch("Neg"), else_branch=branch("Abs")),
        ],
        {"c": np.array(True)},
        ["y"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", KEPT)
def test_what_is_no_identity_stays(name):
    nodes, weights, results = KEPT[name]
    inputs = {"x": (2,), **({"t": ()} if name.endswith("caller") else {})}
    assert operators(model(nodes, inputs, weights, results), "identities") == [n.op_type for n in nodes]


def test_two_results_of_one_value_keep_both_names():
    nodes = [node("Neg", ["x"], ["n"]), node("Identity", ["n"], ["y"]), node("Identity", ["n"], ["z"])]
    proto = model(nodes, {"x": (2,)}, {}, ["y", "z"])
    assert operators(proto, "identities") == ["Neg", "Identity"]
    x = f32(2)
    np.testing.assert_array_equal(outputs(proto, ["identities"], x=x), [-x, -x])


# --- transposes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("second, left", [([2, 0, 1], 0), ([1, 0, 2], 1)])
def test_a_transpose_of_a_transpose_is_one_or_none(second, left):
    nodes = [
        node("Transpose", ["x"], ["a"], perm=[1, 2, 0]),
        node("Identity", ["a"], ["b"]),
        node("Transpose", ["b"], ["c"], perm=second),
        node("Neg", ["c"], ["y"]),
    ]
    proto = model(nodes, {"x": (2, 3, 4)}, {})
    passes = ["transposes", "identities", "unread"]
    assert operators(proto, *passes) == ["Transpose"] * left + ["Neg"]
    x = f32(2, 3, 4)
    np.testing.assert_array_equal(outputs(proto, passes, x=x)[0], -x.transpose(1, 2, 0).transpose(second))


# --- constants --------------------------------------------------------------------------------------------------------


def test_what_is_computed_from_constants_is_computed_once():
    """A causal mask kept as booleans, as GPT-2's older exports have it: too large to stay NumPy while tracing."""
    mask = np.tril(np.ones((1, 64, 64), bool))
    nodes = [
        node("Slice", ["mask", "starts", "ends", "axes"], ["cut"]),
        node("Not", ["cut"], ["hidden"]),
        node("Cast", ["hidden"], ["wide"], to=1),
        node("Mul", ["wide", "minus"], ["bias"]),
        node("Add", ["x", "bias"], ["a"]),
        node("Transpose", ["w"], ["wt"], perm=[1, 0]),
        node("MatMul", ["a", "wt"], ["y"]),
    ]
    weights = {
        "mask": mask,
        "starts": np.array([0]),
        "ends": np.array([48]),
        "axes": np.array([1]),
        "minus": np.float32(-1e9),
        "w": f32(3, 64),
    }
    proto = model(nodes, {"x": (2, 48, 64)}, weights)
    loaded = load(proto, passes=["constants", "unread"])
    assert [n.op_type for n in loaded.program.graph.nodes] == ["Add", "Transpose", "MatMul"], (
        "a parameter is no constant"
    )
    assert set(loaded.params) == {"w"} and set(loaded.constants) == {"bias"}
    x = f32(2, 48, 64)
    np.testing.assert_array_equal(outputs(proto, ["constants"], x=x), outputs(proto, (), x=x))


@pytest.mark.parametrize(
    "nodes, weights",
    [
        ([node("Cast", ["k"], ["c"], to=1)], {"k": np.ones(600_000, np.int8)}),  # 2.4 MB, of 0.6
        ([node("Expand", ["k", "s"], ["c"])], {"k": np.array([1, 2]), "s": np.array([1 << 40, 2])}),
        ([node("MatMul", ["k", "k"], ["c"])], {"k": np.ones((5000, 5000), np.int8)}),
        ([node("RandomUniformLike", ["k"], ["c"])], {"k": np.arange(4)}),
        (
            [node("Reshape", ["k", "s"], ["c"])],
            {"k": np.arange(4), "s": np.array([3, 2])},
        ),  # an error, to be named later
    ],
    ids=["larger", "unbounded", "much work", "random", "wrong"],
)
def test_what_is_not_computed_while_loading(nodes, weights):
    nodes = [*nodes, node("Add", ["x", "c"], ["y"])]
    assert operators(model(nodes, {"x": ()}, weights), "constants") == [n.op_type for n in nodes]


def test_a_default_that_a_caller_may_replace_is_no_constant():
    nodes = [node("Neg", ["k"], ["n"]), node("Add", ["x", "n"], ["y"])]
    proto = model(nodes, {"x": (2,)}, {"k": np.float32(3)}, defaults=["k"])
    assert operators(proto, "constants") == ["Neg", "Add"]
    assert float(load(proto)(np.zeros(2, np.float32), k=np.float32(5))[0][0]) == -5


# --- batch_norm -------------------------------------------------------------------------------------------------------


def norm(x, y, tag="", **attributes):
    return node("BatchNormalization", [x, *(f"{n}{tag}" for n in ("scale", "bias", "mean", "var"))], [y], **attributes)


def statistics(channels, tag=""):
    values = [f32(channels), f32(channels), f32(channels), RNG.uniform(0.5, 2, channels).astype(np.float32)]
    return {f"{n}{tag}": v for n, v in zip(("scale", "bias", "mean", "var"), values, strict=True)}


PRODUCTS = {
    "conv": (node("Conv", ["x", "w", "b"], ["c"]), (2, 3, 6, 6), {"w": f32(5, 3, 3, 3), "b": f32(5)}),
    "conv_without_bias": (node("Conv", ["x", "w"], ["c"]), (2, 3, 6), {"w": f32(5, 3, 3)}),
    "grouped": (node("Conv", ["x", "w", "b"], ["c"], group=2), (2, 4, 6, 6), {"w": f32(6, 2, 3, 3), "b": f32(6)}),
    "transposed": (node("ConvTranspose", ["x", "w"], ["c"], group=2), (2, 4, 5, 5), {"w": f32(4, 3, 3, 3)}),
    "gemm": (node("Gemm", ["x", "w", "b"], ["c"], beta=0.5, alpha=2.0), (2, 3), {"w": f32(3, 5), "b": f32(1, 5)}),
    "gemm_transposed": (node("Gemm", ["x", "w", "b"], ["c"], transB=1), (2, 3), {"w": f32(5, 3), "b": f32(1)}),
}  # fmt: skip


@pytest.mark.parametrize("name", PRODUCTS)
def test_batch_norm_is_part_of_the_product_before_it(name):
    product, shape, weights = PRODUCTS[name]
    channels = 6 if name in ("grouped", "transposed") else 5
    weights = {**weights, **statistics(channels)}
    proto = model([product, norm("c", "n", epsilon=1e-3), node("Tanh", ["n"], ["y"])], {"x": shape}, weights)
    folded, plain = load(proto, passes=["batch_norm", "unread"]), load(proto, passes=())
    assert [n.op_type for n in folded.program.graph.nodes] == [product.op_type, "Tanh"]
    assert set(folded.params) == {"w", "b" if "b" in weights else "bias"} and not folded.constants
    x = jnp.asarray(f32(*shape))
    loss = lambda model: lambda p, x: (model.apply(p, x)[0] ** 2).sum()  # noqa: E731
    tolerance = dict(rtol=1e-5, atol=1e-5)  # a few roundings of numbers of size 1
    np.testing.assert_allclose(folded.apply(folded.params, x)[0], plain.apply(plain.params, x)[0], **tolerance)
    of_folded, dx = jax.grad(loss(folded), (0, 1))(folded.params, x)
    of_plain, dx_plain = jax.grad(loss(plain), (0, 1))(plain.params, x)
    np.testing.assert_allclose(dx, dx_plain, rtol=1e-4, atol=1e-4)
    # The chain rule through w -> w * factor: the plain derivative is the folded one times the factor.
    factor = weights["scale"] / np.sqrt(weights["var"] + 1e-3)
    axes = {"transposed": (2, 3, 1), "gemm": (1, -1), "gemm_transposed": (-1, 1)}.get(
        name, (-1, *(1,) * (len(shape) - 1))
    )
    by_weight = (
        np.repeat(factor.reshape(2, 3), 2, 0)[:, :, None, None] if name == "transposed" else factor.reshape(axes)
    )
    np.testing.assert_allclose(of_plain["w"], of_folded["w"] * by_weight, rtol=1e-3, atol=1e-3)
    if "b" not in weights:
        np.testing.assert_allclose(of_plain["bias"], of_folded["bias"], rtol=1e-3, atol=1e-3)


def test_two_batch_norms_are_folded_one_after_the_other():
    weights = {"w": f32(5, 3, 3, 3), **statistics(5), **statistics(5, "2")}
    proto = model([node("Conv", ["x", "w"], ["c"]), norm("c", "n"), norm("n", "y", "2")], {"x": (1, 3, 5, 5)}, weights)
    assert operators(proto, "batch_norm") == ["Conv"]
    x = f32(1, 3, 5, 5)
    np.testing.assert_allclose(outputs(proto, None, x=x), outputs(proto, (), x=x), rtol=1e-4, atol=1e-4)


CONV, NORM = node("Conv", ["x", "w"], ["c"]), norm("c", "y")
UNFOLDED = {
    "weight read twice": ([CONV, NORM, node("Neg", ["w"], ["z"])], {}, ["y", "z"], ()),
    "product read twice": ([CONV, NORM, node("Neg", ["c"], ["z"])], {}, ["y", "z"], ()),
    "product is a result": ([CONV, NORM], {}, ["y", "c"], ()),
    "training": (
        [CONV, node("BatchNormalization", NORM.input, ["y", "m", "v"], training_mode=1)], {}, ["y", "m", "v"], (),
    ),
    "a scale by the caller": ([CONV, NORM], {}, ["y"], ("scale",)),
    "a computed scale": ([CONV, node("Neg", ["s"], ["scale"]), NORM], {"scale": None, "s": f32(5)}, ["y"], ()),
    "another product": ([node("Mul", ["x", "w"], ["c"]), NORM], {"w": f32(1, 3, 1, 1)}, ["y"], ()),
}  # fmt: skip


@pytest.mark.parametrize("name", UNFOLDED)
def test_batch_norm_that_must_stay(name):
    nodes, others, results, defaults = UNFOLDED[name]
    weights = {k: v for k, v in {"w": f32(5, 3, 3, 3), **statistics(5), **others}.items() if v is not None}
    proto = model(nodes, {"x": (1, 3, 5, 5)}, weights, results, defaults=defaults)
    assert sorted(operators(proto, "batch_norm")) == sorted(n.op_type for n in nodes)


def test_running_statistics_are_no_parameters():
    proto = model([CONV, NORM], {"x": (1, 3, 5, 5)}, {"w": f32(5, 3, 3, 3), **statistics(5)})
    assert set(load(proto, passes=()).params) == {"w", "scale", "bias"}


# --- unread -----------------------------------------------------------------------------------------------------------


def test_nodes_and_weights_that_nothing_reads_are_left_out():
    nodes = [node("Neg", ["x"], ["y"]), node("NoSuchOperator", ["x"], ["a"]), node("Abs", ["a"], ["b"])]
    proto = model(nodes, {"x": (2,)}, {"w": f32(2), "k": np.ones(5000, np.int32)})
    loaded = load(proto)
    assert [n.op_type for n in loaded.program.graph.nodes] == ["Neg"]
    assert not loaded.params and not loaded.constants and not loaded.unsupported()
    assert len(load(proto, passes=()).params) == 1
