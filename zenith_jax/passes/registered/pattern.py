"""Finding a reference in a graph: from the rarest primitive of the pattern up to its result, then down, twice.

1. From an equation with the pattern's rarest primitive, climb to values that could be its result.
2. Loose: lay the pattern, traced at made-up sizes, over each of them, primitives alone; that gives the arguments.
3. Strict: trace the reference at the arguments' own shapes, dtypes and attributes, and require equality.
4. Nothing inside may be used outside, and the replacement must return what the reference returns.

The furthest-reaching reason why not is the Refusal.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from zenith_jax.errors import RegistrationError
from zenith_jax.ir._compat import JaxprEqn, Var
from zenith_jax.ir.graph import Graph
from zenith_jax.ir.term import Axis, Term, Terms, is_float
from zenith_jax.ops._op import Spec
from zenith_jax.passes.registered.semantics import VIEWS, unknown_primitive
from zenith_jax.passes.registered.unify import Leaf, Unifier

# Made-up sizes of letters and batch dimensions: even, for references that halve an axis, and all different.
SIZES = (6, 10, 14, 22, 26, 34, 38, 46, 58, 62, 74, 82)
BATCH_SIZES = (4, 8, 16, 20)
MAX_CLIMB = 64  # equations from the anchor up to a result

# Rare in programs, first: each equation with the anchor's primitive costs a comparison.
RARITY = (
    "erf_inv erf erfc cbrt sinh cosh tan atan2 log1p expm1 logistic tanh sin cos rsqrt sqrt top_k sort "
    "conv_general_dilated gather cumsum cumprod cummax argmax argmin exp log custom_jvp_call dot_general reduce_max "
    "reduce_prod reduce_min reduce_sum iota pow round floor ceil integer_pow square concatenate"
).split()


@dataclasses.dataclass(frozen=True, eq=False)
class Pattern:
    """The graph of a reference at certain shapes. roots: its results, below views; anchor: its rarest primitive."""

    graph: Graph
    terms: Terms
    results: tuple[Var, ...]
    roots: tuple[Term, ...]
    anchor: str

    @property
    def avals(self) -> tuple[Any, ...]:
        return tuple(v.aval for v in self.results)


def traced(reference: Any, avals: Sequence[Any], attributes: dict[str, Any], name: str) -> Pattern:
    """Raises RegistrationError where the reference cannot be a pattern."""
    jaxpr = jax.make_jaxpr(lambda *args: jax.tree.leaves(reference(*args, **attributes)))(*avals)
    graph = Graph.of(jaxpr)
    terms = Terms(graph)
    for eqn in graph.eqns:
        why = unknown_primitive(eqn)
        if why is not None or eqn.effects:
            raise RegistrationError(f"{name}: the reference's primitive {eqn.primitive.name} {why or 'has an effect'}")
    for result in graph.outvars:
        if not isinstance(result, Var) or graph.producer(result) is None:
            raise RegistrationError(f"{name}: the reference returns an argument or a constant; return computed values")
    roots = tuple(terms.peel(terms.of(v)) for v in graph.outvars)
    inside = [e for e in graph.eqns if e.primitive.name not in VIEWS and e.primitive.name != "convert_element_type"]
    if not inside or any(terms.producer(root) is None for root in roots):
        raise RegistrationError(f"{name}: the reference computes nothing: it only moves data")
    unused = [i for i, v in enumerate(graph.invars) if not graph.users_of(v)]
    if unused:
        raise RegistrationError(f"{name}: the reference does not use its arguments {unused}: nothing binds them")
    below = _ancestors(graph, roots[0].atom)
    counts = Counter(e.primitive.name for e in inside if e.outvars[0] in below)
    rank = {primitive: i for i, primitive in enumerate(RARITY)}
    anchor = min(counts, key=lambda primitive: (rank.get(primitive, len(rank)), counts[primitive]))
    return Pattern(graph, terms, tuple(graph.outvars), roots, str(anchor))


def _ancestors(graph: Graph, var: Any) -> set[Any]:
    seen, stack = set(), [var]
    while stack:
        eqn = graph.producer(stack.pop())
        if eqn is not None and eqn.outvars[0] not in seen:
            seen.update(eqn.outvars)
            stack.extend(a for a in eqn.invars if isinstance(a, Var))
    return seen


def avals_of(specs: Sequence[Spec], batch_rank: int, dtypes: Sequence[Any]) -> list[jax.ShapeDtypeStruct]:
    """Arguments at made-up sizes; a letter that is a number is that size."""
    letters = sorted({a for s in specs for a in s.axes if not a.isdigit()})
    if len(letters) > len(SIZES):
        raise RegistrationError(f"at most {len(SIZES)} letters in a signature, got {letters}")
    sizes = dict(zip(letters, SIZES, strict=False))
    return [
        jax.ShapeDtypeStruct(
            (*(BATCH_SIZES[:batch_rank] if s.batched else ()), *(int(a) if a.isdigit() else sizes[a] for a in s.axes)),
            dtype,
        )
        for s, dtype in zip(specs, dtypes, strict=True)
    ]


@dataclasses.dataclass(frozen=True, eq=False)
class Found:
    """The pattern at a place: per argument its value and how it is laid out, the results, and all equations."""

    leaves: tuple[Leaf, ...]
    high: bool  # arguments are the values above casts
    attributes: dict[str, Any]
    results: tuple[Var, ...]
    result_orders: tuple[tuple[int, ...], ...]
    inner: tuple[JaxprEqn, ...]
    avals: tuple[Any, ...]


@dataclasses.dataclass
class Difference:
    """The furthest-reaching reason so far."""

    text: str = ""
    depth: int = 0

    def note(self, text: str, depth: int) -> None:
        if depth > self.depth:
            self.text, self.depth = text, depth


def candidates(graph: Graph, pattern: Pattern, eqn: JaxprEqn) -> Iterator[JaxprEqn]:
    """Equations above `eqn`, the anchor, with the primitive of the pattern's first result."""
    root: Any = pattern.terms.producer(pattern.roots[0])
    names = {root.primitive.name, *({"mul", "div"} if root.primitive.name in ("mul", "div") else ())}
    limit = len(pattern.graph.eqns) + 8
    seen: set[int] = set()
    level = [eqn]
    for _ in range(min(MAX_CLIMB, limit)):
        above = []
        for e in level:
            if id(e) in seen:
                continue
            seen.add(id(e))
            if e.primitive.name in names:
                yield e
            above += [user for v in e.outvars for user in graph.users_of(v)]
        level = above[:256]
        if not level:
            return


def alignments(pattern: Term, found: Term, *, strict: bool) -> Iterator[dict[Axis, Axis | None]]:
    """Which axis of the program each axis of the pattern's result may be; as written first."""
    mine = [a for a in pattern.axes if a is not None]
    theirs = [a for a in found.axes if a is not None]
    if len(mine) == len(theirs):
        for order in itertools.islice(itertools.permutations(theirs), 24):
            if not strict or all(a.size == b.size for a, b in zip(mine, order, strict=True)):
                yield dict(zip(mine, order, strict=True))
    elif not strict and len(pattern.axes) == len(found.axes):
        yield {a: b for a, b in zip(pattern.axes, found.axes, strict=True) if a is not None}


def laid_over(
    graph: Graph, pattern: Pattern, root: JaxprEqn, holes: dict[str, float], difference: Difference, *, strict: bool
) -> Iterator[tuple[Unifier, tuple[Term, ...]]]:
    """Ways in which the pattern lies over the program with its first result at `root`: (bindings, result terms)."""
    # A root among several results of one equation (split, top_k) is the one at the same place.
    producer: Any = pattern.terms.producer(pattern.roots[0])
    position = producer.outvars.index(pattern.roots[0].atom)
    if position >= len(root.outvars):
        return
    top = Terms(graph).of(root.outvars[position])
    for axes in alignments(pattern.roots[0], top, strict=strict):
        unifier = Unifier(pattern.graph, graph, strict=strict, holes=holes)
        unifier.found.axes.update(axes)
        if unifier.same(pattern.roots[0], top):
            terms = _other_results(graph, pattern, unifier, top)
            if terms is not None and all(v in unifier.found.leaves for v in pattern.graph.invars):
                yield unifier, terms
                continue
            unifier.differs("a second result of the reference is not computed here")
        # A strict difference is one of something that has all primitives of the pattern.
        difference.note(unifier.why, unifier.why_depth + (1 + len(pattern.graph.eqns) if strict else 0))


def _other_results(graph: Graph, pattern: Pattern, unifier: Unifier, top: Term) -> tuple[Term, ...] | None:
    found = [top]
    for root in pattern.roots[1:]:
        known = next((t for p, t in unifier.found.values.items() if _is_renamed(p, root, unifier)), None)
        term = known or _computed_elsewhere(graph, pattern, root, unifier)
        if term is None:
            return None
        found.append(term)
    return tuple(found)


def _is_renamed(p: Term, root: Term, unifier: Unifier) -> bool:
    """Whether p is the value `root`; then root's axes become p's."""
    if p.atom is not root.atom:
        return False
    unifier.found.axes.update((a, unifier.found.axes[b]) for a, b in zip(root.axes, p.axes, strict=True) if a and b)
    return True


def _computed_elsewhere(graph: Graph, pattern: Pattern, root: Term, unifier: Unifier) -> Term | None:
    """A result that the first one does not need, computed from what has been found by now."""
    producer: Any = pattern.terms.producer(root)
    level = [v for t in unifier.found.values.values() for v in [t.atom]] + [
        leaf.low for leaf in unifier.found.leaves.values() if isinstance(leaf.low, Var)
    ]
    seen: set[int] = set()
    for _ in range(len(pattern.graph.eqns) + 4):
        users = [e for v in level for e in graph.users_of(v) if id(e) not in seen]
        for e in users:
            seen.add(id(e))
            if e.primitive.name != producer.primitive.name:
                continue
            top = Terms(graph).of(e.outvars[0])
            for axes in alignments(root, top, strict=unifier.strict):
                before = unifier.found.copied()
                unifier.found.axes.update(axes)
                if unifier.same(root, top):
                    return top
                unifier.found.restore(before)
        level = [v for e in users[:256] for v in e.outvars]
    return None


def finished(
    graph: Graph, pattern: Pattern, unifier: Unifier, tops: Sequence[Term], *, high: bool, difference: Difference
) -> Found | None:
    """A strict match with its results brought to the reference's dtypes."""
    results, orders, extra = [], [], []
    for var, root, top in zip(pattern.results, pattern.roots, tops, strict=True):
        reached = _with_dtype(graph, top, var.aval.dtype)
        if reached is None:
            difference.note(
                f"the result is {top.dtype} where the reference returns {var.aval.dtype}", 2 * len(pattern.graph.eqns)
            )
            return None
        result, path = reached
        extra += path
        # The axes of the reference's own result, in the program's result: views between the two are undone.
        own = pattern.terms.of(var)
        below = pattern.terms.peel(own)
        back = {b: a for a, b in zip(below.axes, root.axes, strict=True) if a is not None and b is not None}
        renamed = {a: unifier.found.axes.get(b) for b, a in back.items()}
        order = []
        for axis in own.axes:
            target = None if axis is None else renamed.get(axis)
            order.append(-1 if target is None else top.axes.index(target))
        results.append(result)
        orders.append(tuple(order))
    leaves = tuple(unifier.found.leaves[v] for v in pattern.graph.invars)
    inner = tuple({**unifier.found.inner, **{id(e): e for e in extra}}.values())
    attributes = dict(unifier.found.attributes)
    return Found(leaves, high, attributes, tuple(results), tuple(orders), inner, pattern.avals)


def _with_dtype(graph: Graph, top: Term, dtype: Any) -> tuple[Var, list[JaxprEqn]] | None:
    """The value, cast where the program casts it next: its casts up to the reference's dtype belong to the pattern."""
    var, path = top.atom, []
    while var.aval.dtype != dtype:
        users = graph.users_of(var)
        if len(users) != 1 or graph.is_output(var) or users[0].primitive.name != "convert_element_type":
            return None
        if not is_float(users[0].outvars[0].aval.dtype):
            return None
        path.append(users[0])
        var = users[0].outvars[0]
    return var, path


def value_of(leaf: Leaf, high: bool) -> Any:
    return leaf.high if high else leaf.low


def aval_of(leaf: Leaf, high: bool) -> jax.ShapeDtypeStruct:
    aval = value_of(leaf, high).aval
    return jax.ShapeDtypeStruct(leaf.sizes, aval.dtype, weak_type=False)


def laid_out(x: Any, order: Sequence[int], sizes: Sequence[int]) -> Any:
    """x as the reference's argument: dimension order[i] as dimension i, broadcast where that is -1."""
    named = [d for d in order if d >= 0]
    rest = [d for d in range(x.ndim) if d not in named]
    x = jnp.transpose(x, (*named, *rest)) if x.ndim else x
    shape = [1 if d < 0 else n for d, n in zip(order, sizes, strict=True)]
    return jnp.broadcast_to(x.reshape(shape), tuple(sizes))
