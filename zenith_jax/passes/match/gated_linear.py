"""f(x @ w_gate) * (x @ w_value), read upwards from the gate's product.

The gated activation is `activation`'s and `gated`'s; here its gate and its value are followed down to two products of
one x, by weights of one shape and layout. Between them are only casts, each value used by the next step alone. A bias
behind either product, or one product of which both are halves, is no such site: the gated activation is one then.
"""

from __future__ import annotations

import math

import jax.numpy as jnp

from zenith_jax.ir._compat import JaxprEqn, Var
from zenith_jax.ir.graph import Graph
from zenith_jax.ir.term import Terms
from zenith_jax.ops.gated_linear import gated_linear
from zenith_jax.passes.match import activation as activations
from zenith_jax.passes.match import linear
from zenith_jax.passes.match._match import CASTS, Match


def match(graph: Graph, eqn: JaxprEqn) -> Match | None:
    """`eqn` is the gate's product."""
    if eqn.primitive.name != "dot_general" or eqn.invars[0].aval.dtype not in (jnp.bfloat16, jnp.float16):
        return None
    terms = Terms(graph)
    gate = linear.product(terms, eqn)
    if gate is None or linear.is_computed_again(graph, gate.product):
        return None
    gate = linear.viewed(terms, gate, reshapes=False)
    for anchor in linear.anchors(graph, gate.top):
        gated = activations.match(graph, anchor)
        if not isinstance(gated, Match) or not gated.op.startswith("gated_") or len(gated.leaves) != 2:
            continue
        if not linear.is_of(graph, gated.leaves[0], gate):
            continue
        value = _value(terms, gated.leaves[1], gate)
        return None if value is None else _build(graph, gated, gate, value)
    return None


def _value(terms: Terms, leaf, gate: linear.Layer) -> linear.Layer | None:
    """The product below the casts of the leaf, if it differs from the gate's in its weights alone."""
    eqn = terms.graph.producer(leaf)
    while eqn is not None and eqn.primitive.name in CASTS:
        eqn = terms.graph.producer(eqn.invars[0])
    if eqn is None or eqn.primitive.name != "dot_general":
        return None
    value = linear.product(terms, eqn)
    if value is None or value.product is gate.product or linear.is_computed_again(terms.graph, value.product):
        return None
    numbers = terms.graph.numbers
    same = numbers.get(value.x, value.x) is numbers.get(gate.x, gate.x) and value.transposed == gate.transposed
    if not same or value.w.aval.shape != gate.w.aval.shape or value.contracted != gate.contracted:
        return None
    value = linear.viewed(terms, value, reshapes=False)
    return value if linear.is_of(terms.graph, leaf, value) else None


def _build(graph: Graph, gated: Match, gate: linear.Layer, value: linear.Layer) -> Match | None:
    (result,) = gated.results
    inner = {id(e): e for e in (*gate.inner, *value.inner, *gated.inner)}
    dtype = gate.x.aval.dtype
    if result.aval.dtype != dtype:
        user = graph.only_user(result)
        if user is None or user.primitive.name != "convert_element_type" or user.outvars[0].aval.dtype != dtype:
            return None
        inner[id(user)] = user
        result = user.outvars[0]
    if graph.escapes(tuple(inner.values()), [result]) is not None:
        return None
    root = graph.producer(result)
    assert root is not None and isinstance(result, Var)
    name = gated.op.removeprefix("gated_")
    rows, features = (math.prod(a.size for a in axes if a is not None) for axes in (gate.rows, gate.features))
    return Match(
        op="gated_linear",
        root=root,
        results=(result,),
        inner=tuple(inner.values()),
        leaves=(gate.x, gate.w, value.w),
        emit=emit,
        static=(("activation", name), ("transposed", gate.transposed), ("features", len(gate.features))),
        detail=name,
        case=(
            ("dtype", dtype.name),
            ("rows", rows),
            ("k", gate.contracted),
            ("n", features),
            ("activation", name),
        ),
        yields=True,
    )


def emit(x, w_gate, w_value, *, activation: str, transposed: bool, features: int):
    """`features`: the number of dimensions of the weights that are not contracted."""
    contracted = w_gate.ndim - features
    batch, shape = x.shape[: x.ndim - contracted], linear.features_of(w_gate, features, transposed)
    k, n = math.prod(x.shape[x.ndim - contracted :]), math.prod(shape)
    weights = (w.reshape((n, k) if transposed else (k, n)) for w in (w_gate, w_value))
    y = gated_linear(x.reshape(*batch, k), *weights, activation=activation, transposed=transposed)
    return (y.reshape(*batch, *shape),)
