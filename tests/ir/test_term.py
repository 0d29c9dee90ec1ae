"""Terms: values with named axes. Views rename axes; what changes values is not walked through."""

from __future__ import annotations

import jax.numpy as jnp
import pytest
from jax import lax, make_jaxpr

from zenith_jax.ir.graph import Graph
from zenith_jax.ir.term import Terms

A, B, C = 2, 3, 4


def peeled(function, shape=(A, B, C), dtype=jnp.float32):
    """(names of the axes of the peeled result on the input's dimensions, whether it reached the input)."""
    graph = Graph.of(make_jaxpr(function)(jnp.ones(shape, dtype)))
    terms = Terms(graph)
    out = graph.outvars[0]
    term = terms.of(out, "ijklmn"[: out.aval.ndim])
    below = terms.peel(term)
    return "".join(a.name if a is not None else "-" for a in below.axes), below.atom is graph.invars[0]


@pytest.mark.parametrize(
    "function, axes",
    [
        (lambda x: x.transpose(2, 0, 1), "jki"),
        (lambda x: x[:, None].transpose(1, 3, 0, 2), "klj"),
        (lambda x: jnp.broadcast_to(x, (5, A, B, C)), "jkl"),
        (lambda x: x.reshape(A, 1, B, 1, C), "ikm"),
        (lambda x: x.astype(jnp.bfloat16).swapaxes(0, 1), "jik"),
        (lambda x: x * 1.0 + 0.0, "ijk"),
        (lambda x: (x - 0.0) / 1.0, "ijk"),
        (lambda x: jnp.where(jnp.full(x.shape, 3) > 2, x, 0.0), "ijk"),
    ],
    ids=["transpose", "unit", "broadcast", "reshape", "cast", "neutral", "neutral right", "constant select"],
)
def test_views_rename_axes(function, axes):
    assert peeled(function) == (axes, True)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.reshape(B, A, C),
        lambda x: x.reshape(A * B, C),
        lambda x: x * 2.0,
        lambda x: 0.0 - x,
        lambda x: 1.0 / x,
        lambda x: x.astype(jnp.float8_e4m3fn).astype(jnp.float32),
        lambda x: x.astype(jnp.int32).astype(jnp.float32),
        lambda x: x[::-1],
        lambda x: lax.stop_gradient(x),
    ],
    ids=["mixing reshape", "merging reshape", "scale", "0 - x", "1 / x", "8 bits", "integer", "reverse", "stopped"],
)
def test_other_operations_are_not_views(function):
    assert not peeled(function)[1]


def test_sizes_of_one_have_no_axis():
    assert peeled(lambda x: x.transpose(1, 0, 2), (1, B, C)) == ("-ik", True)


def test_product_collects_constants_and_factors():
    graph = Graph.of(make_jaxpr(lambda x, y, z: -2.0 * x / y * (z / 4.0))(1.0, 2.0, 3.0))
    terms = Terms(graph)
    product = terms.product(terms.of(graph.outvars[0]))
    assert product.coefficient == -0.5
    found = {(graph.invars.index(t.atom), exponent) for t, exponent in product.factors}
    assert found == {(0, 1), (1, -1), (2, 1)}


def test_product_ends_at_a_value_that_is_used_twice():
    def function(x, y):
        shared = x * y
        return shared * jnp.tanh(shared)

    graph = Graph.of(make_jaxpr(function)(1.0, 2.0))
    terms = Terms(graph)
    assert len(terms.product(terms.of(graph.outvars[0])).factors) == 2
