"""Products that share an operand and feed kernels, kept apart on a GPU.

Of x @ wq, x @ wk and x @ wv XLA makes one product by [wq wk wv], whose columns stay in its loops around. A kernel takes
whole arrays: the three parts are then cut out again, and their biases are added there, a pass of memory for each, where
a product alone adds its bias as it stores. An optimization barrier with one result for each product hides that they
share x. BERT-base, b32 s512 float16: 8.45 -> 7.94 ms; a step of GPT-2 124M, b8 s1024 bfloat16: 19.49 -> 19.10 (H100,
jax 0.11.2, 2026-11-26).
"""

from __future__ import annotations

import functools as ft
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from zenith_jax.ir import _compat
from zenith_jax.ir._compat import JaxprEqn, Var
from zenith_jax.ir.graph import VIEWS, Graph
from zenith_jax.passes.match import Match

# Smaller products are launches more than work, and better merged. Not measured between 0.2 and 12 MB.
LEAST_BYTES = 4 << 20
# What may stand between a product and a kernel: views, a bias, a scale.
_BETWEEN = VIEWS | {"add", "mul"}


def kept_apart(graph: Graph, plan: Sequence[Match]) -> dict[int, list[JaxprEqn]]:
    """{index of a product: its equation on a result of a barrier}, the barrier before the first of those that share."""
    claimed = {id(e) for match in plan for e in match.inner}
    groups: dict[Any, dict[int, int]] = {}
    for match in plan:
        for leaf in match.leaves:
            eqn = _product_below(graph, leaf)
            if eqn is None or id(eqn) in claimed:
                continue
            for side, atom in enumerate(eqn.invars):
                if isinstance(atom, Var):
                    key = (graph.numbers.get(atom, atom), side, tuple(eqn.params["dimension_numbers"][0][side]))
                    groups.setdefault(key, {})[graph.producers[eqn.outvars[0]]] = side
    replacements: dict[int, list[JaxprEqn]] = {}
    for group in groups.values():
        if len(group) < 2 or any(index in replacements for index in group):
            continue
        first = min(group)
        shared = graph.eqns[first].invars[group[first]]
        barrier = _barrier(shared, len(group))
        for (index, side), result in zip(sorted(group.items()), barrier.outvars, strict=True):
            eqn = graph.eqns[index]
            invars = [result if i == side else atom for i, atom in enumerate(eqn.invars)]
            replacements[index] = [eqn.replace(invars=invars)]
        replacements[first].insert(0, barrier.replace(source_info=graph.eqns[first].source_info))
    return replacements


def _product_below(graph: Graph, atom: Any) -> JaxprEqn | None:
    """The large product that `atom` is, but for views, a bias and a scale."""
    size = atom.aval.size if hasattr(atom.aval, "size") else 0
    while (eqn := graph.producer(atom)) is not None:
        name = eqn.primitive.name
        if name == "dot_general":
            out = eqn.outvars[0].aval
            return eqn if out.size * jnp.dtype(out.dtype).itemsize >= LEAST_BYTES else None
        whole = [a for a in eqn.invars if getattr(a.aval, "size", 0) == size]
        if name not in _BETWEEN or not whole:
            return None
        atom = whole[0]
    return None


def _barrier(shared: Any, count: int) -> JaxprEqn:
    jaxpr = _compat.opened(_traced(_compat.struct(shared.aval), count))
    (eqn,) = jaxpr.eqns
    return eqn.replace(invars=[shared] * count, outvars=[_compat.new_var(v.aval) for v in eqn.outvars])


@ft.lru_cache(maxsize=256)
def _traced(struct: jax.ShapeDtypeStruct, count: int) -> Any:
    return jax.make_jaxpr(lambda x: jax.lax.optimization_barrier((x,) * count))(struct)
