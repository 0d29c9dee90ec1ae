"""Dimensions of a site's operands that must be whole on every device, and which of them are sharded.

A kernel is independent over its batch dimensions, which may stay sharded. All others of an operand must be whole: XLA's
partitioner gathers them where they are not. They are read off the kernels' signatures, through the views between the
site's operands and the kernels'.
"""

from __future__ import annotations

import functools as ft
from collections.abc import Mapping, Sequence
from typing import Any

from zenith_jax.ir import _compat
from zenith_jax.ir._compat import Var
from zenith_jax.ir.graph import Graph
from zenith_jax.ir.term import Term, Terms
from zenith_jax.ops._op import call_p
from zenith_jax.passes.match import Match

Dims = frozenset[int]
Spec = tuple[Any, ...]  # of a NamedSharding: the mesh axes of each dimension


@ft.lru_cache(maxsize=4096)
def whole_dims(jaxpr: Any) -> tuple[Dims, ...]:
    """For each argument of an op's trace, dimensions that its kernels need whole."""
    graph = Graph.of(jaxpr)
    found: dict[Var, set[int]] = {v: set() for v in graph.invars}
    for eqn in graph.eqns:
        if eqn.primitive is not call_p or not eqn.params["kernel"].partitioned:
            continue
        signature = eqn.params["kernel"].signature
        rank = signature.batch_rank([a.aval.shape for a in eqn.invars])
        for spec, operand in zip(signature.operands, eqn.invars, strict=True):
            terms = Terms(graph)
            term = terms.of(operand)
            below = terms.peel(term, also=("reshape",))
            if isinstance(below.atom, Var) and below.atom in found:
                inner = term.axes[rank if spec.batched else 0 :]
                whole = terms.split(Term(operand, inner)).axis_set
                parts = [terms.split(Term(below.atom, (axis,))).axis_set for axis in below.axes]
                found[below.atom].update(d for d, axes in enumerate(parts) if axes & whole)
    return tuple(frozenset(found[v]) for v in graph.invars)


def described(match: Match, dims: Sequence[Dims]) -> str:
    """Operands with the sizes of their whole dimensions, and a dot for the others."""
    return ", ".join(
        f"{leaf.aval.dtype.name}[{','.join(str(n) if d in whole else '.' for d, n in enumerate(leaf.aval.shape))}]"
        for leaf, whole in zip(match.leaves, dims, strict=True)
        if whole
    )


def gathered(graph: Graph, match: Match, dims: Sequence[Dims], known: Mapping[Var, Spec]) -> str:
    """What the partitioner gathers, as far as shardings are known: by explicit mesh axes, or of the program's arguments
    by `known`."""
    lines = []
    for leaf, whole in zip(match.leaves, dims, strict=True):
        spec = _spec(graph, leaf, known)
        shape = ",".join(map(str, leaf.aval.shape))
        lines += [
            f"dimension {d} of {leaf.aval.dtype.name}[{shape}] is sharded over {axes!r} and must be whole: "
            f"the partitioner gathers it"
            for d, axes in enumerate(spec)
            if d in whole and axes is not None
        ]
    return "; ".join(dict.fromkeys(lines))


def _spec(graph: Graph, leaf: Any, known: Mapping[Var, Spec]) -> Spec:
    spec = _compat.explicit_spec(leaf.aval)
    if any(axes is not None for axes in spec) or not isinstance(leaf, Var) or not known:
        return spec
    terms = Terms(graph)
    term = terms.of(leaf)
    below = terms.peel(term)
    if not isinstance(below.atom, Var) or below.atom not in known:
        return spec
    of_axis = dict(zip(below.axes, known[below.atom], strict=False))
    return tuple(of_axis.get(axis) if axis is not None else None for axis in term.axes)
