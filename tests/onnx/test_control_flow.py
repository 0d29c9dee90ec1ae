"""If, Loop and Scan: decided while tracing where that can be, else lax.cond, lax.scan and lax.while_loop.

The oracles are the same computation in NumPy, and finite differences for gradients.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from onnx_models import BOOL, FLOAT, INT, graph, info, model, node

from zenith_jax.frontends import onnx as zenith_onnx

RNG = np.random.default_rng(0)
X, W = RNG.normal(size=(3, 4)).astype(np.float32), RNG.normal(size=(4, 4)).astype(np.float32)


def primitives(function, *args):
    """Names of the primitives in the function, at any depth."""
    return set(re.findall(r" = ([a-z_]+)\[", str(jax.make_jaxpr(function)(*args))))


def directional(function, x):
    """Gradient of the sum and a central difference of it, along one direction; in float32, hence the tolerance."""
    direction = RNG.normal(size=x.shape).astype(np.float32)
    total = lambda v: function(v).astype(jnp.float32).sum()  # noqa: E731
    gradient = jax.grad(total)(jnp.asarray(x))
    step = 3e-3
    difference = (total(x + step * direction) - total(x - step * direction)) / (2 * step)
    np.testing.assert_allclose((gradient * direction).sum(), difference, rtol=2e-2, atol=1e-3)


# --- If ---------------------------------------------------------------------------------------------------------------


def conditional(otherwise="Exp", condition=("c",), *nodes):
    """y = tanh(x @ w) if the condition holds, else exp(x) or another operator."""
    then = graph([node("MatMul", ["x", "w"], ["m"]), node("Tanh", ["m"], ["t"])], outputs=["t"])
    branch = graph([node(otherwise, ["x"], ["e"])], outputs=["e"])
    proto = model(
        [*nodes, node("If", [condition[0]], ["y"], "if", then_branch=then, else_branch=branch)],
        [info("c", BOOL, []), info("x", FLOAT, [3, 4])],
        w=W,
    )
    return zenith_onnx.load(proto)


@pytest.mark.parametrize("condition", [True, False])
def test_condition_that_is_known_leaves_one_branch(condition):
    loaded = conditional().specialise(c=condition)
    assert "cond" not in primitives(loaded.apply, loaded.params, X)
    (y,) = jax.jit(loaded.apply)(loaded.params, X)
    np.testing.assert_allclose(y, np.tanh(X @ W) if condition else np.exp(X), rtol=1e-5)


@pytest.mark.parametrize("condition", [True, False])
def test_traced_condition_is_a_cond_with_a_gradient(condition):
    loaded = conditional()
    assert "cond" in primitives(loaded.apply, loaded.params, condition, X)
    (y,) = jax.jit(loaded.apply)(loaded.params, condition, X)
    np.testing.assert_allclose(y, np.tanh(X @ W) if condition else np.exp(X), rtol=1e-5)
    directional(lambda x: loaded.apply(loaded.params, jnp.asarray(condition), x)[0], X)
    # Also by a weight of one branch: zero where the other was taken.
    of_weight = jax.jit(jax.grad(lambda p, c: loaded.apply(p, c, X)[0].sum()))(loaded.params, condition)["w"]
    assert bool(np.any(of_weight)) is condition


def test_vmap_over_the_condition_takes_both_branches():
    loaded = conditional()
    (y,) = jax.vmap(lambda c: loaded.apply(loaded.params, c, X))(jnp.array([True, False]))
    np.testing.assert_allclose(y, np.stack([np.tanh(X @ W), np.exp(X)]), rtol=1e-5)


def test_traced_condition_with_branches_of_two_shapes_says_what_to_do():
    loaded = conditional("Size")
    with pytest.raises(zenith_onnx.NotStaticError, match=r"node If 'if'.*float32\[3, 4\].*load\(static=\.\.\.\)"):
        jax.jit(loaded.apply)(loaded.params, True, X)
    assert int(loaded.specialise(c=False).apply(loaded.params, X)[0]) == 12


def test_condition_computed_from_a_shape_is_decided_while_tracing():
    nodes = [node("Shape", ["x"], ["s"]), node("ReduceProd", ["s"], ["n"], keepdims=0)]
    small = model([*nodes, node("Constant", [], ["k"], value_int=10), node("Less", ["n", "k"], ["few"])])
    loaded = conditional("Exp", ("few",), *small.graph.node)
    assert "cond" not in primitives(loaded.apply, loaded.params, True, X)
    np.testing.assert_allclose(loaded.apply(loaded.params, True, X)[0], np.exp(X), rtol=1e-5)  # 12 are not few


# --- Loop -------------------------------------------------------------------------------------------------------------


def loop(trips, condition="", *, stop_at=None, collect=True, inputs=(), **weights):
    """v = tanh(v @ w) in each round, and the sum of v collected; with `stop_at` until that sum passes it."""
    nodes = [
        node("MatMul", ["v", "w"], ["m"]),
        node("Tanh", ["m"], ["next"]),
        node("ReduceSum", ["next"], ["total"], keepdims=0),
    ]
    if stop_at is None:
        nodes.append(node("Identity", ["go"], ["again"]))
    else:
        nodes += [node("Constant", [], ["bound"], value_float=stop_at), node("Less", ["total", "bound"], ["again"])]
    outputs = [info("again", BOOL, []), info("next", FLOAT, [3, 4]), *([info("total", FLOAT, [])] if collect else [])]
    body = graph(nodes, [info("i", INT, []), info("go", BOOL, []), info("v", FLOAT, [3, 4])], outputs, "body")
    results = ["y", "totals"] if collect else ["y"]
    proto = model(
        [node("Loop", [trips, condition, "x"], results, "loop", body=body)],
        [*inputs, info("x", FLOAT, [3, 4])],
        results,
        w=W,
        **weights,
    )
    return proto


def rounds(count, stop_at=np.inf):
    v, totals = X, []
    for _ in range(count):
        v = np.tanh(v @ W)
        totals.append(v.sum())
        if totals[-1] >= stop_at:
            break
    return v, np.array(totals, np.float32)


@pytest.mark.parametrize("count", [0, 1, 3, 20])
def test_known_number_of_rounds(count):
    """Few are written out, more are a scan; both have a gradient in reverse mode."""
    loaded = zenith_onnx.load(loop("n", n=np.array(count)))
    v, totals = rounds(count)
    for apply in (loaded.apply, jax.jit(loaded.apply)):
        y, found = apply(loaded.params, X)
        np.testing.assert_allclose(y, v, rtol=1e-4, atol=1e-6)
        assert found.shape == (count,)
        np.testing.assert_allclose(found, totals, rtol=1e-4, atol=1e-5)
    names = primitives(loaded.apply, loaded.params, X)
    assert ("scan" in names) == (count > 8) and "while" not in names
    directional(lambda x: loaded.apply(loaded.params, x)[1 if count else 0], X)


@pytest.mark.parametrize("count", [0, 2, 5])
def test_traced_number_of_rounds_is_a_while_loop(count):
    loaded = zenith_onnx.load(loop("n", collect=False, inputs=[info("n", INT, [])]))
    run = jax.jit(loaded.apply)
    assert "while" in primitives(loaded.apply, loaded.params, np.array(count), X)
    (y,) = run(loaded.params, np.array(count), X)
    np.testing.assert_allclose(y, rounds(count)[0], rtol=1e-4, atol=1e-6)
    # In forward mode it has a derivative.
    _, tangent = jax.jvp(lambda x: run(loaded.params, np.array(count), x)[0], (jnp.asarray(X),), (jnp.asarray(X),))
    step = 1e-2
    ahead, behind = (run(loaded.params, np.array(count), X * (1 + s))[0] for s in (step, -step))
    np.testing.assert_allclose(tangent, (ahead - behind) / (2 * step), rtol=5e-2, atol=2e-3)


def test_what_a_traced_number_of_rounds_collects_needs_a_bound():
    proto = loop("n", inputs=[info("n", INT, [])])
    loaded = zenith_onnx.load(proto)
    with pytest.raises(zenith_onnx.NotStaticError, match=r"node Loop 'loop'.*load\(size_bounds="):
        jax.jit(loaded.apply)(loaded.params, np.array(3), X)
    bounded = zenith_onnx.load(proto, size_bounds={"loop": 5})
    y, totals = jax.jit(bounded.apply)(bounded.params, np.array(3), X)
    v, expected = rounds(3)
    np.testing.assert_allclose(y, v, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(totals, [*expected, 0, 0], rtol=1e-4, atol=1e-5)
    y, totals = loaded.apply(loaded.params, np.array(3), X)  # outside of jit: exact
    np.testing.assert_allclose(totals, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("trips", [np.iinfo(np.int64).max, 4])
def test_condition_from_data_ends_the_loop(trips):
    """As exporters write `while`: as many rounds as an int64 holds, and a condition that each round computes."""
    stop = float(np.sort(rounds(12)[1])[-2])
    proto = loop("n", "true", stop_at=stop, collect=False, n=np.array(trips), true=np.array(True))
    loaded = zenith_onnx.load(proto)
    v, _ = rounds(min(trips, 12), stop)
    for apply in (loaded.apply, jax.jit(loaded.apply)):
        np.testing.assert_allclose(apply(loaded.params, X)[0], v, rtol=1e-4, atol=1e-6)


def test_number_of_the_round_decides_a_shape_where_rounds_are_written_out():
    body = graph(
        [
            node("Identity", ["go"], ["again"]),
            node("Unsqueeze", ["i", "zero"], ["size"]),
            node("ConstantOfShape", ["size"], ["zeros"]),
            node("Concat", ["v", "zeros"], ["next"], axis=0),
        ],
        [info("i", INT, []), info("go", BOOL, []), info("v")],
        [info("again", BOOL, []), "next"],
    )
    proto = model(
        [node("Loop", ["n", "", "x"], ["y"], body=body)], [info("x", FLOAT, [2])], n=np.array(4), zero=np.array([0])
    )
    loaded = zenith_onnx.load(proto)
    (y,) = jax.jit(loaded.apply)(loaded.params, np.ones(2, np.float32))
    np.testing.assert_array_equal(y, [1, 1, 0, 0, 0, 0, 0, 0])


# --- Scan -------------------------------------------------------------------------------------------------------------


def scan(**attributes):
    """A running sum of w-scaled rows, and each row's square."""
    body = graph(
        [
            node("Mul", ["row", "v"], ["scaled"]),
            node("Add", ["state", "scaled"], ["next"]),
            node("Mul", ["row", "row"], ["square"]),
        ],
        [info("state", FLOAT, [4]), info("row", FLOAT, [4])],
        ["next", "square"],
        "body",
    )
    proto = model(
        [node("Scan", ["start", "x"], ["final", "squares"], "scan", body=body, num_scan_inputs=1, **attributes)],
        [info("start", FLOAT, [4]), info("x", FLOAT)],
        ["final", "squares"],
        v=W[0],
    )
    return zenith_onnx.load(proto)


@pytest.mark.parametrize("reverse_in", [0, 1])
@pytest.mark.parametrize("reverse_out", [0, 1])
def test_scan_is_a_scan_with_a_gradient(reverse_in, reverse_out):
    loaded = scan(scan_input_directions=[reverse_in], scan_output_directions=[reverse_out])
    start = np.ones(4, np.float32)
    assert "scan" in primitives(loaded.apply, loaded.params, start, X)
    final, squares = jax.jit(loaded.apply)(loaded.params, start, X)
    np.testing.assert_allclose(final, start + (X * W[0]).sum(0), rtol=1e-5)
    np.testing.assert_allclose(squares, X[::-1] ** 2 if reverse_in != reverse_out else X**2, rtol=1e-6)
    directional(lambda x: sum(o.sum() for o in loaded.apply(loaded.params, start, x)), X)
    of_weight = jax.grad(lambda p: loaded.apply(p, start, X)[0].sum())(loaded.params)["v"]
    np.testing.assert_allclose(of_weight, X.sum(0), rtol=1e-5)


def test_scan_along_other_axes():
    loaded = scan(scan_input_axes=[1], scan_output_axes=[-1])
    start = np.zeros(4, np.float32)
    final, squares = jax.jit(loaded.apply)(loaded.params, start, X.T)
    np.testing.assert_allclose(final, (X * W[0]).sum(0), rtol=1e-5)
    np.testing.assert_allclose(squares, X.T**2, rtol=1e-6)


def test_subgraphs_see_values_around_them_and_shadow_none():
    """A body's own names may be those of values that live on outside."""
    inner = graph([node("Neg", ["x"], ["h"])], outputs=["h"])
    outer = graph([node("Relu", ["x"], ["t"])], outputs=["t"])
    proto = model(
        [
            node("Exp", ["x"], ["h2"]),
            node("If", ["c"], ["z"], then_branch=inner, else_branch=outer),
            node("Add", ["z", "h2"], ["y"]),
        ],
        [info("c", BOOL, []), info("x", FLOAT, [3, 4])],
    )
    loaded = zenith_onnx.load(proto)
    np.testing.assert_allclose(jax.jit(loaded.apply)({}, True, X)[0], -X + np.exp(X), rtol=1e-5)
