"""Graph: inlining, dead code, value numbers, constants, escapes, rewriting."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from zenith_jax.ir.graph import Graph


def graph_of(function, *args):
    return Graph.of(jax.make_jaxpr(function)(*args))


def names(graph):
    return [e.primitive.name for e in graph.eqns]


def test_nested_jits_are_inlined_and_dead_code_is_dropped():
    inner = jax.jit(lambda x: (jnp.sin(x), jnp.cos(x)))
    assert names(graph_of(lambda x: jax.jit(lambda y: inner(y)[0])(x), 1.0)) == ["sin"]


def test_jit_with_shardings_stays_closed():
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    function = jax.jit(jnp.sin, out_shardings=sharding)
    assert "sin" not in names(graph_of(lambda x: function(x), 1.0))


def test_one_body_inlined_twice_has_variables_of_its_own():
    inner = jax.jit(jnp.sin)
    graph = graph_of(lambda x: inner(inner(x)), 1.0)
    assert names(graph) == ["sin", "sin"]
    assert graph.eqns[0].outvars[0] is not graph.eqns[1].outvars[0]
    assert graph.eqns[1].invars[0] is graph.eqns[0].outvars[0]


def test_second_computation_is_the_same_value_and_stays():
    graph = graph_of(lambda x, y: (jnp.sin(x + 1.0) * 2, jnp.sin(x + 1.0) * y, jnp.sin(x + 2.0)), 1.0, 2.0)
    first, second, third = (e.outvars[0] for e in graph.eqns if e.primitive.name == "sin")
    assert graph.same(first, second)
    assert not graph.same(first, third)


def test_negative_zero_is_another_literal_than_zero():
    graph = graph_of(lambda x: (x * 0.0, x * -0.0), 1.0)
    assert not graph.same(*graph.outvars)


def test_effects_keep_dead_equations():
    def function(x):
        jax.debug.callback(lambda v: None, jnp.sin(x))
        return x

    assert names(graph_of(function, 1.0)) == ["sin", "debug_callback"]


@pytest.mark.parametrize(
    "function, expected",
    [
        (lambda: jnp.sqrt(jnp.full((3, 4), 16.0)), 4.0),
        (lambda: lax.div(jnp.int32(-7) + jnp.zeros((2,), jnp.int32), jnp.int32(2)), -3),
        (lambda: jnp.where(jnp.full((2,), 3) > 2, 5.0, 6.0), 5.0),
        (lambda: jnp.full((2,), 1e30, jnp.float32) * 1e30, np.inf),
        (lambda: jnp.full((2,), 1.0, jnp.bfloat16) / 3, float(jnp.bfloat16(1) / jnp.bfloat16(3))),
    ],
    ids=["sqrt", "integer division rounds to zero", "select", "overflow", "bfloat16"],
)
def test_constants_are_folded_as_xla_computes_them(function, expected):
    graph = graph_of(lambda: lax.optimization_barrier(function()))
    assert float(graph.constant(graph.eqns[-1].invars[0])) == expected


def test_values_of_closed_over_arrays_are_known_and_tracers_are_not():
    scalar, array = np.float32(3.0), jnp.arange(5)
    graph = graph_of(lambda x: x * jnp.asarray(scalar) + array, jnp.ones(5))
    assert any(graph.array(v) is not None and np.array_equal(graph.array(v), np.arange(5)) for v in graph.constvars)

    def outer(y):
        inner = graph_of(lambda x: x + y, jnp.ones(5))
        assert all(inner.array(v) is None for v in inner.constvars)
        return y

    jax.make_jaxpr(outer)(jnp.ones(5))


def escapes(function, *args, last):
    """What escapes of everything up to the equation `last`, with its result kept."""
    graph = graph_of(function, *args)
    index = max(i for i, e in enumerate(graph.eqns) if e.primitive.name == last)
    return graph.escapes(graph.eqns[: index + 1], [graph.eqns[index].outvars[0]])


def test_value_used_outside_escapes():
    def function(x):
        y = jnp.sin(x)
        return lax.tanh(y) + 1.0, y

    assert escapes(lambda x: lax.tanh(jnp.sin(x)) + 1.0, 1.0, last="tanh") is None
    assert escapes(function, 1.0, last="tanh") is not None


def test_value_that_the_program_computes_again_does_not_escape():
    graph = graph_of(lambda x: (lax.tanh(jnp.sin(x)), jnp.cos(jnp.sin(x))), 1.0)
    tanh = next(e for e in graph.eqns if e.primitive.name == "tanh")
    inner = [graph.producer(tanh.invars[0]), tanh]
    assert graph.escapes(inner, [tanh.outvars[0]]) is None


def test_rewritten_program_is_ordered_and_without_duplicates():
    graph = graph_of(lambda x, y: jnp.sin(x) * jnp.cos(jnp.sin(x)) + y, 1.0, 2.0)
    sin = next(i for i, e in enumerate(graph.eqns) if e.primitive.name == "sin")
    add = len(graph.eqns) - 1
    moved = graph.rewritten({sin: [], add: [graph.eqns[add], graph.eqns[sin]]})
    jax.extend.core.jaxpr_as_fun(moved)  # a valid order
    assert [e.primitive.name for e in getattr(moved, "jaxpr", moved).eqns] == ["sin", "cos", "mul", "add"]


def test_cycle_made_by_a_rewrite_is_an_error():
    graph = graph_of(lambda x: jnp.cos(jnp.sin(x)), 1.0)
    sin, cos = graph.eqns
    with pytest.raises(AssertionError, match="cycle"):
        graph.rewritten({0: [sin.replace(invars=list(cos.outvars))]})
