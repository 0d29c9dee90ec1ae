"""Which elements of which arrays a value's elements are made of, as a sum of products.

An `Element` is an array at an index. Of its dimensions one at most runs along features, j = 0, 1, ..., from `start` in
steps of `step`: x[b, t, 2 j + 1]. The others are axes of the program, as in a Term, or numbers, where a slice, a stack
or a reshape has picked one. `Elements.sum_of` goes down from an element of a result through arithmetic and through
everything that only says where an element comes from: slices, concatenations, stacks, tiles, reshapes, transposes,
broadcasts and casts. Two rotations are then the same, however they take their features apart and put them together.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

from zenith_jax.ir._compat import JaxprEqn, Literal, Var
from zenith_jax.ir.graph import Atom, Graph
from zenith_jax.ir.term import Axis, is_float
from zenith_jax.passes.match._match import is_wider


@dataclasses.dataclass(frozen=True)
class Run:
    """start, start + step, ... : `count` numbers."""

    start: int
    step: int
    count: int

    @property
    def last(self) -> int:
        return self.start + self.step * (self.count - 1)

    def shifted(self, by: int) -> Run:
        return dataclasses.replace(self, start=self.start + by)

    def of_slice(self, start: int, stride: int) -> Run:
        return Run(start + stride * self.start, stride * self.step, self.count)


Index = Axis | Run | int  # 0 along dimensions of size 1
REAL, IMAGINARY = "real", "imag"


@dataclasses.dataclass(frozen=True, eq=False)
class Element:
    """atom[index], or a part of it where it is complex."""

    atom: Atom
    index: tuple[Index, ...]
    part: str = ""

    @property
    def axes(self) -> frozenset[Axis]:
        return frozenset(i for i in self.index if isinstance(i, Axis))


@dataclasses.dataclass(frozen=True, eq=False)
class Product:
    coefficient: float
    factors: tuple[Element, ...]


Sum = tuple[Product, ...]
Complex = tuple[Sum, Sum]

# A rotation is a sum of two products of two factors, found in some tens of steps. What needs more is none.
_MOST_PRODUCTS, _MOST_STEPS = 4, 300


class Elements:
    """Reading a graph as elements of a result that has `axes`.

    inner: the equations between the result and the elements that it is made of. Arithmetic is followed only where the
    value has all the axes, and so a part of what is rotated: what tables are computed from is no concern. Nor is what x
    is computed from: there is none below a slice, which takes x apart, or below a real value that is used more than
    once, as x is by both members of its pairs.
    """

    def __init__(self, graph: Graph, axes: frozenset[Axis]):
        self.graph = graph
        self.axes = axes
        self.inner: dict[int, JaxprEqn] = {}
        self._steps = _MOST_STEPS

    def same(self, a: Element, b: Element) -> bool:
        return a.index == b.index and a.part == b.part and self.graph.same(a.atom, b.atom)

    def sum_of(self, element: Element, *, within: bool = True) -> Sum:
        """The sum that a real element is. within: whether arithmetic is followed."""
        value = self._constant(element)
        if value is not None:
            return (Product(value, ()),)
        eqn = self._next(element)
        if eqn is None:
            return _bare(element)
        below = _origin(element, eqn)
        if below is not None:
            found = self.sum_of(below, within=within and self._goes_on(below, eqn))
            if _is_bare(found):
                return _bare(element) if _rounds(eqn) else found
            self._walked(element, eqn)
            return found
        name = eqn.primitive.name
        found: Sum | None = None
        if name == "neg" and (within or not element.axes >= self.axes):
            found = _scaled(self._real(element, eqn, 0), -1.0)
        elif within and element.axes >= self.axes:
            if name in ("add", "sub", "mul"):
                found = _combined(name, self._real(element, eqn, 0), self._real(element, eqn, 1))
            elif name in ("real", "imag"):
                found = self.complex_of(_operand(element, eqn, 0))[name == "imag"]
        if found is None:
            return _bare(element)
        self._walked(element, eqn)
        return found

    def complex_of(self, element: Element) -> Complex:
        """The real and the imaginary part of a complex element."""
        eqn = self._next(element)
        below = None if eqn is None else _origin(element, eqn)
        found: Complex | None = None
        if eqn is not None and below is not None:
            found = self.complex_of(below)
        elif eqn is not None and element.axes >= self.axes:
            name = eqn.primitive.name
            if name == "complex":
                found = self._real(element, eqn, 0), self._real(element, eqn, 1)
            elif name == "conj":
                re, im = self.complex_of(_operand(element, eqn, 0))
                found = re, _scaled(im, -1.0)
            elif name == "mul":
                (a, b), (c, d) = (self.complex_of(_operand(element, eqn, i)) for i in (0, 1))
                parts = [_combined("mul", *pair) for pair in ((a, c), (b, d), (a, d), (b, c))]
                if None not in parts:
                    ac, bd, ad, bc = parts
                    re, im = _combined("sub", ac, bd), _combined("add", ad, bc)
                    found = None if re is None or im is None else (re, im)
        if found is None or eqn is None:
            return _bare(dataclasses.replace(element, part=REAL)), _bare(dataclasses.replace(element, part=IMAGINARY))
        if not all(map(_is_bare, found)):
            self._walked(element, eqn)
        return found

    def _next(self, element: Element) -> JaxprEqn | None:
        self._steps -= 1
        return self.graph.producer(element.atom) if self._steps > 0 else None

    def _constant(self, element: Element) -> float | None:
        value = self.graph.constant(element.atom)
        return float(value) if value is not None and is_float(value.dtype) else None

    def _walked(self, element: Element, eqn: JaxprEqn) -> None:
        if element.axes >= self.axes:
            self.inner[id(eqn)] = eqn

    def _real(self, element: Element, eqn: JaxprEqn, i: int) -> Sum:
        operand = _operand(element, eqn, i)
        return self.sum_of(operand, within=self._goes_on(operand, eqn))

    def _goes_on(self, below: Element, eqn: JaxprEqn) -> bool:
        """Whether arithmetic below an equation is still that of the sum."""
        if isinstance(below.atom, Literal) or eqn.primitive.name in ("slice", "split"):
            return False
        return self.graph.use_count(below.atom) == 1


def _operand(element: Element, eqn: JaxprEqn, i: int) -> Element:
    """Operand i of an elementwise equation, at the index of its result."""
    operand = eqn.invars[i]
    return Element(operand, element.index if operand.aval.shape else ())


def _bare(element: Element) -> Sum:
    return (Product(1.0, (element,)),)


def _is_bare(found: Sum) -> bool:
    return len(found) == 1 and found[0].coefficient == 1.0 and len(found[0].factors) == 1


def _rounds(eqn: JaxprEqn) -> bool:
    """Whether the equation is a cast to a narrower dtype: its result is what the program wants to be read."""
    return eqn.primitive.name == "convert_element_type" and is_wider(
        eqn.invars[0].aval.dtype, eqn.outvars[0].aval.dtype
    )


def _scaled(found: Sum, by: float) -> Sum:
    return tuple(Product(p.coefficient * by, p.factors) for p in found)


def _combined(name: str, a: Sum | None, b: Sum | None) -> Sum | None:
    """a + b, a - b or a * b, multiplied out; None where that is more than any rotation has."""
    assert a is not None and b is not None
    if name == "mul":
        found = tuple(
            Product(p.coefficient * q.coefficient, (*p.factors, *q.factors)) for p, q in itertools.product(a, b)
        )
    else:
        found = (*a, *(b if name == "add" else _scaled(b, -1.0)))
    return found if len(found) <= _MOST_PRODUCTS else None


# --- where an element comes from --------------------------------------------------------------------------------------


def _origin(element: Element, eqn: JaxprEqn) -> Element | None:
    """The element of an operand that the element is, where the equation computes nothing; None for all else."""
    name, params, index = eqn.primitive.name, eqn.params, element.index
    operand: Any = eqn.invars[0] if eqn.invars else None
    picked: Sequence[Index | None] | None = None
    if name in ("copy", "copy_p", "pvary"):
        picked = index
    elif name == "convert_element_type":
        floats = is_float(operand.aval.dtype) and is_float(eqn.outvars[0].aval.dtype)
        picked = index if floats else None
    elif name == "transpose":
        picked = [index[params["permutation"].index(d)] for d in range(len(index))]
        if isinstance(index[-1], Run) and picked[-1] is not index[-1]:
            return None  # features that lie apart in memory: what is read is the transposed array
    elif name == "broadcast_in_dim":
        dims = params["broadcast_dimensions"]
        picked = [0 if n == 1 else index[d] for n, d in zip(operand.aval.shape, dims, strict=True)]
    elif name in ("reshape", "squeeze", "expand_dims"):
        picked = _reshaped(index, eqn.outvars[0].aval.shape, operand.aval.shape)
    elif name == "slice":
        strides = params["strides"] or (1,) * len(index)
        picked = _sliced(index, params["start_indices"], strides, eqn)
    elif name == "split":
        which = [v is element.atom for v in eqn.outvars].index(True)
        starts = [0] * len(index)
        starts[params["axis"]] = int(sum(params["sizes"][:which]))
        picked = _sliced(index, starts, (1,) * len(index), eqn)
    elif name == "rev":
        picked = [_reversed(i, n) if d in params["dimensions"] else i for d, (i, n) in _dims(index, operand)]
    elif name == "tile":
        picked = [
            i if reps == 1 else _wrapped(i, n)
            for (_, (i, n)), reps in zip(_dims(index, operand), params["reps"], strict=True)
        ]
    elif name in ("concatenate", "stack"):
        return _of_several(element, eqn)
    if picked is None or not isinstance(operand, Var):
        return None
    found = tuple(i for i in picked if i is not None)
    return Element(operand, found, element.part) if len(found) == len(picked) else None


def _dims(index: Sequence[Index], operand: Any) -> list[tuple[int, tuple[Index, int]]]:
    return list(enumerate(zip(index, operand.aval.shape, strict=True)))


def _sliced(index: Sequence[Index], starts: Sequence[int], strides: Sequence[int], eqn: JaxprEqn) -> list | None:
    picked: list[Index] = []
    shapes = zip(eqn.invars[0].aval.shape, starts, strides, index, strict=True)
    for (whole, start, stride, i), size in zip(shapes, _shape_of_result(eqn), strict=True):
        if whole == size:
            picked.append(i)
        elif isinstance(i, Axis):
            return None
        else:
            picked.append(start + stride * i if isinstance(i, int) else i.of_slice(start, stride))
    return picked


def _shape_of_result(eqn: JaxprEqn) -> tuple[int, ...]:
    shape = eqn.invars[0].aval.shape
    if eqn.primitive.name == "split":  # its results differ along one axis, which is never whole
        axis = eqn.params["axis"]
        whole = len(eqn.outvars) == 1
        return tuple(n if d != axis or whole else -1 for d, n in enumerate(shape))
    return eqn.outvars[0].aval.shape


def _reversed(i: Index, n: int) -> Index | None:
    if isinstance(i, int):
        return n - 1 - i
    return Run(n - 1 - i.start, -i.step, i.count) if isinstance(i, Run) else None


def _wrapped(i: Index, n: int) -> Index | None:
    """i % n for a tile of n, where that is a run again."""
    if n == 1:
        return 0
    if isinstance(i, int):
        return i % n
    if isinstance(i, Run) and i.start // n == i.last // n:
        return i.shifted(-(i.start // n) * n)
    return None


def _of_several(element: Element, eqn: JaxprEqn) -> Element | None:
    """The element of the one operand of a concatenation or stack that it lies in."""
    index = list(element.index)
    if eqn.primitive.name == "stack":
        i = index.pop(eqn.params["axis"])
        which = i if isinstance(i, int) else None
    else:
        dim = eqn.params["dimension"]
        i = index[dim]
        ends = list(itertools.accumulate(a.aval.shape[dim] for a in eqn.invars))
        bounds = None if isinstance(i, Axis) else (i, i) if isinstance(i, int) else sorted((i.start, i.last))
        which = None
        if bounds is not None:
            first, last = (next(k for k, end in enumerate(ends) if bound < end) for bound in bounds)
            which = first if first == last else None
        if which is not None:
            begin = ends[which] - eqn.invars[which].aval.shape[dim]
            index[dim] = i - begin if isinstance(i, int) else i.shifted(-begin)  # type: ignore[union-attr]
    if which is None or isinstance(eqn.invars[which], Literal):
        return None
    return Element(eqn.invars[which], tuple(index), element.part)


def _reshaped(index: Sequence[Index], new: Sequence[int], old: Sequence[int]) -> list[Index] | None:
    """The index into an array of shape `old` that `index` is into its reshape to `new`."""
    picked: list[Index] = [0] * len(old)
    news, olds = ([(d, n) for d, n in enumerate(shape) if n != 1] for shape in (new, old))
    while news or olds:
        above, below = [news.pop(0)], [olds.pop(0)]
        while (m := math.prod(n for _, n in above)) != (k := math.prod(n for _, n in below)):
            (above if m < k else below).append((news if m < k else olds).pop(0))
        if len(above) == len(below) == 1:
            picked[below[0][0]] = index[above[0][0]]
            continue
        flat = _merged([(index[d], n) for d, n in above])
        parts = None if flat is None else _divided(flat, [n for _, n in below])
        if parts is None:
            return None
        for (d, _), i in zip(below, parts, strict=True):
            picked[d] = i
    return picked


def _merged(dims: Sequence[tuple[Index, int]]) -> Run | int | None:
    """The index along dimensions merged into one."""
    flat: Run | int = 0
    for i, n in dims:
        if isinstance(i, Axis) or (isinstance(i, Run) and isinstance(flat, Run)):
            return None
        if isinstance(flat, Run):
            flat = Run(flat.start * n, flat.step * n, flat.count).shifted(i)  # type: ignore[arg-type]
        else:
            flat = i.shifted(flat * n) if isinstance(i, Run) else flat * n + i
    return flat


def _divided(flat: Run | int, sizes: Sequence[int]) -> list[Index] | None:
    """The indices along the parts of a dimension."""
    found: list[Index] = []
    for n in reversed(sizes):
        if isinstance(flat, int):
            flat, inner = divmod(flat, n)
        elif flat.step % n == 0:
            inner: Index = flat.start % n
            flat = Run(flat.start // n, flat.step // n, flat.count)
        elif flat.start // n == flat.last // n:
            inner = flat.shifted(-(flat.start // n) * n)
            flat = flat.start // n
        else:
            return None
        found.append(inner)
    return found[::-1]
