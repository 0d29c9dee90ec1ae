"""Rotary position embeddings, in whichever way their pairs are taken apart and put together.

Read from the result, whose last axis are the features of a head. Of each pair, elements (j, j + h) or (2 j, 2 j + 1),

    y0 = x0 * c0 - x1 * s0        y1 = x1 * c1 + x0 * s1

with x0 and x1 the same pair of x. c0 and c1 are one element of a table, or a pair of a table as wide as x; s0 and s1
too. That the tables hold cosines and sines is not needed: the op has no other formula than this.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from zenith_jax.errors import Refusal, refuse
from zenith_jax.ir._compat import JaxprEqn, Literal, Var
from zenith_jax.ir.graph import Graph
from zenith_jax.ir.term import Axis, is_float
from zenith_jax.ops.rope import rope
from zenith_jax.passes.match._match import Match, Order, arranged, as_precise, narrowed, restored
from zenith_jax.passes.match.elements import IMAGINARY, Element, Elements, Product, Run, Sum

# What puts a rotation together, or takes a rotated copy of x.
_ANCHORS = {"concatenate", "stack", "rev"}
# From an anchor up to the result.
_ABOVE = {"reshape", "convert_element_type", "mul", "add", "sub", "neg", "concatenate", "stack"}
_MOST_ABOVE = 10


def match(graph: Graph, eqn: JaxprEqn) -> Match | Refusal | None:
    """`eqn` is a concatenation, stack or reversal inside of it; the result is the highest value that is a rotation."""
    if eqn.primitive.name not in _ANCHORS or not is_float(eqn.outvars[0].aval.dtype):
        return None
    refusal = None
    for root in reversed(list(_candidates(graph, eqn))):
        for layout in _layouts(graph, root):
            found = _rotation(graph, root, layout)
            if isinstance(found, Match):
                return found
            refusal = found or refusal
    return refusal


def _candidates(graph: Graph, eqn: JaxprEqn) -> Iterator[Var]:
    """Values of which each is all that uses the one before, and which put features together."""
    for _ in range(_MOST_ABOVE):
        var = eqn.outvars[0]
        if _puts_together(eqn):
            yield var
        users = graph.users_of(var)
        if len(users) != 1 or graph.is_output(var) or users[0].primitive.name not in _ABOVE:
            return
        eqn = users[0]


def _puts_together(eqn: JaxprEqn) -> bool:
    """Not what only views or casts a rotation: other matchers look below that, and must find the rotation's result."""
    if eqn.primitive.name == "reshape":
        return eqn.invars[0].aval.shape[-1:] != eqn.outvars[0].aval.shape[-1:]
    return eqn.primitive.name in ("concatenate", "add", "sub")


class Layout(NamedTuple):
    """Of the last axis: its first `features` are rotated, in pairs of halves or of neighbours."""

    features: int
    interleaved: bool

    def members(self, start: int = 0) -> tuple[Run, Run]:
        """Where the first and the second member of each pair are, of features that begin at `start`."""
        half = self.features // 2
        if self.interleaved:
            return Run(start, 2, half), Run(start + 1, 2, half)
        return Run(start, 1, half), Run(start + half, 1, half)


def _layouts(graph: Graph, root: Var) -> Iterator[Layout]:
    """All features first; where the result is put together from some and others, then only some."""
    if not root.aval.shape:
        return
    sizes = [root.aval.shape[-1]]
    eqn = graph.producer(root)
    if eqn is not None and eqn.primitive.name == "concatenate" and eqn.params["dimension"] == root.aval.ndim - 1:
        sizes = list(itertools.accumulate(a.aval.shape[-1] for a in eqn.invars))[::-1]
    for size in sizes:
        if size % 2 == 0 and size > 0:
            yield from (Layout(size, False), Layout(size, True))


class _Reading(NamedTuple):
    """y0 = x0 * c0 + x1 * s0 and y1 = x1 * c1 + x0 * s1, but for signs."""

    x: Element  # from the first of its features on, to the last of the result
    cos: tuple[Element, Element]
    sin: tuple[Element, Element]
    signs: tuple[float, float, float, float]  # of c0, s0, c1, s1


_FORWARD, _BACK = (1.0, -1.0, 1.0, 1.0), (1.0, 1.0, 1.0, -1.0)


def _rotation(graph: Graph, root: Var, layout: Layout) -> Match | Refusal | None:
    shape = root.aval.shape
    axes = tuple(0 if n == 1 else Axis(n, "b") for n in shape[:-1])
    reader = Elements(graph, frozenset(a for a in axes if isinstance(a, Axis)))
    y0, y1 = (reader.sum_of(Element(root, (*axes, run))) for run in layout.members())
    read = next(_readings(reader, layout, y0, y1, shape[-1]), None)
    if read is None:
        return None
    if layout.features < shape[-1]:
        rest = Run(layout.features, 1, shape[-1] - layout.features)
        beside = _moved(read.x, _run_of(read.x).of_slice(layout.features, 1), rest.count)
        if not _is(reader, reader.sum_of(Element(root, (*axes, rest))), beside):
            return None
    if read.signs not in (_FORWARD, _BACK):
        return refuse("its signs are not those of a rotation, x0 * c - x1 * s and x1 * c + x0 * s", depth=2)
    cos, sin = (_table(reader, layout, *members) for members in (read.cos, read.sin))
    if cos is None or sin is None:
        return refuse("the two members of a pair have different coefficients", depth=2)
    if read.signs == _BACK and cos.whole + sin.whole:
        return refuse("it is the rotation back, with a coefficient for each feature", depth=3)
    inner = tuple(reader.inner.values())
    escaped = graph.escapes(inner, [root])
    if escaped is not None:
        return refuse("an inner value ({aval}: a part of the rotation) is used elsewhere", aval=escaped.aval, depth=4)
    order = [i for i in read.x.index if isinstance(i, Axis)]
    eqn = graph.producer(root)
    assert eqn is not None
    match = Match(
        op="rope",
        root=eqn,
        results=(root,),
        inner=inner,
        leaves=(read.x.atom, cos.element.atom, sin.element.atom),
        emit=emit,
        static=(
            ("views", tuple(_view(e, order) for e in (read.x, cos.element, sin.element))),
            ("whole", (cos.whole, sin.whole)),
            ("layout", layout),
            ("back", read.signs == _BACK),
            ("order", (*(axes.index(a) for a in order), len(axes))),
            ("shape", tuple(shape)),
            ("dtype", root.aval.dtype.name),
        ),
        detail=_detail(layout, shape[-1]),
    )
    # What the kernel reads and writes, where the result is cast down.
    dtype = jnp.promote_types(read.x.atom.aval.dtype, dict(narrowed(graph, match).static)["dtype"])
    case = ("dtype", dtype.name), ("size", root.aval.size), ("interleaved", layout.interleaved)
    return dataclasses.replace(match, case=case)


def _detail(layout: Layout, d: int) -> str:
    pairs = "interleaved" if layout.interleaved else "halves"
    return pairs if layout.features == d else f"{pairs}, {layout.features} of {d} features"


# --- which factor is what ---------------------------------------------------------------------------------------------


def _readings(reader: Elements, layout: Layout, y0: Sum, y1: Sum, d: int) -> Iterator[_Reading]:
    if any(len(y) != 2 or any(len(p.factors) != 2 for p in y) for y in (y0, y1)):
        return
    for first, second in (y0, y0[::-1]):
        for (x0, c0), (x1, s0) in itertools.product(_split(first), _split(second)):
            x = _paired(reader, layout, x0, x1)
            if x is None or x.axes != reader.axes:
                continue
            for third, fourth in (y1, y1[::-1]):
                c1, s1 = _cofactor(reader, third, x1), _cofactor(reader, fourth, x0)
                if c1 is not None and s1 is not None:
                    yield _Reading(
                        _moved(x, _run_of(x), d),
                        (c0, c1),
                        (s0, s1),
                        (first.coefficient, second.coefficient, third.coefficient, fourth.coefficient),
                    )


def _split(product: Product) -> tuple[tuple[Element, Element], tuple[Element, Element]]:
    a, b = product.factors
    return (a, b), (b, a)


def _cofactor(reader: Elements, product: Product, x: Element) -> Element | None:
    return next((other for factor, other in _split(product) if reader.same(factor, x)), None)


def _paired(reader: Elements, layout: Layout, a: Element, b: Element) -> Element | None:
    """The features of which a and b are the members, along the last axis of one array; None if they are not."""
    if a.part != b.part or not a.index or a.index[:-1] != b.index[:-1] or not reader.graph.same(a.atom, b.atom):
        return None
    *batch, run = a.index
    if not isinstance(run, Run) or any(isinstance(i, Run) for i in batch) or isinstance(a.atom, Literal):
        return None
    if (run, b.index[-1]) != layout.members(run.start):
        return None
    return _moved(a, Run(run.start, 1, layout.features), layout.features)


def _run_of(element: Element) -> Run:
    run = element.index[-1]
    assert isinstance(run, Run)
    return run


def _moved(element: Element, run: Run, count: int) -> Element:
    return dataclasses.replace(element, index=(*element.index[:-1], dataclasses.replace(run, count=count)))


def _is(reader: Elements, found: Sum, element: Element) -> bool:
    return (
        len(found) == 1
        and found[0].coefficient == 1.0
        and len(found[0].factors) == 1
        and reader.same(found[0].factors[0], element)
    )


class _Table(NamedTuple):
    """whole: the element runs along all features, with a coefficient for each; else along pairs, or along none."""

    element: Element
    whole: bool


def _table(reader: Elements, layout: Layout, a: Element, b: Element) -> _Table | None:
    """The coefficients a and b of the two members of pairs, where they are equal or are themselves pairs."""
    if isinstance(a.atom, Literal) or isinstance(b.atom, Literal):
        return None
    runs = [i for i in a.index if isinstance(i, Run)]
    if reader.same(a, b) and all(r.step > 0 for r in runs):
        return _Table(a, False)
    whole = _paired(reader, layout, a, b)
    return None if whole is None else _Table(whole, True)


# --- how it is computed -----------------------------------------------------------------------------------------------


class View(NamedTuple):
    """What is read of an array: `picks` for each dimension None, a number, or the (start, limit, stride) of a slice;
    then dimensions in `order`, as `arranged` takes it."""

    picks: tuple[int | tuple[int, int, int] | None, ...]
    order: Order
    part: str


def _view(element: Element, axes: list[Axis]) -> View:
    index = element.index
    run = next((d for d, i in enumerate(index) if isinstance(i, Run)), -1)
    picks = tuple(
        None if isinstance(i, Axis) else i if isinstance(i, int) else (i.start, i.last + 1, i.step) for i in index
    )
    return View(picks, (*(index.index(a) if a in index else -1 for a in axes), run), element.part)


def _viewed(x: Any, view: View) -> Any:
    if view.part:
        x = lax.imag(x) if view.part == IMAGINARY else lax.real(x)
    for d, pick in enumerate(view.picks):
        if isinstance(pick, int):
            x = lax.slice_in_dim(x, pick, pick + 1, axis=d)
        elif pick is not None and pick != (0, x.shape[d], 1):
            start, limit, stride = pick
            x = lax.slice_in_dim(x, start, limit, stride, axis=d)
    return arranged(x, view.order)


def emit(
    x: Any,
    cos: Any,
    sin: Any,
    *,
    views: tuple[View, View, View],
    whole: tuple[bool, bool],
    layout: Layout,
    back: bool,
    order: Order,
    shape: tuple[int, ...],
    dtype: str,
):
    x, *tables = (_viewed(a, view) for a, view in zip((x, cos, sin), views, strict=True))
    x = as_precise(x, jnp.dtype(dtype))
    tables = [_of_width(t, layout, is_whole, any(whole)) for t, is_whole in zip(tables, whole, strict=True)]
    if back:
        tables[1] = -tables[1]
    y = rope(x, *tables, interleaved=layout.interleaved, rotary_dim=layout.features)
    return (restored(y, order, shape, jnp.dtype(dtype)),)


def _of_width(table: Any, layout: Layout, is_whole: bool, to_whole: bool) -> Any:
    """The table with a coefficient for each pair, or for each feature where the other table has those."""
    half = layout.features // 2
    if not is_whole:
        table = jnp.broadcast_to(table, (*table.shape[:-1], half))
        if to_whole:
            table = jnp.repeat(table, 2, axis=-1) if layout.interleaved else jnp.concatenate([table, table], axis=-1)
    return table
