"""Values with named axes: the notation in which patterns are written.

A `Term` is a value of the graph indexed by axes: `Term(x, (i, None, j))` is x[i, 0, j]. Dimensions of size 1 have the
axis None. Layout disappears: transposes, broadcasts, unit reshapes and casts between float types are walked through by
`Terms.peel`, which renames axes on the way, so that one pattern matches however the program moved its data.
Two peeled terms that are the same value with the same axes are equal in every element (up to rounding in casts).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from zenith_jax.ir._compat import JaxprEqn, Literal, Var
from zenith_jax.ir.graph import Atom, Graph


@dataclasses.dataclass(frozen=True, eq=False)
class Axis:
    """An index variable. Compared by identity."""

    size: int
    name: str = "?"

    def __repr__(self) -> str:
        return f"{self.name}{self.size}"


Axes = tuple[Axis | None, ...]


@dataclasses.dataclass(frozen=True)
class Term:
    atom: Atom
    axes: Axes

    @property
    def axis_set(self) -> frozenset[Axis]:
        return frozenset(a for a in self.axes if a is not None)

    @property
    def dtype(self) -> Any:
        return self.atom.aval.dtype


@dataclasses.dataclass(frozen=True)
class Product:
    """coefficient * product of factor ** exponent, exponents 1 or -1."""

    coefficient: float
    factors: tuple[tuple[Term, int], ...]


ELEMENTWISE = set(
    "abs add and convert_element_type cos div eq erf erfc exp ge gt integer_pow is_finite le log logistic lt max min "
    "mul ne neg not or pow rsqrt select_n sign sin sqrt square stop_gradient sub tanh".split()
)
_PASSED = {"copy", "copy_p", "pvary"}
_FLOATS = {np.dtype(d) for d in (jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64)}


def is_float(dtype: Any) -> bool:
    """Whether a cast to the dtype only rounds. A cast to an 8-bit or narrower float is quantisation, which is meant."""
    return np.dtype(dtype) in _FLOATS


class Terms:
    """Reading a graph as terms. `path`, where given, collects the equations that were walked through."""

    def __init__(self, graph: Graph):
        self.graph = graph
        # A merged axis and its parts, major first: what peeling through reshapes has found out.
        self._parts: dict[Axis, tuple[Axis, ...]] = {}
        self._merged: dict[tuple[Axis, ...], Axis] = {}

    def of(self, atom: Atom, names: str = "") -> Term:
        """The atom with a fresh axis for each dimension."""
        shape = atom.aval.shape
        names = names or "?" * len(shape)
        return Term(atom, tuple(None if n == 1 else Axis(n, c) for n, c in zip(shape, names, strict=True)))

    def producer(self, term: Term, *primitives: str) -> JaxprEqn | None:
        """The equation that computes the term, if it is one of `primitives` (or any, if none are given)."""
        eqn = self.graph.producer(term.atom)
        return eqn if eqn is not None and (not primitives or eqn.primitive.name in primitives) else None

    def constant(self, term: Term) -> float | None:
        value = self.graph.constant(term.atom)
        return None if value is None or np.asarray(value).dtype.kind in "bc" else float(value)

    def operands(self, term: Term, eqn: JaxprEqn) -> list[Term]:
        """Operands of an elementwise equation at the axes of its result."""
        shape = term.atom.aval.shape
        return [
            Term(a, term.axes)
            if a.aval.shape == shape
            else Term(a, tuple(None if n == 1 else axis for n, axis in zip(a.aval.shape, term.axes, strict=True)))
            if a.aval.shape
            else Term(a, ())
            for a in eqn.invars
        ]

    def reduced(self, term: Term, eqn: JaxprEqn) -> tuple[Term, list[Axis]]:
        """The operand of a reduction with fresh axes where it reduces, and these axes (sizes over 1)."""
        operand = eqn.invars[0]
        kept = iter(term.axes)
        axes: list[Axis | None] = []
        fresh: list[Axis] = []
        for i, n in enumerate(operand.aval.shape):
            if i not in eqn.params["axes"]:
                axes.append(next(kept))
            elif n == 1:
                axes.append(None)
            else:
                fresh.append(Axis(n, "r"))
                axes.append(fresh[-1])
        return Term(operand, tuple(axes)), fresh

    def contracted(self, term: Term, eqn: JaxprEqn) -> tuple[Term, Term, list[Axis]]:
        """Both operands of a dot_general with fresh axes where it contracts, and these axes (sizes over 1)."""
        (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = eqn.params["dimension_numbers"]
        lhs, rhs = eqn.invars[:2]
        out = list(term.axes)
        batch = out[: len(lhs_batch)]
        lhs_rank, rhs_rank = len(lhs.aval.shape), len(rhs.aval.shape)
        lhs_free = [i for i in range(lhs_rank) if i not in (*lhs_contract, *lhs_batch)]
        rhs_free = [i for i in range(rhs_rank) if i not in (*rhs_contract, *rhs_batch)]
        fresh = [None if lhs.aval.shape[i] == 1 else Axis(lhs.aval.shape[i], "c") for i in lhs_contract]
        lhs_axes: list[Axis | None] = [None] * lhs_rank
        rhs_axes: list[Axis | None] = [None] * rhs_rank
        for i, j, axis in zip(lhs_batch, rhs_batch, batch, strict=True):
            lhs_axes[i] = rhs_axes[j] = axis
        for i, j, axis in zip(lhs_contract, rhs_contract, fresh, strict=True):
            lhs_axes[i] = rhs_axes[j] = axis
        free = out[len(lhs_batch) :]
        for i, axis in zip(lhs_free, free[: len(lhs_free)], strict=True):
            lhs_axes[i] = axis
        for j, axis in zip(rhs_free, free[len(lhs_free) :], strict=True):
            rhs_axes[j] = axis
        return Term(lhs, tuple(lhs_axes)), Term(rhs, tuple(rhs_axes)), [a for a in fresh if a is not None]

    def peel(self, term: Term, path: list[JaxprEqn] | None = None, also: Sequence[str] = ()) -> Term:
        """The term below views, float casts, and operations with a neutral constant; `also`: more to pass.

        With "reshape" among them, reshapes that merge or split axes are passed too; see `split`.
        """
        while (eqn := self.graph.producer(term.atom)) is not None:
            below = self._below(term, eqn, also)
            if below is None:
                return term
            if path is not None:
                path.append(eqn)
            term = below
        return term

    def _below(self, term: Term, eqn: JaxprEqn, also: Sequence[str]) -> Term | None:
        name = eqn.primitive.name
        operand: Any = eqn.invars[0] if eqn.invars else None
        if isinstance(operand, Literal) and name not in ("mul", "add"):
            return None
        if name in _PASSED or (name in also and name != "reshape"):
            return Term(operand, term.axes)
        if name == "convert_element_type":
            floats = is_float(operand.aval.dtype) and is_float(eqn.outvars[0].aval.dtype)
            return Term(operand, term.axes) if floats else None
        if name == "transpose":
            axes: list[Axis | None] = [None] * len(term.axes)
            for out_dim, in_dim in enumerate(eqn.params["permutation"]):
                axes[in_dim] = term.axes[out_dim]
            return Term(operand, tuple(axes))
        if name == "broadcast_in_dim":
            dims = eqn.params["broadcast_dimensions"]
            return Term(
                operand, tuple(None if n == 1 else term.axes[d] for n, d in zip(operand.aval.shape, dims, strict=True))
            )
        if name in ("reshape", "squeeze", "expand_dims"):
            below = self._below_unit_reshape(term, operand)
            return self._regrouped(term, operand) if below is None and "reshape" in also else below
        if name == "select_n":  # jnp.var: where(N - ddof > 0, var, nan) with a constant condition
            which = self.graph.constant(operand)
            chosen = None if which is None else eqn.invars[1 + int(which)]
            return Term(chosen, term.axes) if isinstance(chosen, Var) else None
        if name in ("mul", "div", "add", "sub"):
            return self._below_neutral(term, eqn)
        return None

    @staticmethod
    def _below_unit_reshape(term: Term, operand: Atom) -> Term | None:
        """x.reshape(...) that only adds or removes dimensions of size 1."""
        old = [n for n in operand.aval.shape if n != 1]
        new = [n for n in term.atom.aval.shape if n != 1]
        if old != new:
            return None
        named = iter([a for n, a in zip(term.atom.aval.shape, term.axes, strict=True) if n != 1])
        return Term(operand, tuple(None if n == 1 else next(named) for n in operand.aval.shape))

    def _regrouped(self, term: Term, operand: Atom) -> Term | None:
        """x.reshape(...) where the dimensions of both sides are some neighbours of common parts of them."""
        cut = _common_parts(operand.aval.shape, term.atom.aval.shape)
        if cut is None:
            return None
        below, above = cut
        parts: list[Axis] = []
        for d, sizes in above:
            axis = term.axes[d]
            if axis is None:
                return None
            if len(sizes) == 1:
                parts.append(axis)
                continue
            found = self._parts.get(axis) or tuple(Axis(n, "p") for n in sizes)
            if [a.size for a in found] != sizes:
                return None
            self._remember(axis, found)
            parts += found
        axes: list[Axis | None] = [None] * len(operand.aval.shape)
        for d, sizes in below:
            own, parts = parts[: len(sizes)], parts[len(sizes) :]
            axis = own[0]
            if len(own) > 1:
                axis = self._merged.get(tuple(own)) or Axis(operand.aval.shape[d], "m")
                self._remember(axis, tuple(own))
            axes[d] = axis
        return Term(operand, tuple(axes))

    def _remember(self, merged: Axis, parts: tuple[Axis, ...]) -> None:
        self._parts[merged] = parts
        self._merged[parts] = merged

    def split(self, term: Term) -> Term:
        """The term as if its array were reshaped so that no axis is a merged one: axes of `term.atom.reshape(sizes)`,
        the sizes being theirs."""

        def parts(axis: Axis | None) -> tuple[Axis | None, ...]:
            if axis is None or axis not in self._parts:
                return (axis,)
            return tuple(p for a in self._parts[axis] for p in parts(a))

        return Term(term.atom, tuple(p for a in term.axes for p in parts(a)))

    def unrepeated(self, term: Term, among: frozenset[Axis]) -> Term:
        """The term below a repetition along part of an axis, jnp.repeat's broadcast and reshape; without one, the term.

        The axis, one of `among`, is split: the result lacks one of its parts.
        """
        known = dict(self._parts), dict(self._merged)
        below = self.peel(term, also=("reshape",))
        lost = self.split(term).axis_set - self.split(below).axis_set
        split = {a for a in self._parts if a not in known[0] and a in term.axis_set}
        if lost and split <= among:
            return below
        self._parts, self._merged = known
        return term

    def _below_neutral(self, term: Term, eqn: JaxprEqn) -> Term | None:
        """x * 1, 1 * x, x / 1, x + 0, 0 + x, x - 0 -> x, where the result has the axes of x."""
        name = eqn.primitive.name
        neutral = 1.0 if name in ("mul", "div") else 0.0
        operands = self.operands(term, eqn)
        sides = ((0, 1), (1, 0)) if name in ("mul", "add") else ((0, 1),)
        for x, other in sides:
            if self.constant(operands[other]) == neutral and not isinstance(operands[x].atom, Literal):
                if self.constant(operands[x]) is None:
                    return operands[x]
        return None

    def product(self, term: Term, path: list[JaxprEqn] | None = None, also: Sequence[str] = ()) -> Product:
        """The term as a product, flattened through mul, div, neg, views and what `also` names, as in `peel`.

        Not through a value that is used more than once, except at the top: gelu(a * b) is gelu of one value.
        """
        coefficient = 1.0
        factors: list[tuple[Term, int]] = []
        walked: list[JaxprEqn] = []

        def visit(term: Term, exponent: int, top: bool) -> None:
            nonlocal coefficient
            value = self.constant(term)
            if value is not None:
                coefficient *= value if exponent > 0 else (1 / value if value else float("inf"))
                return
            steps: list[JaxprEqn] = []
            inner = self.peel(term, steps, also)
            eqn = self.graph.producer(inner.atom)
            single = all(self.graph.use_count(e.outvars[0]) == 1 for e in steps)
            if (
                eqn is None
                or eqn.primitive.name not in ("mul", "div", "neg")
                or not (top or (single and self.graph.use_count(eqn.outvars[0]) == 1))
            ):
                walked.extend(steps)
                factors.append((inner, exponent))
                return
            walked.extend((*steps, eqn))
            operands = self.operands(inner, eqn)
            if eqn.primitive.name == "neg":
                coefficient = -coefficient
                visit(operands[0], exponent, False)
                return
            visit(operands[0], exponent, False)
            visit(operands[1], exponent if eqn.primitive.name == "mul" else -exponent, False)

        visit(term, 1, True)
        if path is not None:
            path.extend(walked)
        return Product(coefficient, tuple(factors))

    def unify(self, pattern: Term, term: Term, fresh: Sequence[Axis]) -> dict[Axis, Axis] | None:
        """Axes to put for the `fresh` ones so that both terms, peeled, are the same value; None if there are none."""
        pattern, term = self.peel(pattern), self.peel(term)
        if isinstance(pattern.atom, Literal) or not self.graph.same(pattern.atom, term.atom):
            return None
        bound: dict[Axis, Axis] = {}
        for p, t in zip(pattern.axes, term.axes, strict=True):
            if p is t:
                continue
            if p is None or t is None or p not in fresh or bound.setdefault(p, t) is not t:
                return None
        return bound if len(set(bound.values())) == len(bound) else None

    def same(self, a: Term, b: Term) -> bool:
        return self.unify(a, b, ()) is not None


_Cut = list[tuple[int, list[int]]]


def _common_parts(old: Sequence[int], new: Sequence[int]) -> tuple[_Cut, _Cut] | None:
    """Dimensions of `old` and of `new`, sizes over 1 only, each with the sizes of its parts, major first: cut wherever
    a dimension of either begins. (C, H, W) and (G, L) have the parts G, C / G, H, W. None if some part is no integer.
    """
    if math.prod(old) != math.prod(new):
        return None

    def ends(shape: Sequence[int]) -> list[int]:
        """For each dimension the number of elements of it and all after it."""
        return [math.prod(shape[d:]) for d in range(len(shape))]

    cuts = sorted({1, *ends(old), *ends(new)})
    if 0 in cuts or any(b % a for a, b in itertools.pairwise(cuts)):
        return None

    def cut(shape: Sequence[int]) -> _Cut:
        found = []
        for d, (n, end) in enumerate(zip(shape, ends(shape), strict=True)):
            inside = [c for c in cuts if end // n <= c <= end]
            if n != 1:
                found.append((d, [b // a for a, b in itertools.pairwise(inside)][::-1]))
        return found

    return cut(old), cut(new)
