"""Whether a value of a program is computed as a value of a pattern is: two graphs read as terms, side by side.

Every axis of the pattern stands for one axis of the program. The root's axes are given (passes/registered/pattern.py
tries the possible ones); an axis that a reduction or contraction sums over is bound where it is met. Below that,
elementwise equations are compared operand by operand at these axes, so that transposes, broadcasts, unit reshapes and
float casts, which `Terms.peel` walks through, need not be written alike. A leaf of the pattern binds to whatever value
stands there, always the same one, and every axis of that value must be one of the leaf's.

Two passes share this code. The loose one compares primitives alone, and finds out what leaves and attributes are; the
strict one compares a trace of the reference at just these shapes, dtypes and attributes, and everything counts.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from zenith_jax.ir._compat import JaxprEqn, Literal, Var
from zenith_jax.ir.graph import Atom, Graph
from zenith_jax.ir.term import Axis, Term, Terms
from zenith_jax.passes.registered.semantics import (
    COMMUTATIVE,
    ELEMENTWISE,
    POSITIONAL,
    REDUCTIONS,
    same_function,
    same_params,
)

STEPS = 4000  # comparisons per candidate; commutative operands can be tried in 2^n orders


@dataclasses.dataclass(frozen=True)
class Leaf:
    """What a pattern's argument stands for. `high` is the value above the casts that `low` is below."""

    low: Atom
    high: Atom
    order: tuple[int, ...]  # for each dimension of the argument the dimension of the value, or -1
    sizes: tuple[int, ...]


@dataclasses.dataclass
class Bindings:
    """What has been found so far; copied where two ways are tried."""

    axes: dict[Axis, Axis | None]
    leaves: dict[Var, Leaf]
    attributes: dict[str, Any]
    values: dict[Term, Term]  # the pattern's -> the program's
    inner: dict[int, JaxprEqn]

    def copied(self) -> Bindings:
        return Bindings(*(dict(getattr(self, f.name)) for f in dataclasses.fields(self)))

    def restore(self, other: Bindings) -> None:
        for f in dataclasses.fields(self):
            setattr(self, f.name, getattr(other, f.name))


class Unifier:
    """One comparison of a pattern's graph with a program's. `why` is the deepest difference that was met."""

    def __init__(self, pattern: Graph, program: Graph, *, strict: bool, holes: dict[str, float]):
        self.pattern, self.program = Terms(pattern), Terms(program)
        self.strict, self.holes = strict, holes
        self.leaves = {v: i for i, v in enumerate(pattern.invars)}
        self.found = Bindings({}, {}, {}, {}, {})
        self.steps = 0
        self.why, self.why_depth = "", -1

    def differs(self, why: str) -> bool:
        depth = len(self.found.inner)
        if depth > self.why_depth:
            self.why, self.why_depth = why, depth
        return False

    def same(self, p: Term, t: Term) -> bool:
        """Whether `t` is computed as `p` is, under `found`, which this extends."""
        self.steps += 1
        if self.steps > STEPS:
            return self.differs("the pattern can be laid over the program in too many ways")
        expected = _constant(self.pattern.graph, p)
        if expected is not None:
            return self._same_constant(expected, t)
        path: list[JaxprEqn] = []
        p, high, t = self.pattern.peel(p), t, self.program.peel(t, path)
        if p.atom in self.leaves:
            return self._bind_leaf(p, high, t, path)
        expected = _constant(self.pattern.graph, p)
        if expected is not None:
            return self._same_constant(expected, t)
        pe, te = self.pattern.producer(p), self.program.producer(t)
        if pe is None:
            return self.differs("the reference closes over an array; pass it as an argument")
        if te is None:
            return self.differs(f"there is an input where the reference has {pe.primitive.name}")
        if self.found.values.get(p) == t:
            return True
        before = self.found.copied()
        for e in path:
            self.found.inner[id(e)] = e
        if self._same_equation(pe, te, p, t):
            self.found.inner[id(te)] = te
            self.found.values[p] = t
            return True
        self.found.restore(before)
        return False

    # --- leaves and constants ---

    def _same_constant(self, expected: Any, t: Term) -> bool:
        actual = _constant(self.program.graph, t)
        if actual is None:
            actual = _constant(self.program.graph, self.program.peel(t))
        if actual is None:
            return self.differs(f"there is no constant where the reference has {expected}")
        for name, sentinel in self.holes.items():
            if not self.strict and np.dtype(type(expected)).kind in "fi" and expected == type(expected)(sentinel):
                return self.found.attributes.setdefault(name, actual.item()) == actual.item()
        if self.strict and not np.array_equal(expected, actual, equal_nan=np.dtype(type(expected)).kind == "f"):
            return self.differs(f"the constant is {actual}, the reference's {expected}")
        return True

    def _bind_leaf(self, p: Term, high: Term, t: Term, path: Sequence[JaxprEqn]) -> bool:
        axes = [None if a is None else self.found.axes.get(a) for a in p.axes]
        if not t.axis_set <= set(axes):
            return self.differs("an operand has an axis that the reference's argument does not have")
        order = tuple(-1 if a is None or a not in t.axes else t.axes.index(a) for a in axes)
        sizes = tuple(1 if a is None else a.size for a in axes)
        # The value above casts, where that is all that was walked: the reference may want it in either dtype.
        only_casts = all(e.primitive.name == "convert_element_type" for e in path)
        leaf = Leaf(t.atom, high.atom if only_casts else t.atom, order, sizes)
        known = self.found.leaves.get(p.atom)
        if known is None:
            self.found.leaves[p.atom] = leaf
        elif (known.order, known.sizes) != (order, sizes) or not self._same_atom(known.low, t.atom):
            return self.differs("two values stand where the reference uses one argument twice")
        for e in path:
            self.found.inner[id(e)] = e
        return True

    def _same_atom(self, a: Atom, b: Atom) -> bool:
        if isinstance(a, Literal) or isinstance(b, Literal):
            return (
                isinstance(a, Literal) and isinstance(b, Literal) and a.aval == b.aval and np.array_equal(a.val, b.val)
            )
        return self.program.graph.same(a, b)

    # --- equations ---

    def _same_equation(self, pe: JaxprEqn, te: JaxprEqn, p: Term, t: Term) -> bool:
        name: Any = pe.primitive.name
        if name != te.primitive.name:
            return self._other_spelling(pe, te, p, t) or self.differs(
                f"there is {te.primitive.name} where the reference has {name}"
            )
        if self.strict:
            expected, actual = p.dtype, t.dtype
            if expected != actual:
                return self.differs(f"{name} is computed in {actual}, by the reference in {expected}")
        if name in ELEMENTWISE:
            if self.strict and not same_params(pe, te, ELEMENTWISE[name]):
                return self.differs(f"{name} has other params than the reference's")
            return self._same_operands(name, self.pattern.operands(p, pe), self.program.operands(t, te))
        if name in REDUCTIONS:
            return self._same_reduction(pe, te, p, t)
        if name == "dot_general":
            return self._same_product(pe, te, p, t)
        if name == "iota":
            mine, theirs = p.axes[pe.params["dimension"]], t.axes[te.params["dimension"]]
            same = mine is None or self.found.axes.get(mine) is theirs
            return same or self.differs("an iota counts along another axis")
        if name in POSITIONAL:
            return self._same_positions(pe, te, p, t)
        return self.differs(f"{name} is not compared")

    def _same_operands(self, name: str, ps: Sequence[Term], ts: Sequence[Term]) -> bool:
        if len(ps) != len(ts):
            return self.differs(f"{name} has {len(ts)} operands, the reference's {len(ps)}")
        orders = [ts, ts[::-1]] if name in COMMUTATIVE and len(ts) == 2 else [ts]
        before = self.found.copied()
        for order in orders:
            if all(self.same(p, t) for p, t in zip(ps, order, strict=True)):
                return True
            self.found.restore(before.copied())
        return False

    def _other_spelling(self, pe: JaxprEqn, te: JaxprEqn, p: Term, t: Term) -> bool:
        """square(x), x ** 2 and x * x are one; so are x / sqrt(v) and x * rsqrt(v)."""
        mine, theirs = _squared(self.pattern, p, pe), _squared(self.program, t, te)
        if mine is not None and theirs is not None:
            if self.strict and p.dtype != t.dtype:
                return self.differs("a square is computed in another dtype")
            return self.same(mine, theirs)
        if {pe.primitive.name, te.primitive.name} != {"mul", "div"} or (self.strict and p.dtype != t.dtype):
            return False
        for x, root in _over_root(self.pattern, p, pe):
            for y, other in _over_root(self.program, t, te):
                before = self.found.copied()
                under = self.pattern.operands(root, self.pattern.graph.producer(root.atom))[0]  # pyright: ignore[reportArgumentType]
                producer = self.program.graph.producer(other.atom)
                assert producer is not None
                below = self.program.operands(other, producer)[0]
                if self.same(x, y) and self.same(under, below):
                    self.found.inner[id(producer)] = producer
                    for e in self._views_above(te, other):
                        self.found.inner[id(e)] = e
                    return True
                self.found.restore(before)
        return False

    def _views_above(self, te: JaxprEqn, root: Term) -> list[JaxprEqn]:
        for operand in te.invars:
            if isinstance(operand, Var):
                path: list[JaxprEqn] = []
                if self.program.peel(self.program.of(operand), path).atom is root.atom:
                    return path
        return []

    def _same_reduction(self, pe: JaxprEqn, te: JaxprEqn, p: Term, t: Term) -> bool:
        inner_p, fresh_p = self.pattern.reduced(p, pe)
        inner_t, fresh_t = self.program.reduced(t, te)
        return self._with_fresh(pe.primitive.name, fresh_p, fresh_t, [(inner_p, inner_t)])

    def _same_product(self, pe: JaxprEqn, te: JaxprEqn, p: Term, t: Term) -> bool:
        if self.strict and not same_params(pe, te, ("precision", "preferred_element_type")):
            return self.differs("a dot_general has another precision than the reference's")
        if self._dot_is_degenerate(pe, te):
            return self.differs("a product is batched over an axis of size 1 in one of the two")
        lhs_p, rhs_p, fresh_p = self.pattern.contracted(p, pe)
        lhs_t, rhs_t, fresh_t = self.program.contracted(t, te)
        for pair in ((lhs_t, rhs_t), (rhs_t, lhs_t)):
            if self._with_fresh("dot_general", fresh_p, fresh_t, list(zip((lhs_p, rhs_p), pair, strict=True))):
                return True
        return False

    @staticmethod
    def _dot_is_degenerate(pe: JaxprEqn, te: JaxprEqn) -> bool:
        return not all(e.outvars[0].aval.size for e in (pe, te))

    def _with_fresh(self, name: Any, ps: list[Axis], ts: list[Axis], pairs: Sequence[tuple[Term, Term]]) -> bool:
        """Binds axes that are summed over, in any order, and compares the operands."""
        if len(ps) != len(ts) and (self.strict or len(ps) < len(ts)):
            return self.differs(f"{name} runs over {len(ts)} axes, the reference's over {len(ps)}")
        before = self.found.copied()
        padded: list[Axis | None] = [*ts, *[None] * (len(ps) - len(ts))]
        for order in itertools.islice(itertools.permutations(padded), 24):
            if self.strict and any(a.size != (1 if b is None else b.size) for a, b in zip(ps, order, strict=True)):
                continue
            self.found.axes.update(zip(ps, order, strict=True))
            if all(self.same(p, t) for p, t in pairs):
                return True
            self.found.restore(before.copied())
        return self.differs(f"{name} runs over another axis than the reference's")

    def _same_positions(self, pe: JaxprEqn, te: JaxprEqn, p: Term, t: Term) -> bool:
        """Equations whose params name dimensions: dimension i of the one must be dimension i of the other."""
        name: Any = pe.primitive.name
        if [len(a.aval.shape) for a in pe.invars] != [len(a.aval.shape) for a in te.invars]:
            return self.differs(f"{name} has operands of other ranks")
        if pe.outvars.index(p.atom) != te.outvars.index(t.atom):
            return self.differs(f"another result of {name} is used")
        if self.strict:
            shapes = [[tuple(a.aval.shape) for a in (*e.invars, *e.outvars)] for e in (pe, te)]
            if shapes[0] != shapes[1] or not same_params(pe, te, POSITIONAL[name]):
                return self.differs(f"{name} has other params or shapes than the reference's")
        if name == "custom_jvp_call" and self.strict:
            if not same_function(pe.params["call_jaxpr"], te.params["call_jaxpr"]):
                return self.differs("a function with a derivative rule of its own is another one")
        if any(a is not None and self.found.axes.get(a) is not b for a, b in zip(p.axes, t.axes, strict=True)):
            return self.differs(f"{name} has its dimensions in another order")
        for a, b in zip(pe.invars, te.invars, strict=True):
            left, right = self.pattern.of(a), self.program.of(b)
            for i, j in zip(left.axes, right.axes, strict=True):
                if i is not None:
                    self.found.axes[i] = j
            if not self.same(left, right):
                return False
        return True


def _constant(graph: Graph, term: Term) -> Any | None:
    """The one value of all elements, in the dtype that the program gives it."""
    value = graph.constant(term.atom)
    return None if value is None else np.asarray(value).astype(term.dtype)[()]


def _squared(terms: Terms, term: Term, eqn: JaxprEqn) -> Term | None:
    operands = terms.operands(term, eqn) if eqn.primitive.name in ("square", "integer_pow", "mul", "pow") else []
    name = eqn.primitive.name
    if name == "square" or (name == "integer_pow" and eqn.params["y"] == 2):
        return operands[0]
    if name == "mul" and terms.same(*operands):
        return operands[0]
    return operands[0] if name == "pow" and terms.constant(operands[1]) == 2.0 else None


def _over_root(terms: Terms, term: Term, eqn: JaxprEqn) -> Iterator[tuple[Term, Term]]:
    """(x, the root) of x / sqrt(v) and x * rsqrt(v)."""
    first, second = terms.operands(term, eqn)
    if eqn.primitive.name == "div":
        root = terms.peel(second)
        if terms.producer(root, "sqrt"):
            yield first, root
        return
    for x, other in ((first, second), (second, first)):
        root = terms.peel(other)
        if terms.producer(root, "rsqrt"):
            yield x, root
