"""What a program computes from its parameters alone, apart: computed once where the parameters are known.

    f(params, inputs)  ->  values = prepare(params);  program(values, params that are still read, inputs)

Filters brought into another order, batch norms folded into them, casts to a narrower dtype. Not what XLA has for
nothing, a view, or the transpose of a matrix that only products read; and nothing larger than the parameters that it is
made of, such as a broadcast bias or a dequantised weight: reading it would cost more than computing it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.extend.core as jec
import numpy as np

from zenith_jax.ir import _compat
from zenith_jax.ir._compat import JaxprEqn, Var
from zenith_jax.ir.graph import VIEWS, Graph

_SMALL_BYTES = 4096  # up to here a value may be larger than what it is made of
# Rows up to which a product on the CPU is slower with the transpose of a matrix: 49 x 2048 x 512 1.32 ms against 1.06,
# 196 x 1024 x 256 1.09 against 1.10, 784 x 512 x 128 1.23 against 1.31; one row makes XLA write the transpose (two
# cores, jax 0.10.2, 2026-11-26).
_FEW_ROWS = 128


@dataclasses.dataclass(frozen=True)
class Split:
    """prepare(*params) -> the values; program(*values, *(params[i] for i in kept), *inputs) -> outputs, both flat.

    made_of: for each value the numbers of the parameters that it depends on. kept: of those that the program reads.
    """

    prepare: Callable[..., Sequence[Any]]
    program: Callable[..., Sequence[Any]]
    made_of: tuple[tuple[int, ...], ...]
    kept: tuple[int, ...]


def split(jaxpr: Any, count: int, platform: str) -> Split | None:
    """Of a closed jaxpr whose first `count` inputs are parameters; None where nothing is worth it."""
    if _compat.is_high(jaxpr):
        return None
    graph = Graph.of(jaxpr)
    params, inputs = graph.invars[:count], graph.invars[count:]
    origins = graph.made_of(params)
    values = [v for v in origins if v in graph.producers and _is_wanted(graph, v, origins, platform)]
    if not values:
        return None
    program, needed = _cone(graph, [a for a in graph.outvars if isinstance(a, Var)], set(values))
    values = [v for v in values if v in needed]
    prepare, _ = _cone(graph, values, set())
    kept = [i for i, v in enumerate(params) if v in needed]
    made = lambda invars, eqns, outvars: jec.jaxpr_as_fun(  # noqa: E731
        _compat.closed(_compat.rebuilt(jaxpr, eqns, outvars, graph.constvars, graph.consts, invars))
    )
    return Split(
        prepare=made(params, prepare, values),
        program=made([*values, *(params[i] for i in kept), *inputs], program, graph.outvars),
        made_of=tuple(tuple(i for i, p in enumerate(params) if p in origins[v]) for v in values),
        kept=tuple(kept),
    )


def _is_wanted(graph: Graph, value: Var, origins: dict[Var, frozenset[Var]], platform: str) -> bool:
    """Whether it is where what is known ends, made of parameters, not larger than they are, and not for nothing."""
    users = graph.users_of(value)
    is_border = graph.is_output(value) or any(v not in origins for e in users for v in e.outvars)
    if not is_border or not origins[value] or not hasattr(value.aval, "dtype"):
        return False
    size_bytes = value.aval.size * value.aval.dtype.itemsize
    if size_bytes > max(sum(v.aval.size * v.aval.dtype.itemsize for v in origins[value]), _SMALL_BYTES):
        return False
    costly = [e for e in _cone(graph, [value], set())[0] if not _is_view(e)]
    is_transpose = len(costly) == 1 and costly[0].primitive.name == "transpose" and costly[0].outvars[0] is value
    if is_transpose and value.aval.ndim == 2 and not graph.is_output(value):
        return not all(e.primitive.name == "dot_general" and _is_ready(e, value, platform) for e in users)
    return bool(costly)


def _is_ready(product: JaxprEqn, matrix: Var, platform: str) -> bool:
    """Whether the product is as fast with the transpose of the matrix."""
    contracted, _ = product.params["dimension_numbers"]
    if platform == "cuda":  # what `products.py` has transposed is not: TensorFloat-32 is fastest along the last axis
        is_tf32 = matrix.aval.dtype == np.float32 and _compat.is_default_precision(product)
        return not (is_tf32 and product.invars[1] is matrix and tuple(contracted[1]) == (1,))
    if platform != "cpu":
        return True
    other = product.invars[1 if product.invars[0] is matrix else 0].aval
    terms = math.prod(product.invars[0].aval.shape[d] for d in contracted[0])
    return other.size > _FEW_ROWS * terms


def _is_view(eqn: JaxprEqn) -> bool:
    if eqn.primitive.name == "convert_element_type":
        return eqn.outvars[0].aval.dtype.itemsize >= eqn.invars[0].aval.dtype.itemsize
    return eqn.primitive.name in VIEWS and eqn.primitive.name != "transpose"


def _cone(graph: Graph, results: Sequence[Var], given: set[Var]) -> tuple[list[JaxprEqn], set[Var]]:
    """The equations that compute `results`, in their order, and all values that they and the results are; `given` ones
    are not computed."""
    needed: set[Var] = set()
    indices: set[int] = set()
    pending = list(results)
    while pending:
        value = pending.pop()
        if value in needed:
            continue
        needed.add(value)
        index = graph.producers.get(value)
        if index is not None and value not in given and index not in indices:
            indices.add(index)
            pending += [a for a in graph.eqns[index].invars if isinstance(a, Var)]
    return [graph.eqns[i] for i in sorted(indices)], needed
