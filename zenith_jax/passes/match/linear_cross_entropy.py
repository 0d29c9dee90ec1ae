"""The linear layer in front of a cross entropy, and the number that its losses are summed into.

    logits = x @ w (+ bias), through slices, transposes and reshapes of tokens;    S = tail(rows' values)

The layer is read downwards from the logits. The tail is read upwards from the rows' values to the last single number
that all of them end in. It must be affine in them, apart from squares of lse (a z-loss), so that S's gradient in them
is known when the forward pass runs (ops/linear_cross_entropy.py). Without such a tail the rows' values are computed.
"""

from __future__ import annotations

import dataclasses
import heapq
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from zenith_jax.errors import Refusal, refuse
from zenith_jax.ir import _compat
from zenith_jax.ir._compat import JaxprEqn, Literal, Var
from zenith_jax.ir.graph import Atom, Graph
from zenith_jax.ir.term import Term, Terms, is_float
from zenith_jax.ops.linear_cross_entropy import Layer, Plan, chunks_of, reduced, rows_of_layer
from zenith_jax.passes.match._match import Match, Order, arranged, is_wider, order_of
from zenith_jax.passes.match.rows import LSE, Rows

_MAX_TAIL = 128  # equations between the rows' values and the number they end in


def with_layer(terms: Terms, alone: Match, class_dim: int) -> Match:
    """The match of a cross entropy with its linear layer, if it has one; else, and where that is declined, `alone`."""
    graph = terms.graph
    logits, labels = alone.leaves
    layer = _layer_below(terms, logits, class_dim)
    if layer is None:
        return alone
    if isinstance(layer, Refusal):
        return _noted(alone, layer)
    static = dict(alone.static)
    tail = _tail_above(graph, alone.results, static["rows"])
    inner = (*layer.inner, *_again(graph, layer.inner), *alone.inner, *(tail.eqns if tail is not None else ()))
    inner = tuple({id(e): e for e in inner}.values())
    results = alone.results if tail is None else (tail.out,)
    escaped = graph.escapes(inner, results)
    if escaped is not None:
        return _noted(alone, refuse("its logits ({aval}) are used elsewhere too", aval=escaped.aval))
    features = layer.w.aval.shape[layer.form.contracting]
    classes = layer.form.classes(layer.w.aval)
    return dataclasses.replace(
        alone,
        op="linear_cross_entropy",
        results=results,
        inner=inner,
        leaves=(layer.x, layer.w, labels, *layer.bias, *(tail.extras if tail is not None else ())),
        emit=emit,
        static=(
            *alone.static,
            ("form", layer.form),
            ("steps", layer.steps),
            ("bias_order", layer.bias_order),
            ("tail", tail),
        ),
        detail=f"{features} features, rows of {classes}, " + ("each" if tail is None else "summed"),
        case=(
            ("dtype", layer.form.compute),
            ("cols", classes),
            ("size", logits.aval.size),
            ("features", features),
            ("tokens", logits.aval.size // classes),
            ("summed", tail is not None),
        ),
        simpler=alone,
        # Logits are made whole, so the classes of w and bias are.
        whole=(
            frozenset(),
            frozenset({1 - layer.form.contracting}),
            frozenset(),
            *(frozenset(d for d in layer.bias_order if d >= 0) for _ in layer.bias),
            *(frozenset() for _ in (tail.extras if tail is not None else ())),
        ),
    )


def _again(graph: Graph, eqns: Sequence[JaxprEqn]) -> list[JaxprEqn]:
    """Second computations of the same values, which XLA would make one: a use of theirs is a use of the logits."""
    own = {v for e in eqns for v in e.outvars}
    numbers = {graph.numbers.get(v, v) for v in own}
    again = [v for v in (*numbers, *graph.numbers) if v not in own and graph.numbers.get(v, v) in numbers]
    return [e for v in again if (e := graph.producer(v)) is not None]


def _noted(match: Match, refusal: Refusal) -> Match:
    """The reason why the layer is left out, in the match's detail."""
    return dataclasses.replace(match, detail=f"{match.detail}; the linear layer stays apart: {refusal}")


# --- the layer, downwards ---------------------------------------------------------------------------------------------

Step = tuple[
    str, int, tuple[int, ...], tuple[int, ...]
]  # kind, dimension of classes in the result, two lists of numbers


@dataclasses.dataclass(frozen=True)
class _LayerBelow:
    """steps: what makes the logits' tokens of the product's, to be done to x, the first one first."""

    x: Atom
    w: Atom
    bias: tuple[Atom, ...]  # one or none
    bias_order: Order
    form: Layer
    steps: tuple[Step, ...]
    inner: tuple[JaxprEqn, ...]


def _layer_below(terms: Terms, logits: Atom, class_dim: int) -> _LayerBelow | Refusal | None:
    graph = terms.graph
    atom, dim = logits, class_dim
    classes = logits.aval.shape[class_dim]
    dtype = logits.aval.dtype
    steps: list[Step] = []
    inner: list[JaxprEqn] = []
    bias: Term | None = None
    while (eqn := graph.producer(atom)) is not None:
        inner.append(eqn)
        name, operand = eqn.primitive.name, eqn.invars[0]
        if name == "dot_general":
            found = _product(terms, eqn, dim)
            if found is None:
                return None
            x, w, contracting, first = found
            form = Layer(contracting, x.aval.dtype.name, dtype.name, eqn.params["precision"])
            axes = () if bias is None else tuple(a for a in bias.axes if a is not None)
            order = (() if bias is None else order_of(bias, axes)) or ()
            return _LayerBelow(
                x, w, () if bias is None else (bias.atom,), order, form, (first, *reversed(steps)), tuple(inner)
            )
        if isinstance(operand, Literal):
            return None
        if name == "add" and bias is None:
            split = _bias(terms, eqn, dim)
            if split is None:
                return None
            operand, bias = split
        elif name == "convert_element_type":
            # A cast up is done by the row kernel. A cast down would be missing.
            if not is_float(operand.aval.dtype) or is_wider(operand.aval.dtype, eqn.outvars[0].aval.dtype):
                return None
            if bias is None:
                dtype = operand.aval.dtype
        elif name not in ("copy", "copy_p"):
            step = _step(eqn, dim, classes)
            if step is None:
                return None
            steps.append(step[0])
            dim = step[1]
        atom = operand
    return None


def _product(terms: Terms, eqn: JaxprEqn, class_dim: int) -> tuple[Atom, Atom, int, Step] | None:
    """(x, w, the dimension of w that is contracted, how x is brought into the product's order of dimensions)."""
    (contracted, batched) = eqn.params["dimension_numbers"]
    lhs, rhs = eqn.invars
    rank = len(eqn.outvars[0].aval.shape)
    if any(batched) or any(len(c) != 1 for c in contracted) or eqn.params.get("out_sharding") is not None:
        return None
    if lhs.aval.dtype != rhs.aval.dtype or not is_float(lhs.aval.dtype):
        return None
    if len(rhs.aval.shape) == 2 and class_dim == rank - 1:
        x, w, of_x, of_w = lhs, rhs, contracted[0][0], contracted[1][0]
    elif len(lhs.aval.shape) == 2 and class_dim == 0:
        x, w, of_x, of_w = rhs, lhs, contracted[1][0], contracted[0][0]
    else:
        return None
    free = [d for d in range(len(x.aval.shape)) if d != of_x]
    if not free:
        return None
    order = (*free, of_x) if class_dim else (of_x, *free)
    w, of_w = _weights(terms.graph, w, of_w)
    return x, w, of_w, ("transpose", class_dim, tuple(order), ())


def _weights(graph: Graph, w: Atom, dim: int) -> tuple[Atom, int]:
    """The weights below a transpose and one cast down, which the op does itself: their gradient is summed before it."""
    is_cast = False
    while (eqn := graph.producer(w)) is not None and isinstance(eqn.invars[0], Var):
        operand = eqn.invars[0]
        if eqn.primitive.name == "transpose":
            dim = eqn.params["permutation"][dim]
        elif (
            eqn.primitive.name == "convert_element_type"
            and not is_cast
            and is_float(operand.aval.dtype)
            and is_wider(operand.aval.dtype, w.aval.dtype)
        ):
            is_cast = True
        else:
            break
        w = operand
    return w, dim


def _bias(terms: Terms, eqn: JaxprEqn, class_dim: int) -> tuple[Atom, Term] | None:
    """(the other operand, the bias) of a sum with something that only depends on the class."""
    out = terms.of(eqn.outvars[0])
    first, second = terms.operands(out, eqn)
    for logits, bias in ((first, second), (second, first)):
        bias = terms.peel(bias)
        is_vector = bias.axis_set == {out.axes[class_dim]} and isinstance(bias.atom, Var)
        if is_vector and is_float(bias.dtype) and logits.atom.aval.shape == eqn.outvars[0].aval.shape:
            return logits.atom, bias
    return None


def _step(eqn: JaxprEqn, class_dim: int, classes: int) -> tuple[Step, int] | None:
    """The step of a view whose result has the classes at `class_dim`, and where its operand has them."""
    name = eqn.primitive.name
    old, new = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    if name == "slice":
        if old[class_dim] != classes or any(s != 1 for s in eqn.params["strides"] or ()):
            return None
        return ("slice", class_dim, tuple(eqn.params["start_indices"]), tuple(eqn.params["limit_indices"])), class_dim
    if name == "transpose":
        order = tuple(eqn.params["permutation"])
        return ("transpose", class_dim, order, ()), order[class_dim]
    if name in ("reshape", "squeeze", "expand_dims"):
        before = math.prod(new[:class_dim])
        dims = [d for d, n in enumerate(old) if n == classes and math.prod(old[:d]) == before]
        if len(dims) != 1 or (eqn.params.get("dimensions") is not None and name == "reshape"):
            return None
        return ("reshape", class_dim, tuple(new), ()), dims[0]
    return None


def _stepped(x: Any, steps: Sequence[Step]) -> Any:
    """x, whose features stand where the logits have their classes, with the same done to its tokens."""
    for kind, dim, numbers, more in steps:
        if kind == "transpose":
            x = jnp.transpose(x, numbers)
        elif kind == "slice":
            ends = [x.shape[d] if d == dim else n for d, n in enumerate(more)]
            x = lax.slice(x, numbers, ends)  # all classes: from 0
        else:
            features = x.size // math.prod(n for d, n in enumerate(numbers) if d != dim)
            x = x.reshape([features if d == dim else n for d, n in enumerate(numbers)])
    return x


# --- the tail, upwards ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Tail:
    """The equations from `values` and `extras` to `out`, a single number."""

    values: tuple[Var, ...]
    extras: tuple[Var, ...]
    out: Var
    eqns: tuple[JaxprEqn, ...]

    def __call__(self, values: Sequence[Any], extras: Sequence[Any]) -> Any:
        env = dict(zip((*self.values, *self.extras), (*values, *extras), strict=True))
        for eqn in self.eqns:
            operands = [a.val if isinstance(a, Literal) else env[a] for a in eqn.invars]
            env.update(zip(eqn.outvars, _compat.evaluated(eqn, operands), strict=True))
        return env[self.out]


@dataclasses.dataclass(frozen=True)
class _Degree:
    """How a value depends on the rows' values: of lse alone, which may be squared then; with squares of lse in it; a
    sum over rows, which may not be squared."""

    lse_only: bool
    squared: bool = False
    summed: bool = False

    def joined(self, other: _Degree) -> _Degree:
        return _Degree(self.lse_only and other.lse_only, self.squared or other.squared, self.summed or other.summed)


_LINEAR = frozenset(  # in all operands together
    "add broadcast_in_dim concatenate copy copy_p expand_dims neg reshape rev slice squeeze sub transpose".split()
)


def _tail_above(graph: Graph, values: Sequence[Var], rows: Rows) -> Tail | None:
    degrees = {v: _Degree(r.kind == LSE) for v, r in zip(values, rows.results, strict=True)}
    waiting = {v: graph.use_count(v) for v in values}  # uses that are not followed yet; those by results never are
    queue = sorted({i for v in values for i in graph.users.get(v, ())})
    eqns: list[JaxprEqn] = []
    found: tuple[Var, int] | None = None
    seen = set(queue)
    while queue and len(eqns) < _MAX_TAIL:
        eqn = graph.eqns[heapq.heappop(queue)]
        degree = _degree(graph, eqn, degrees)
        if degree is None:
            break
        (out,) = eqn.outvars
        eqns.append(eqn)
        degrees[out], waiting[out] = degree, graph.use_count(out)
        for atom in eqn.invars:
            if isinstance(atom, Var) and atom in waiting:
                waiting[atom] -= 1
        for i in graph.users.get(out, ()):
            if i not in seen:
                seen.add(i)
                heapq.heappush(queue, i)
        alive = [v for v, n in waiting.items() if n]
        if alive == [out] and out.aval.shape == () and is_float(out.aval.dtype):
            found = out, len(eqns)
    if found is None:
        return None
    out, count = found
    taken = [a for e in eqns[:count] for a in e.invars if isinstance(a, Var) and a not in degrees]
    return Tail(tuple(values), tuple(dict.fromkeys(taken)), out, tuple(eqns[:count]))


def _degree(graph: Graph, eqn: JaxprEqn, degrees: dict[Var, _Degree]) -> _Degree | None:
    """Of the equation's result; None where it is not known to be affine, apart from squares of lse."""
    name = eqn.primitive.name
    if len(eqn.outvars) != 1 or not is_float(eqn.outvars[0].aval.dtype):
        return None
    moving = [(i, degrees[a]) for i, a in enumerate(eqn.invars) if isinstance(a, Var) and a in degrees]
    degree = moving[0][1]
    for _, other in moving[1:]:
        degree = degree.joined(other)
    places = [i for i, _ in moving]
    if name in _LINEAR or name == "convert_element_type":
        return degree
    if name == "select_n":
        return degree if 0 not in places else None
    if name == "reduce_sum":
        return dataclasses.replace(degree, summed=True)
    if name in ("div", "gather", "dynamic_slice"):  # linear in the first operand
        return degree if places == [0] else None
    if name in ("mul", "dot_general") and len(places) == 1:
        return dataclasses.replace(degree, summed=degree.summed or name == "dot_general")
    is_square = (
        (name == "mul" and graph.same(*eqn.invars))
        or (name == "integer_pow" and eqn.params["y"] == 2)
        or name == "square"
    )
    if is_square and degree.lse_only and not degree.squared and not degree.summed:
        return dataclasses.replace(degree, squared=True)
    return None


# --- the fused op -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _TailOfRows:
    """`Plan.tail`: from the op's (lse, picked, total)."""

    rows: Rows
    classes: int
    tail: Callable[..., Any]

    def __call__(self, values: Any, labels: Any, *extras: Any) -> Any:
        return self.tail(self.rows.values(values, labels, self.classes), extras)


def emit(
    x,
    w,
    labels,
    *more,
    logits_order: Order,
    rows: Rows,
    form: Layer,
    steps: tuple[Step, ...],
    bias_order: Order,
    tail: Tail | None,
):
    bias, extras = (arranged(more[0], bias_order), more[1:]) if bias_order else (None, more)
    x = arranged(_stepped(x, steps), logits_order)
    *batch, _ = x.shape
    classes = form.classes(w)
    labels = rows.labels(labels, batch, classes)
    if tail is None:
        values = rows_of_layer(x, w, bias, labels, layer=form)
        return rows.values(values, labels, classes)
    plan = Plan(form, chunks_of(batch, w.dtype), _TailOfRows(rows, classes, tail))
    return (reduced(plan, x, w, bias, labels, tuple(extras)),)
