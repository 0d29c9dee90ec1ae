"""Which parameters of a program are the matrices of dense layers, and which of their dimensions a layer sums over.

Such a parameter reaches products with what depends on the inputs, through views and casts, and nothing else. What
changes its numbers little, and alike for all that is summed, changes the layer's results little: `compiled/int8.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

from zenith_jax.errors import Refusal, refuse
from zenith_jax.ir._compat import JaxprEqn, Var
from zenith_jax.ir.graph import Graph
from zenith_jax.ir.term import Term, Terms

Summed = tuple[int, ...]  # dimensions


def dense(graph: Graph, count: int) -> list[Summed | Refusal]:
    """For each of the first `count` inputs the dimensions that its layer sums over, or why it is no such matrix."""
    params = graph.invars[:count]
    changing = _depending(graph, graph.invars[count:])
    products: dict[Var, list[tuple[Summed | Refusal, list[JaxprEqn]]]] = {}
    for eqn in graph.eqns:
        if eqn.primitive.name != "dot_general":
            continue
        for side in (0, 1):
            path: list[JaxprEqn] = []
            weight, summed = _operand(graph, eqn, side, path)
            if weight is not None and weight in params:
                if eqn.invars[1 - side] not in changing:
                    summed = refuse("it is multiplied with another parameter")
                products.setdefault(weight, []).append((summed, [*path, eqn]))
    return [_summed(graph, p, products.get(p, [])) for p in params]


def _depending(graph: Graph, inputs: Sequence[Var]) -> set[Var]:
    """All values that depend on these."""
    found = set(inputs)
    for eqn in graph.eqns:
        if any(isinstance(a, Var) and a in found for a in eqn.invars):
            found.update(eqn.outvars)
    return found


def _operand(graph: Graph, eqn: JaxprEqn, side: int, path: list[JaxprEqn]) -> tuple[Var | None, Summed | Refusal]:
    """What operand number `side` of a product is a view of, and the dimensions of that which the product sums over."""
    terms = Terms(graph)
    *operands, contracted = terms.contracted(terms.of(eqn.outvars[0]), eqn)
    weight = terms.peel(operands[side], path, ("reshape",))
    if not isinstance(weight.atom, Var):
        return None, ()
    if eqn.params["dimension_numbers"][1][side]:
        return weight.atom, refuse("its product is one of a batch of products")
    parts = {axis for k in contracted for axis in terms.split(Term(weight.atom, (k,))).axes}
    summed = []
    for d, axis in enumerate(weight.axes):
        inside = [p in parts for p in terms.split(Term(weight.atom, (axis,))).axes] if axis is not None else [False]
        if any(inside) and not all(inside):
            return weight.atom, refuse("a dimension of it is partly summed over and partly not")
        if all(inside):
            summed.append(d)
    if not summed:
        return weight.atom, refuse("its product sums over none of its dimensions")
    return weight.atom, tuple(summed)


def _summed(graph: Graph, param: Var, products: Sequence[tuple[Summed | Refusal, list[JaxprEqn]]]) -> Summed | Refusal:
    walked = {id(e): e for _, path in products for e in path}
    values = [param, *(v for e in walked.values() if e.primitive.name != "dot_general" for v in e.outvars)]
    for value in values:
        if graph.is_output(value):
            return refuse("it is a result")
        for user in graph.users_of(value):
            if id(user) not in walked:
                return refuse("it is read by {what}, which is no product of a dense layer", what=user.primitive.name)
    if not products:
        return refuse("nothing reads it")
    found = [summed for summed, _ in products]
    refused = [s for s in found if isinstance(s, Refusal)]
    if refused:
        return refused[0]
    if any(f != found[0] for f in found):
        return refuse("products sum over different dimensions of it")
    return found[0]
