"""Boolean masks over (query, key) positions: the structure that is proved, and the tensors that remain.

A comparison of two positions (iota plus a constant) bounds s - t on one side: a band. One of the key position with
anything else, padding lengths or the position in a cache, bounds s on one side: a half-line; so does a mask of the
queries, at all keys or none. Conjunctions intersect, and masks of numbers 0 and 1 that are multiplied are conjunctions;
half-lines that are open on one side unite: causal or in the prefix; of two triangles the exclusive or is the band
between. Equal integers of queries and keys are segments.
What cannot be read so stays a tensor, which the kernel reads, in the shape that the user's program has it before
broadcasting.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from zenith_jax.errors import Refusal, refuse
from zenith_jax.ir.term import Axis, Term, Terms
from zenith_jax.ops.attention_kernels import UNBOUNDED
from zenith_jax.passes.match.mask_structure import Edge, HalfLine, Segments, Source, united

# Constant arrays up to this size are looked at while tracing.
MAX_CONSTANT_SIZE = 1 << 24

# a compared with b, written as a bound on a - b: (sign, offset): sign * (a - b) + offset >= 0
_COMPARISONS = {"ge": (1, 0), "gt": (1, -1), "le": (-1, 0), "lt": (-1, -1)}
_NEGATED = {"ge": "lt", "gt": "le", "le": "gt", "lt": "ge"}


@dataclasses.dataclass(frozen=True)
class MaskForm:
    """allowed = -left <= s - t <= right, and all half-lines, segments and `tensors`."""

    left: int = UNBOUNDED
    right: int = UNBOUNDED
    query_axis: Axis | None = None  # t, once a band has shown which axis it is
    half_lines: tuple[HalfLine, ...] = ()
    segments: Segments | None = None
    tensors: tuple[Source, ...] = ()

    @property
    def is_band(self) -> bool:
        return self.left < UNBOUNDED or self.right < UNBOUNDED

    @property
    def is_only_band(self) -> bool:
        return not (self.half_lines or self.segments or self.tensors)

    def lines(self) -> tuple[HalfLine, ...] | None:
        """The form as half-lines alone; None if it is not."""
        if self.segments or self.tensors:
            return None
        t = self.query_axis
        band = []
        if self.right < UNBOUNDED and t is not None:
            band.append(HalfLine(True, (Edge(self.right + 1, ((t, 1),)),), None))
        if self.left < UNBOUNDED and t is not None:
            band.append(HalfLine(False, (Edge(-self.left, ((t, 1),)),), None))
        return (*band, *self.half_lines)

    def has_empty_rows(self, t: int, s: int) -> bool:
        """Whether some query sees no key by the band alone: tensors are not looked at."""
        return self.right < 0 or t - 1 - min(self.left, t) > s - 1 or self.left < -min(self.right, s - 1)

    def __and__(self, other: MaskForm) -> MaskForm | Refusal:
        axes = {a for a in (self.query_axis, other.query_axis) if a is not None}
        if len(axes) > 1:
            return refuse("the mask compares the key position with two different axes")
        tensors = (*self.tensors, *other.tensors)
        if self.segments and other.segments and self.segments != other.segments:
            tensors += (other.segments.source,)
        return MaskForm(
            min(self.left, other.left),
            min(self.right, other.right),
            next(iter(axes), None),
            tuple(dict.fromkeys((*self.half_lines, *other.half_lines))),
            self.segments or other.segments,
            tuple(dict.fromkeys(tensors)),
        )


def mask_form(terms: Terms, mask: Term, key_axis: Axis, negated: bool = False) -> MaskForm | Refusal:
    """Reads a boolean term; `negated` reads its complement."""
    mask = _peeled(terms, mask)
    value = terms.graph.constant(mask.atom)
    if value is not None:
        return MaskForm() if bool(value) != negated else refuse("the mask forbids everything")
    eqn = terms.producer(mask)
    name = eqn.primitive.name if eqn is not None else ""
    if eqn is not None and name == "not":
        return mask_form(terms, terms.operands(mask, eqn)[0], key_axis, not negated)
    if eqn is not None and name == ("or" if negated else "and"):
        first, second = (mask_form(terms, t, key_axis, negated) for t in terms.operands(mask, eqn))
        if isinstance(first, Refusal) or isinstance(second, Refusal):
            return first if isinstance(first, Refusal) else second
        return first & second
    if eqn is not None and name == ("and" if negated else "or"):
        union = _union(terms, mask, eqn, key_axis, negated)
        if union is not None:
            return union
    if eqn is not None and name == "select_n":
        chosen = _select_form(terms, mask, eqn, key_axis, negated)
        if chosen is not None:
            return chosen
    array = terms.graph.array(mask.atom)
    if array is not None and np.size(array) <= MAX_CONSTANT_SIZE:
        constant_band = _band_of_constant(np.asarray(array) != negated, mask.axes, key_axis)
        if constant_band is not None:
            return constant_band
    if eqn is not None and name == "xor":
        difference = _difference(terms, mask, eqn, key_axis, negated)
        if difference is not None:
            return difference
    if eqn is not None and name in ("ne", "gt") and terms.constant(terms.operands(mask, eqn)[1]) == 0:
        factors = _truths(terms, terms.operands(mask, eqn)[0])
        if factors is not None and not (negated and len(factors) > 1):
            return _all_of(terms, factors, key_axis, negated)
    if eqn is not None and name in _COMPARISONS:
        band = _band(terms, mask, _NEGATED[name] if negated else name, eqn, key_axis)
        if band is not None:
            return band
        line = _half_line(terms, _NEGATED[name] if negated else name, eqn, Source(mask, negated), key_axis)
        if line is not None:
            return MaskForm(half_lines=(line,))
    if eqn is not None and name == ("ne" if negated else "eq"):
        segments = _segments(terms, eqn, Source(mask, negated), key_axis)
        if segments is not None:
            return MaskForm(segments=segments)
    source = Source(mask, negated)
    if key_axis not in mask.axis_set:  # all keys or none, for each query
        n = key_axis.size
        edge = Edge(n, (), mask, -n) if negated else Edge(0, (), mask, n)
        return MaskForm(half_lines=(HalfLine(True, (edge,), source),))
    return MaskForm(tensors=(source,))


def _peeled(terms: Terms, mask: Term) -> Term:
    """Below views, and below the round trip of a boolean through numbers: (m.astype(f32) != 0), m.astype(f32) > 0."""
    while True:
        mask = terms.peel(mask)
        eqn = terms.producer(mask, "convert_element_type", "ne", "gt")
        if eqn is None:
            return mask
        operands = terms.operands(mask, eqn)
        if eqn.primitive.name != "convert_element_type" and terms.constant(operands[1]) != 0:
            return mask
        number = terms.peel(operands[0])
        if number.dtype == bool:
            if eqn.primitive.name != "convert_element_type":
                return mask
            mask = number
            continue
        cast = terms.producer(number, "convert_element_type")
        if cast is None or cast.invars[0].aval.dtype != bool:
            return mask
        mask = terms.operands(number, cast)[0]


def _select_form(terms: Terms, mask: Term, eqn: Any, key_axis: Axis, negated: bool) -> MaskForm | Refusal | None:
    """select_n(p, False, x) = p and x; select_n(p, x, False) = not p and x (tril and triu are written so)."""
    which, if_false, if_true = terms.operands(mask, eqn)
    when_false, when_true = (terms.graph.constant(t.atom) for t in (if_false, if_true))
    if when_false is not None and when_true is not None and bool(when_false) != bool(when_true):
        return mask_form(terms, which, key_axis, negated != bool(when_false))
    if negated:
        return None
    for constant, other, flip in ((when_false, if_true, False), (when_true, if_false, True)):
        if constant is not None and not bool(constant):
            first, second = mask_form(terms, which, key_axis, flip), mask_form(terms, other, key_axis)
            if isinstance(first, Refusal) or isinstance(second, Refusal):
                return first if isinstance(first, Refusal) else second
            return first & second
    return None


def _difference(terms: Terms, mask: Term, eqn: Any, key_axis: Axis, negated: bool) -> MaskForm | Refusal | None:
    """tril(k) ^ tril(j): the band between two triangles of which one holds the other."""
    forms = [mask_form(terms, t, key_axis) for t in terms.operands(mask, eqn)]
    if negated or not all(isinstance(f, MaskForm) and f.is_only_band for f in forms):
        return None
    first, second = forms
    assert isinstance(first, MaskForm) and isinstance(second, MaskForm)
    if first.query_axis is not second.query_axis:
        return None
    if first.left == second.left == UNBOUNDED > max(first.right, second.right):
        inner, outer = sorted((first.right, second.right))
        band = dataclasses.replace(first, left=-(inner + 1), right=outer)
    elif first.right == second.right == UNBOUNDED > max(first.left, second.left):
        inner, outer = sorted((first.left, second.left))
        band = dataclasses.replace(first, left=outer, right=-(inner + 1))
    else:
        return None
    return band if inner != outer else refuse("the mask forbids everything")


def _truths(terms: Terms, number: Term) -> list[Term | None] | None:
    """Booleans of which a number is the product, as masks of numbers 0 and 1 are multiplied; None if it may be anything
    else. A None among them is False. What a user passes as integers may be any: their product may wrap to 0."""
    number = terms.peel(number)
    value = terms.constant(number)
    if value is not None:
        return [] if value == 1 else [None] if value == 0 else None
    eqn = terms.producer(number, "convert_element_type", "mul", "select_n")
    if eqn is None:
        return None
    operands = terms.operands(number, eqn)
    if eqn.primitive.name == "convert_element_type":
        below = operands[0]
        return [below] if below.dtype == bool else _truths(terms, below)
    if eqn.primitive.name == "mul":
        found = [_truths(terms, t) for t in operands]
        return None if any(f is None for f in found) else [m for f in found if f is not None for m in f]
    if len(operands) != 3 or terms.constant(operands[1]) != 0 or operands[0].dtype != bool:
        return None
    chosen = _truths(terms, operands[2])  # jnp.tril of numbers
    return None if chosen is None else [operands[0], *chosen]


def _all_of(terms: Terms, masks: list[Term | None], key_axis: Axis, negated: bool) -> MaskForm | Refusal:
    form: MaskForm | Refusal = MaskForm()
    for mask in masks:
        if mask is None:
            return MaskForm() if negated else refuse("the mask forbids everything")
        found = mask_form(terms, mask, key_axis, negated)
        form = found if isinstance(found, Refusal) else form & found
        if isinstance(form, Refusal):
            return form
    return form if masks or not negated else refuse("the mask forbids everything")


def _band(terms: Terms, mask: Term, comparison: str, eqn: Any, key_axis: Axis) -> MaskForm | None:
    """The bound on s - t that a comparison of positions is."""
    first, second = (affine(terms, t) for t in terms.operands(mask, eqn))
    if first is None or second is None:
        return _distance_band(terms, mask, comparison, eqn, key_axis)
    (offset_a, a), (offset_b, b) = first, second
    coefficients = {axis: a.get(axis, 0) - b.get(axis, 0) for axis in {*a, *b}}
    coefficients = {axis: c for axis, c in coefficients.items() if c}
    query = [axis for axis in coefficients if axis is not key_axis]
    if len(query) != 1 or len(coefficients) != 2 or coefficients[query[0]] != -coefficients[key_axis]:
        return None
    if abs(coefficients[key_axis]) != 1:
        return None
    sign, extra = _COMPARISONS[comparison]
    # sign * (c_s * (s - t) + offset) + extra >= 0
    slope = sign * coefficients[key_axis]
    bound = sign * (offset_a - offset_b) + extra
    if slope > 0:  # s - t >= -bound
        return MaskForm(left=bound, query_axis=query[0])
    return MaskForm(right=bound, query_axis=query[0])


def _union(terms: Terms, mask: Term, eqn: Any, key_axis: Axis, negated: bool) -> MaskForm | None:
    """The union of two forms that are half-lines open to the same side."""
    forms = [mask_form(terms, t, key_axis, negated) for t in terms.operands(mask, eqn)]
    lines = [form.lines() for form in forms if isinstance(form, MaskForm)]
    axes = {form.query_axis for form in forms if isinstance(form, MaskForm)} - {None}
    if len(lines) != 2 or len(axes) > 1 or lines[0] is None or lines[1] is None:
        return None
    both = united(lines[0], lines[1], Source(mask, negated))
    return None if both is None else MaskForm(half_lines=both, query_axis=next(iter(axes), None))


def _half_line(terms: Terms, comparison: str, eqn: Any, source: Source, key_axis: Axis) -> HalfLine | None:
    """The bound on s that a comparison of it with something that does not depend on it is."""
    first, second = (terms.peel(t) for t in terms.operands(source.mask, eqn))
    if first.dtype.kind not in "iu" or second.dtype.kind not in "iu":
        return None
    if key_axis not in first.axis_set:  # a < b is b > a
        first, second = second, first
        comparison = {"ge": "le", "gt": "lt", "le": "ge", "lt": "gt"}[comparison]
    position = affine(terms, first)
    if position is None or key_axis in second.axis_set or abs(position[1].get(key_axis, 0)) != 1:
        return None
    offset, coefficients = position
    known = affine(terms, second)
    bound, slopes = known if known is not None else (0, {})
    sign, extra = _COMPARISONS[comparison]
    # sign * (c s + offset + ... - bound - ... - term) + extra >= 0, solved for s
    upper = sign * coefficients[key_axis] < 0
    turn = sign if upper else -sign
    axes = {axis for axis in {*coefficients, *slopes} if axis is not key_axis}
    rest = {axis: turn * (coefficients.get(axis, 0) - slopes.get(axis, 0)) for axis in axes}
    edge = Edge(
        turn * (offset - bound) + (extra + 1 if upper else -extra),
        tuple((axis, c) for axis, c in rest.items() if c),
        None if known is not None else second,
        -turn,
    )
    return HalfLine(upper, (edge,), source) if edge.is_small() else None


def _segments(terms: Terms, eqn: Any, source: Source, key_axis: Axis) -> Segments | None:
    """Integers of the queries and integers of the keys that are compared for equality."""
    query, key = (terms.peel(t) for t in terms.operands(source.mask, eqn))
    if key_axis in query.axis_set:
        query, key = key, query
    # Without an axis of its own the query's side is one number for each example: the tensor is small.
    if key_axis not in key.axis_set or key_axis in query.axis_set or not query.axis_set - key.axis_set:
        return None
    if any(t.dtype.kind not in "iu" or t.dtype.itemsize > 4 for t in (query, key)):
        return None
    return Segments(query, key, source)


def _distance_band(terms: Terms, mask: Term, comparison: str, eqn: Any, key_axis: Axis) -> MaskForm | None:
    """|t - s| <= w: the band of w on both sides."""
    distance, bound = terms.operands(mask, eqn)
    if terms.constant(distance) is not None:
        distance, bound, comparison = bound, distance, {"ge": "le", "gt": "lt"}.get(comparison, "")
    width, distance = terms.constant(bound), terms.peel(distance)
    absolute = terms.producer(distance, "abs")
    if absolute is None or width is None or not width.is_integer() or comparison not in ("le", "lt"):
        return None
    signed = affine(terms, terms.operands(distance, absolute)[0])
    if signed is None or not _is_exact(distance.dtype, *signed):
        return None
    offset, coefficients = signed
    query = [axis for axis in coefficients if axis is not key_axis and coefficients[axis]]
    slope = coefficients.get(key_axis, 0)
    if len(query) != 1 or abs(slope) != 1 or coefficients[query[0]] != -slope:
        return None
    reach = int(width) - (comparison == "lt")
    # -reach <= slope * (s - t) + offset <= reach
    return MaskForm(left=reach + slope * offset, right=reach - slope * offset, query_axis=query[0])


def _band_of_constant(allowed: np.ndarray, axes: tuple[Axis | None, ...], key_axis: Axis) -> MaskForm | None:
    """A constant mask over query and key positions, jnp.tril outside of the traced code, that is a band."""
    named = [(d, axis) for d, axis in enumerate(axes) if axis is not None]
    if len(named) != 2 or key_axis not in axes or not allowed.any():
        return None
    ((query_dim, query_axis),) = [(d, axis) for d, axis in named if axis is not key_axis]
    order = [query_dim, axes.index(key_axis), *(d for d, axis in enumerate(axes) if axis is None)]
    allowed = allowed.transpose(order).reshape(query_axis.size, key_axis.size)
    distance = np.arange(key_axis.size)[None, :] - np.arange(query_axis.size)[:, None]
    left, right = -int(distance[allowed].min()), int(distance[allowed].max())
    if not np.array_equal(allowed, (distance >= -left) & (distance <= right)):
        return None
    # A bound at the corner of the matrix is none.
    return MaskForm(
        UNBOUNDED if left >= query_axis.size - 1 else left,
        UNBOUNDED if right >= key_axis.size - 1 else right,
        query_axis,
    )


def affine(terms: Terms, term: Term) -> tuple[int, dict[Axis, int]] | None:
    """An integer-valued term as constant + sum of coefficient * axis position, all of it exact in the term's dtype."""
    path: list[Any] = []
    below = terms.peel(term, path)
    found = _affine_below(terms, below)
    dtypes = {term.dtype, below.dtype, *(e.outvars[0].aval.dtype for e in path)}
    return found if found is not None and all(_is_exact(d, *found) for d in dtypes) else None


def _progression(array: np.ndarray, axes: tuple[Axis | None, ...]) -> tuple[int, dict[Axis, int]] | None:
    """jnp.arange outside of the traced code is a constant array; so is anything else."""
    if array.dtype.kind not in "iu" or array.size == 0:
        return None
    offset = int(array.flat[0])
    steps = [int(np.take(array, [1], axis=d).flat[0]) - offset if n > 1 else 0 for d, n in enumerate(array.shape)]
    positions = sum(
        (
            np.expand_dims(np.arange(n, dtype=np.int64) * step, tuple(e for e in range(array.ndim) if e != d))
            for d, (n, step) in enumerate(zip(array.shape, steps, strict=True))
        ),
        np.int64(offset),
    )
    if not np.array_equal(np.broadcast_to(positions, array.shape), array):
        return None
    return offset, {axis: step for axis, step in zip(axes, steps, strict=True) if axis is not None and step}


def _is_exact(dtype: Any, offset: int, coefficients: dict[Axis, int]) -> bool:
    """Whether the dtype holds every value: unsigned numbers wrap below 0, floats round above 2^(mantissa bits)."""
    ends = [c * (axis.size - 1) for axis, c in coefficients.items()]
    low, high = offset + sum(min(e, 0) for e in ends), offset + sum(max(e, 0) for e in ends)
    if jnp.issubdtype(dtype, jnp.floating):
        limit = 2 ** (jnp.finfo(dtype).nmant + 1)
        return -limit <= low and high <= limit
    return jnp.issubdtype(dtype, jnp.integer) and jnp.iinfo(dtype).min <= low and high <= jnp.iinfo(dtype).max


def _affine_below(terms: Terms, term: Term) -> tuple[int, dict[Axis, int]] | None:
    value = terms.constant(term)
    if value is not None:
        return (int(value), {}) if value.is_integer() else None
    cast = terms.producer(term, "convert_element_type")
    if cast is not None:
        return affine(terms, terms.operands(term, cast)[0])
    array = terms.graph.array(term.atom)
    if array is not None:
        return _progression(np.asarray(array), term.axes) if np.size(array) <= MAX_CONSTANT_SIZE else None
    eqn = terms.producer(term, "iota", "add", "sub")
    if eqn is None:
        return None
    if eqn.primitive.name == "iota":
        axis = term.axes[eqn.params["dimension"]]
        return 0, ({} if axis is None else {axis: 1})
    first, second = (affine(terms, t) for t in terms.operands(term, eqn))
    if first is None or second is None:
        return None
    sign = 1 if eqn.primitive.name == "add" else -1
    (offset_a, a), (offset_b, b) = first, second
    return offset_a + sign * offset_b, {x: a.get(x, 0) + sign * b.get(x, 0) for x in {*a, *b}}
