"""One element of each row, chosen by a label: x[..., label], or sum(x * one_hot(label)), smoothed labels included; and
the sum of all of a row, which is what smoothed labels have besides."""

from __future__ import annotations

import dataclasses
import enum
import math
from typing import Any

from zenith_jax.ir._compat import JaxprEqn
from zenith_jax.ir.term import Axis, Term, Terms, is_float
from zenith_jax.passes.match.mask import affine


class Outside(enum.Enum):
    """What a label that is no class picks."""

    NAN = "nan"
    ZERO = "zero"
    NEAREST = "nearest"


@dataclasses.dataclass(frozen=True)
class Pick:
    """sum over `axis` of x * (on where axis == labels, off elsewhere); `labels` has the other axes of x, or fewer.

    labels: None where x is summed as it is: on and off are 1.
    multiplied: x is multiplied by zeros elsewhere, so that an infinite x makes the sum NaN.
    """

    x: Term
    axis: Axis
    labels: Term | None
    outside: Outside
    on: float = 1.0
    off: float = 0.0
    multiplied: bool = False
    inner: tuple[JaxprEqn, ...] = ()


def pick_form(terms: Terms, out: Term, eqn: JaxprEqn) -> Pick | None:
    """Reads the gather or reduce_sum that computes `out`."""
    found = _gathered(terms, out, eqn) if eqn.primitive.name == "gather" else _summed(terms, out, eqn)
    # A label for each row: the labels may not depend on the class.
    if found is None or found.labels is None:
        return found
    return found if found.axis not in found.labels.axis_set else None


# --- gather -----------------------------------------------------------------------------------------------------------


def _gathered(terms: Terms, out: Term, eqn: JaxprEqn) -> Pick | None:
    """One element for each index: take_along_axis, x[arange(n), labels], vmap of x[label]."""
    numbers, operand, indices = eqn.params["dimension_numbers"], *eqn.invars[:2]
    shape = operand.aval.shape
    outside = outside_of(eqn)
    if outside is None or any(n != 1 for n in eqn.params["slice_sizes"]):
        return None
    rows = [axis for d, axis in enumerate(out.axes) if d not in numbers.offset_dims]  # of the indices too
    axes: list[Axis | None] = [None] * len(shape)
    for d, i in zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True):
        axes[d] = rows[i]
    labels: Term | None = None
    chosen = Axis(1)
    for d, column in zip(numbers.start_index_map, _columns(terms, indices, rows, numbers.start_index_map), strict=True):
        position = _position(terms, column)
        if position is not None and position.size == shape[d]:
            axes[d] = position
        elif labels is None:
            labels, chosen = column, Axis(shape[d], "v")
            axes[d] = chosen
        else:
            return None
    named = [a for a in axes if a is not None]
    if labels is None or len(set(named)) != len(named):
        return None
    axes = [None if n == 1 else axis for n, axis in zip(shape, axes, strict=True)]
    return Pick(Term(operand, tuple(axes)), chosen, labels, outside, inner=(eqn,))


def outside_of(eqn: JaxprEqn) -> Outside | None:
    """What a gather gives for an index that is outside of its operand."""
    mode = eqn.params["mode"].name
    if mode == "FILL_OR_DROP":
        fill = eqn.params["fill_value"]
        return Outside.NAN if fill is None or math.isnan(fill) else None
    # XLA moves what was promised to be inside, and is not, to the nearest element too.
    return Outside.NEAREST if mode in ("CLIP", "PROMISE_IN_BOUNDS") else None


def _columns(terms: Terms, indices: Any, rows: list[Axis | None], index_map: tuple[int, ...]) -> list[Term]:
    """The coordinates that an array of indices is made of; as many as there are, or it is one for all."""
    pieces = [indices]
    if len(index_map) > 1:
        eqn = terms.graph.producer(indices)
        pieces = list(eqn.invars) if eqn is not None and eqn.primitive.name == "concatenate" else []
        if eqn is None or eqn.params.get("dimension") != len(rows) or any(p.aval.shape[-1] != 1 for p in pieces):
            return []
    return [
        Term(p, (*(None if n == 1 else a for n, a in zip(p.aval.shape[:-1], rows, strict=True)), None)) for p in pieces
    ]


def _position(terms: Terms, index: Term) -> Axis | None:
    """The axis that an index counts, from 0 in steps of 1; also below where(i < 0, i + n, i)."""
    index = terms.peel(index)
    wrap = terms.producer(index, "select_n")
    if wrap is not None and len(wrap.invars) == 3:
        which, unwrapped, _ = terms.operands(index, wrap)
        comparison = terms.producer(which, "lt")
        if comparison is None:
            return None
        compared, bound = terms.operands(which, comparison)
        if terms.constant(bound) != 0 or not terms.same(compared, unwrapped):
            return None
        index = unwrapped
    found = affine(terms, index)
    if found is None or found[0] != 0 or list(found[1].values()) != [1]:
        return None
    return next(iter(found[1]))


# --- sums with one-hot labels -----------------------------------------------------------------------------------------


def _summed(terms: Terms, out: Term, eqn: JaxprEqn) -> Pick | None:
    operand, reduced = terms.reduced(out, eqn)
    if len(reduced) != 1:
        return None
    inner = [eqn]
    below = terms.peel(operand, inner)
    select = terms.producer(below, "select_n")
    if select is not None and len(select.invars) == 3:
        which, elsewhere, x = terms.operands(below, select)
        labels = _one_hot(terms, which, reduced[0])
        if labels is None or terms.constant(elsewhere) != 0:
            return None
        return Pick(x, reduced[0], labels, Outside.ZERO, inner=(*inner, select))
    everything = Pick(below, reduced[0], None, Outside.ZERO, 1.0, 1.0, inner=tuple(inner))
    if terms.producer(below, "mul", "div", "neg") is None:
        return everything
    product = terms.product(below, inner)
    if len(product.factors) != 2 or any(exponent != 1 for _, exponent in product.factors):
        return None
    (first, _), (second, _) = product.factors
    for x, weight in ((first, second), (second, first)):
        on, off, labels = _weights(terms, weight, reduced[0]) or (0.0, 0.0, None)
        if labels is not None:
            c = product.coefficient
            return Pick(x, reduced[0], labels, Outside.ZERO, on * c, off * c, True, tuple(inner))
    return None


def _weights(terms: Terms, term: Term, axis: Axis) -> tuple[float, float, Term | None] | None:
    """(a, b, labels) where the term is a * (axis == labels) + b."""
    term = terms.peel(term)
    constant = terms.constant(term)
    if constant is not None:
        return 0.0, constant, None
    if term.dtype == bool:
        labels = _one_hot(terms, term, axis)
        return None if labels is None else (1.0, 0.0, labels)
    eqn = terms.producer(term, "convert_element_type", "mul", "div", "add", "sub", "neg", "select_n")
    if eqn is None:
        return None
    name, operands = eqn.primitive.name, terms.operands(term, eqn)
    if name == "select_n":
        cases = [terms.constant(t) for t in operands[1:]]
        labels = _one_hot(terms, operands[0], axis)
        if labels is None or len(cases) != 2 or cases[0] is None or cases[1] is None:
            return None
        return cases[1] - cases[0], cases[0], labels
    found = [f for t in operands if (f := _weights(terms, t, axis)) is not None]
    if len(found) != len(operands):
        return None
    (a, b, labels), *rest = found
    if name == "convert_element_type":
        # From bool, or to a float; a float made an integer is cut, and a wide integer made narrow wraps.
        return (a, b, labels) if operands[0].dtype == bool or is_float(term.dtype) else None
    if name == "div" and not is_float(term.dtype):
        return None
    if name == "neg":
        return -a, -b, labels
    (c, d, others), *_ = rest
    if name in ("mul", "div"):
        if labels is None and name == "mul":
            (a, b, labels), (c, d, others) = (c, d, others), (a, b, labels)
        if others is not None or (name == "div" and d == 0):
            return None
        factor = d if name == "mul" else 1 / d
        return a * factor, b * factor, labels
    if labels is not None and others is not None:
        return None
    sign = 1 if name == "add" else -1
    return a + sign * c, b + sign * d, labels if labels is not None else others


def _one_hot(terms: Terms, mask: Term, axis: Axis) -> Term | None:
    """The labels, where the boolean term is (axis == labels)."""
    mask = terms.peel(mask)
    eqn = terms.producer(mask, "eq")
    if eqn is None:
        return None
    first, second = (terms.peel(t) for t in terms.operands(mask, eqn))
    for position, labels in ((first, second), (second, first)):
        if labels.dtype.kind in "iu" and axis not in labels.axis_set and affine(terms, position) == (0, {axis: 1}):
            return labels
    return None
