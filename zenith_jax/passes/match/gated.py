"""f(gate) * value around an activation that has been found: two arrays, or the halves of one."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp

from zenith_jax.ir._compat import JaxprEqn, Literal, Var
from zenith_jax.ir.graph import Atom, Graph
from zenith_jax.ir.term import Terms, is_float
from zenith_jax.ops.gated import gated_activation, gated_activation_of_halves
from zenith_jax.passes.match._match import Match


def gated(graph: Graph, alone: Match) -> Match:
    """The activation with the product that is its only use; `alone` where there is none."""
    (activated,) = alone.results
    steps: list[JaxprEqn] = []
    var = activated
    while True:
        users = graph.users_of(var)
        if len(users) != 1 or graph.is_output(var):
            return alone
        (user,) = users
        steps.append(user)
        if user.primitive.name == "mul":
            break
        is_cast = user.primitive.name == "convert_element_type" and is_float(user.outvars[0].aval.dtype)
        if not is_cast and user.primitive.name not in ("copy", "copy_p"):
            return alone
        var = user.outvars[0]
    (value,) = (a for a in user.invars if a is not var)
    gate, result = alone.leaves[0], user.outvars[0]
    if isinstance(value, Literal) or value.aval.shape != result.aval.shape or gate.aval.shape != result.aval.shape:
        return alone
    if graph.constant(value) is not None or _is_broadcast(graph, value):
        return alone
    inner = (*alone.inner, *steps)
    if graph.depends_on([value], activated) or graph.escapes(inner, [result]) is not None:
        return alone
    static = dict(name=alone.op, dtype=result.aval.dtype.name)
    leaves: tuple[Atom, ...] = (gate, value)
    halves = _halves(graph, gate, value)
    if halves is not None:
        leaves, static = (halves.x,), {**static, "gate_half": halves.gate_half}
    return dataclasses.replace(
        alone,
        op=f"gated_{alone.op}",
        results=(result,),
        inner=inner,
        leaves=leaves,
        emit=emit if halves is None else emit_of_halves,
        static=tuple(static.items()),
        detail="" if halves is None else "halves of one array",
        case=(("dtype", gate.aval.dtype.name), ("size", result.aval.size), ("halves", halves is not None)),
        simpler=alone,
    )


def _is_broadcast(graph: Graph, value: Var) -> bool:
    """Whether the value is a smaller array that XLA would spread out for us, in memory."""
    terms = Terms(graph)
    whole = terms.of(value)
    return terms.peel(whole).axis_set != whole.axis_set


class _Halves(NamedTuple):
    x: Var
    gate_half: int


def _halves(graph: Graph, gate: Atom, value: Atom) -> _Halves | None:
    """The array of which gate and value are the first and second half along its last axis, or the other way round."""
    first, second = _half(graph, gate), _half(graph, value)
    if first is None or second is None or first[0] is not second[0] or first[1] == second[1]:
        return None
    return _Halves(*first)


def _half(graph: Graph, atom: Atom) -> tuple[Var, int] | None:
    """(x, h) for half h of x along its last axis."""
    eqn = graph.producer(atom)
    if eqn is None or eqn.primitive.name not in ("slice", "split") or not isinstance(eqn.invars[0], Var):
        return None
    x = eqn.invars[0]
    *lead, size = x.aval.shape
    params = eqn.params
    if size % 2:
        return None
    if eqn.primitive.name == "split":
        if params["axis"] != len(lead) or tuple(params["sizes"]) != (size // 2,) * 2:
            return None
        return x, [v is atom for v in eqn.outvars].index(True)
    if params["strides"] is not None and any(s != 1 for s in params["strides"]):
        return None
    starts, limits = tuple(params["start_indices"]), tuple(params["limit_indices"])
    for half in (0, 1):
        at = half * size // 2
        if starts == (*(0 for _ in lead), at) and limits == (*lead, at + size // 2):
            return x, half
    return None


def _wide(dtype: Any, *arrays: Any) -> list[Any]:
    """The arrays in one dtype, wide enough for each of them and for the result."""
    common = jnp.result_type(dtype, *arrays)
    return [a.astype(common) for a in arrays]


def emit(gate: Any, value: Any, *, name: str, dtype: str):
    gate, value = _wide(dtype, gate, value)
    return (gated_activation(gate, value, activation=name).astype(dtype),)


def emit_of_halves(x: Any, *, name: str, dtype: str, gate_half: int):
    (x,) = _wide(dtype, x)
    return (gated_activation_of_halves(x, activation=name, gate_half=gate_half).astype(dtype),)
