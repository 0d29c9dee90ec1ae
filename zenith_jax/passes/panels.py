"""Weights of linear layers in panels, made of parameters alone: once for all calls, as `known.py` then splits it off.

    linear(x, w)  ->  linear(x, panels(w)),  for the CPU's kernel

A panel is what the kernel reads from one end to the other; weights as they lie it gathers first, in each call. us of
the kernel, (k, n) / (n, k) / panels: one row of 384 x 1536 87 / 116 / 47, of 1536 x 384 64 / 93 / 42; 32 rows 239 / 242
/ 201 and 316 / 254 / 204; 128 rows 748 / 774 / 745 and 888 / 779 / 735; 512 rows as fast (AMD EPYC, AVX-512, two cores,
weights from memory, 2026-11-26).
"""

from __future__ import annotations

import functools as ft
from typing import Any

import jax

from zenith_jax.ir import _compat
from zenith_jax.ir._compat import JaxprEqn
from zenith_jax.ir.emit import emitted
from zenith_jax.ir.graph import Graph
from zenith_jax.ops.linear import PANEL, in_panels, linear_fwd


def with_panels(jaxpr: Any, count: int, platform: str) -> Any:
    """The closed jaxpr, whose first `count` inputs are parameters, with panels where weights are made of these."""
    if platform != "cpu" or _compat.is_high(jaxpr):
        return jaxpr
    graph = Graph.of(jaxpr)
    known = graph.made_of(graph.invars[:count])
    replacements = {
        index: _replaced(eqn)
        for index, eqn in enumerate(graph.eqns)
        if eqn.params.get("kernel") is linear_fwd and known.get(eqn.invars[1]) and _has_panels(eqn)
    }
    return graph.rewritten(replacements) if replacements else jaxpr


def _has_panels(eqn: JaxprEqn) -> bool:
    bias = eqn.invars[2].aval
    return dict(eqn.params["attributes"])["layout"] != "panels" and bias.shape[0] % PANEL == 0


def _replaced(eqn: JaxprEqn) -> list[JaxprEqn]:
    x, w, *more = eqn.invars
    attributes = dict(eqn.params["attributes"])
    traced = _traced(w.aval.size, w.aval.dtype, x.aval.shape[-1], attributes["layout"])
    panels = _compat.new_var(_compat.opened(traced).outvars[0].aval)
    eqns, _, _ = emitted(traced, [w], [panels], eqn.source_info)
    params = {**eqn.params, "attributes": tuple(sorted({**attributes, "layout": "panels"}.items()))}
    return [*eqns, eqn.replace(invars=[x, panels, *more], params=params)]


@ft.lru_cache(maxsize=1024)
def _traced(size: int, dtype: Any, k: int, layout: str) -> Any:
    function = ft.partial(in_panels, k=k, layout=layout)
    return jax.make_jaxpr(function)(jax.ShapeDtypeStruct((size,), dtype))
