"""Symbolic dimensions: a call for each size, a few padded ones (`dynamic`), or jax.export; sizes that data decide."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from onnx_models import BOOL, FLOAT, INT, STRING, graph, i64, info, model, node

from zenith_jax.frontends import onnx as zenith_onnx

RNG = np.random.default_rng(0)
W = RNG.normal(size=(6, 5)).astype(np.float32)
B = RNG.normal(size=5).astype(np.float32)


def batch_model(**outputs):
    """A product, a softmax over its rows, its transpose, the best class, and constants beside.

    outputs: the shapes declared in the file; where one is left out the file says nothing.
    """
    nodes = [
        node("Gemm", ["x", "w", "b"], ["logits"]),
        node("Softmax", ["logits"], ["probabilities"], axis=-1),
        node("Transpose", ["logits"], ["columns"], perm=[1, 0]),
        node("ArgMax", ["logits"], ["best"], axis=1, keepdims=0),
        node("Identity", ["b"], ["bias"]),
        node("Add", ["logits", "other"], ["both"]),
    ]
    types = dict(logits=FLOAT, probabilities=FLOAT, columns=FLOAT, best=INT, bias=FLOAT, both=FLOAT)
    infos = [info(name, kind, outputs.get(name)) for name, kind in types.items()]
    return model(nodes, [info("x", FLOAT, ["batch", 6]), info("other", FLOAT, ["batch", 5])], infos, w=W, b=B)


DECLARED = dict(
    logits=["batch", 5], probabilities=["batch", 5], columns=[5, "batch"], best=["batch"], bias=[5], both=["batch", 5]
)
DECLARATIONS = {"all": DECLARED, "none": {}, "other_names": dict(DECLARED, columns=[5, "unk"], logits=["rows", None])}


def expected(x, other):
    logits = x @ W + B
    exp = np.exp(logits - logits.max(1, keepdims=True))
    return logits, exp / exp.sum(1, keepdims=True), logits.T, logits.argmax(1), B, logits + other


def compilations(loaded):
    return sum(function.jitted._cache_size() for function in loaded._compiled.functions.values())


@pytest.mark.parametrize("declared", DECLARATIONS)
def test_every_output_of_a_padded_call_is_cut_to_its_size(declared):
    """Whatever the file says of its outputs: exporters name one dimension differently, or not at all."""
    loaded = zenith_onnx.load(batch_model(**DECLARATIONS[declared]), dynamic={"batch": (8, 1, 4)})
    for size in (1, 2, 3, 4, 5, 8, 7, 3):
        x, other = RNG.normal(size=(size, 6)).astype(np.float32), RNG.normal(size=(size, 5)).astype(np.float32)
        for result, wanted in zip(loaded(x, other), expected(x, other), strict=True):
            assert result.shape == wanted.shape
            np.testing.assert_allclose(result, wanted, rtol=1e-4, atol=1e-5)
    assert compilations(loaded) == 3
    logits = loaded(jnp.ones((3, 6)), jnp.ones((3, 5)))[0]  # padded on the device
    np.testing.assert_allclose(logits, np.ones((3, 6)) @ W + B, rtol=1e-4, atol=1e-5)


def test_without_buckets_each_size_is_compiled():
    loaded = zenith_onnx.load(batch_model(**DECLARED))
    for size in (1, 2, 3, 2, 1):
        loaded(np.ones((size, 6), np.float32), np.ones((size, 5), np.float32))
    assert compilations(loaded) == 3


def test_buckets_of_two_dimensions():
    """Attention-free work along both: a matrix product for each position."""
    proto = model(
        [node("MatMul", ["x", "w"], ["y"]), node("Relu", ["y"], ["z"])],
        [info("x", FLOAT, ["batch", "length", 6])],
        [info("y"), info("z", FLOAT, ["batch", "length", 5])],
        w=W,
    )
    loaded = zenith_onnx.load(proto, dynamic={"batch": (1, 4), "length": (8, 16)})
    for shape in ((1, 3, 6), (2, 8, 6), (4, 9, 6), (3, 16, 6), (2, 5, 6)):
        x = RNG.normal(size=shape).astype(np.float32)
        y, z = loaded(x)
        np.testing.assert_allclose(y, x @ W, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(z, np.maximum(x @ W, 0), rtol=1e-4, atol=1e-5)
    assert compilations(loaded) == 3  # (1, 8), (4, 8), (4, 16)


def test_dimension_computed_from_a_padded_one_is_refused():
    """(batch, length) in one axis: the padding lies in the middle of it."""
    proto = model([node("Reshape", ["x", "s"], ["flat"])], [info("x", FLOAT, ["batch", "length"])], ["flat"], s=i64(-1))
    loaded = zenith_onnx.load(proto, dynamic={"length": (8,)})
    np.testing.assert_array_equal(loaded(np.ones((2, 8), np.float32))[0], np.ones(16))  # nothing was padded
    with pytest.raises(zenith_onnx.OnnxError, match=r"output flat.*\(16,\) for {'length': 8}.*cannot be cut"):
        loaded(np.ones((2, 5), np.float32))


def test_errors_of_buckets_name_the_dimension():
    proto = batch_model(**DECLARED)
    with pytest.raises(zenith_onnx.OnnxError, match=r"'bach'.*\['batch'\]"):
        zenith_onnx.load(proto, dynamic={"bach": (1,)})
    with pytest.raises(zenith_onnx.OnnxError, match="positive sizes"):
        zenith_onnx.load(proto, dynamic={"batch": ()})
    loaded = zenith_onnx.load(proto, dynamic={"batch": (1, 4)})
    with pytest.raises(zenith_onnx.OnnxError, match="batch is 5, its largest bucket is 4"):
        loaded(np.ones((5, 6), np.float32), np.ones((5, 5), np.float32))
    with pytest.raises(zenith_onnx.OnnxError, match=r"input other: float32\[batch, 5\]: batch is 2 here, and 3"):
        loaded(np.ones((3, 6), np.float32), np.ones((2, 5), np.float32))


# --- jax.export -------------------------------------------------------------------------------------------------------


def test_export_with_a_symbolic_batch_serves_every_size():
    """Shape, Gather, Concat and Reshape chains carry the symbol."""
    nodes = [
        node("Shape", ["x"], ["shape"]),
        node("Gather", ["shape", "zero"], ["batch"]),
        node("Unsqueeze", ["batch", "axis"], ["batch1"]),
        node("Concat", ["batch1", "rest"], ["target"], axis=0),
        node("MatMul", ["x", "w"], ["m"]),
        node("Slice", ["m", "begin", "end", "last"], ["cut"]),
        node("Reshape", ["cut", "target"], ["r"]),
        node("ReduceMean", ["r", "last"], ["mean"], keepdims=1),
        node("Sub", ["r", "mean"], ["y"]),
        node("Shape", ["y"], ["size"]),
        node("ConstantOfShape", ["size"], ["zeros"]),
        node("Flatten", ["y"], ["flat"]),
    ]
    proto = model(
        nodes,
        [info("x", FLOAT, ["batch", "length", 6])],
        ["y", "zeros", "flat"],
        zero=np.array(0),
        axis=i64(0),
        rest=i64(-1, 2, 2),
        begin=i64(0),
        end=i64(4),
        last=i64(-1),
        w=W,
    )
    loaded = zenith_onnx.load(proto)
    b, length = jax.export.symbolic_shape("b, n")
    exported = jax.export.export(jax.jit(loaded.apply))(
        loaded.params,
        jax.ShapeDtypeStruct((b, length, 6), np.float32),
    )
    assert str(exported.out_avals[0].shape) == "(b, n, 2, 2)"
    run = jax.export.deserialize(exported.serialize()).call
    for shape in ((1, 1, 6), (3, 7, 6)):
        x = RNG.normal(size=shape).astype(np.float32)
        wanted = (x @ W)[..., :4].reshape(*shape[:2], 2, 2)
        wanted = wanted - wanted.mean(-1, keepdims=True)
        y, zeros, flat = run(loaded.params, x)
        np.testing.assert_allclose(y, wanted, rtol=1e-4, atol=1e-5)
        assert zeros.shape == wanted.shape and not zeros.any()
        np.testing.assert_allclose(flat, wanted.reshape(shape[0], -1), rtol=1e-4, atol=1e-5)


# --- sizes that data decide -------------------------------------------------------------------------------------------

SCORES = np.array([0.1, 0.9, 0.0, 0.8, 0.9, 0.0], np.float32)
BOXES = np.array(
    [[[0, 0, 1, 1], [0, 0, 1, 0.9], [5, 5, 6, 6], [5, 5, 6, 6.2], [9, 9, 10, 10], [0, 0, 9, 9]]], np.float32
)


def data_dependent():
    """Operator -> model, its inputs, its exact results by NumPy, by hand for the boxes."""
    some = SCORES > 0.5
    values, first, inverse, counts = np.unique(SCORES, True, True, True)
    return {
        "NonZero": (["x"], (SCORES,), ["y"], [np.stack(np.nonzero(SCORES))], {}),
        "Compress": (["x", "c"], (SCORES, some), ["y"], [SCORES[some]], {}),
        "Unique": (["x"], (SCORES,), ["y", "f", "i", "n"], [values, first, inverse, counts], {}),
        "NonMaxSuppression": (
            ["boxes", "scores", "most", "overlap", "least"],
            (BOXES, SCORES.reshape(1, 1, 6), i64(3), np.float32([0.5]), np.float32([0.05])),
            ["y"],
            [np.array([[0, 0, 1], [0, 0, 4], [0, 0, 3]])],  # box 0 overlaps with the better box 1
            {},
        ),
    }


CASES = data_dependent()


def data_dependent_model(name):
    inputs, arrays, outputs, _, attributes = CASES[name]
    kinds = {"f": FLOAT, "b": BOOL, "i": INT}
    infos = [info(n, kinds[a.dtype.kind], list(a.shape)) for n, a in zip(inputs, arrays, strict=True)]
    nodes = [node(name, inputs, outputs, "chosen", **attributes)]
    return model(nodes, infos, [info(o) for o in outputs])


@pytest.mark.parametrize("name", CASES)
def test_size_from_data_is_exact_outside_of_jit(name):
    _, arrays, _, wanted, _ = CASES[name]
    loaded = zenith_onnx.load(data_dependent_model(name))
    for result, exact in zip(loaded.apply({}, *map(jnp.asarray, arrays)), wanted, strict=True):
        np.testing.assert_array_equal(result, exact)


@pytest.mark.parametrize("name", CASES)
def test_size_from_data_inside_of_jit_needs_a_bound(name):
    _, arrays, _, _, _ = CASES[name]
    loaded = zenith_onnx.load(data_dependent_model(name))
    given = dict(zip((i.name for i in loaded.inputs), arrays, strict=True))
    statics = {k: given.pop(k) for k in loaded.static_inputs}
    with pytest.raises(zenith_onnx.NotStaticError, match=rf"node {name} 'chosen'.*(bound|size_bounds)"):
        jax.jit(lambda traced: loaded.apply({}, **traced, **statics))(given)


@pytest.mark.parametrize("key", ["chosen", "y"])
@pytest.mark.parametrize("name", CASES)
def test_size_from_data_inside_of_jit_is_what_the_bound_says(name, key):
    _, arrays, _, wanted, _ = CASES[name]
    bound = 5
    loaded = zenith_onnx.load(data_dependent_model(name), size_bounds={key: bound})
    given = dict(zip((i.name for i in loaded.inputs), arrays, strict=True))
    statics = {k: given.pop(k) for k in loaded.static_inputs}
    results = jax.jit(lambda traced: loaded.apply({}, **traced, **statics))(given)
    for place, (result, exact) in enumerate(zip(results, wanted, strict=True)):
        axis = 1 if name == "NonZero" else 0
        if (name, place) == ("Unique", 2):  # the inverse is as long as the input
            np.testing.assert_array_equal(result, exact)
            continue
        found = exact.shape[axis]
        assert result.shape[axis] == bound
        np.testing.assert_array_equal(np.take(result, range(found), axis), exact)
        assert not np.take(result, range(found, bound), axis).any(), "what is missing is zeros"


def test_compiled_call_falls_back_to_node_by_node_and_says_so_once(caplog):
    loaded = zenith_onnx.load(data_dependent_model("NonZero"))
    with caplog.at_level(logging.WARNING, "zenith_jax"):
        for x in (SCORES, 1 - SCORES, SCORES):
            np.testing.assert_array_equal(loaded(x)[0], np.stack(np.nonzero(x)))
    assert len([r for r in caplog.records if "NonZero 'chosen'" in r.getMessage()]) == 1


def test_strings_are_given_by_a_call_without_jit():
    proto = model(
        [node("StringConcat", ["s", "s"], ["t"]), node("Neg", ["x"], ["y"])],
        [info("s", STRING, [1]), info("x", FLOAT, [2])],
        [info("t", STRING), "y"],
    )
    t, y = zenith_onnx.load(proto)(np.array(["ab"], object), np.ones(2, np.float32))
    assert t.tolist() == ["abab"]
    np.testing.assert_array_equal(y, [-1, -1])


def test_what_follows_a_bounded_size_has_that_size():
    """NonZero -> GatherND, as boolean indexing is exported: rows behind the last one read element 0."""
    nodes = [
        node("Greater", ["x", "half"], ["some"]),
        node("NonZero", ["some"], ["where"], "where"),
        node("Transpose", ["where"], ["rows"], perm=[1, 0]),
        node("GatherND", ["x", "rows"], ["y"]),
    ]
    proto = model(nodes, [info("x", FLOAT, [6])], half=np.float32(0.5))
    exact = zenith_onnx.load(proto)
    np.testing.assert_array_equal(exact.apply(exact.params, SCORES)[0], SCORES[SCORES > 0.5])
    bounded = zenith_onnx.load(proto, size_bounds={"where": 4})
    (y,) = jax.jit(bounded.apply)(bounded.params, SCORES)
    np.testing.assert_array_equal(y, [*SCORES[SCORES > 0.5], SCORES[0]])


def test_integers_that_need_64_bits_are_refused_instead_of_wrapped():
    loaded = zenith_onnx.load(model([node("Neg", ["x"], ["y"])], [info("x", INT, [2])]))
    for run in (loaded, lambda x: loaded.apply({}, x)):
        np.testing.assert_array_equal(run(i64(5, -7))[0], [-5, 7])
        with pytest.raises(zenith_onnx.OnnxError, match="input 'x' holds 5 to 1099511627776, which needs 64 bits"):
            run(i64(5, 1 << 40))
    with jax.enable_x64(True):
        np.testing.assert_array_equal(loaded(i64(5, 1 << 40))[0], [-5, -(1 << 40)])


def test_loop_over_a_dimension_unrolls_for_each_size():
    body = graph(
        [node("Gather", ["x", "i"], ["row"]), node("Add", ["v", "row"], ["next"]), node("Identity", ["go"], ["again"])],
        [info("i", INT, []), info("go", BOOL, []), info("v")],
        [info("again", BOOL, []), "next"],
    )
    nodes = [
        node("Shape", ["x"], ["shape"], end=1),
        node("Squeeze", ["shape"], ["n"]),
        node("Loop", ["n", "", "zero"], ["y"], body=body),
    ]
    loaded = zenith_onnx.load(model(nodes, [info("x", FLOAT, ["n", 3])], zero=np.zeros(3, np.float32)))
    for size in (0, 2, 20):
        x = RNG.normal(size=(size, 3)).astype(np.float32)
        np.testing.assert_allclose(loaded(x)[0], x.sum(0), rtol=1e-4, atol=1e-5)
