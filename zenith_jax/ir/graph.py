"""A jaxpr as a graph: inlined, with producers, users, constants and value numbers. Pure; nothing here knows an op.

`Graph.of(jaxpr)` inlines nested `jit`, removes dead equations, and indexes what is left. Values that are computed twice
are known to be the same (`graph.same`) and stay two values: what a program computes once for each of two norms may be
fused into both of them, what it computes once and uses twice may not.
`graph.rewritten(replacements)` gives the jaxpr with equations replaced, in a valid order, without duplicates.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.core
import numpy as np

from zenith_jax.ir import _compat
from zenith_jax.ir._compat import DropVar, JaxprEqn, Literal, Var

Atom = Any  # Var | Literal

INLINED = {"jit", "pjit", "closed_call", "core_call"}

# Primitives that are value-numbered: deterministic, without sub-jaxprs, their params hashable.
NUMBERED = set(
    "abs add and broadcast_in_dim convert_element_type copy copy_p cos div dot_general eq erf erfc exp expand_dims ge "
    "gt integer_pow iota is_finite le log logistic lt max min mul ne neg not or pow reduce_max reduce_min reduce_sum "
    "reshape rsqrt select_n sign sin sqrt square squeeze stop_gradient sub tanh transpose pvary zenith_call".split()
)

VIEWS = frozenset(
    "broadcast_in_dim convert_element_type copy copy_p expand_dims pvary reshape squeeze transpose".split()
)


@dataclasses.dataclass(frozen=True, eq=False)
class Graph:
    """invars, constvars and outvars as in a jaxpr; equations in a topological order, none dead."""

    source: Any  # the jaxpr this came from, open or closed
    invars: Sequence[Var]
    constvars: Sequence[Var]
    consts: Sequence[Any]
    eqns: Sequence[JaxprEqn]
    outvars: Sequence[Atom]
    producers: Mapping[Var, int]
    users: Mapping[Var, Sequence[int]]
    numbers: Mapping[Var, Var]  # a value that is computed again -> the first one
    outputs: Mapping[Var, int]  # how often it is a result
    _constants: dict[Var, Any] = dataclasses.field(default_factory=dict)
    _arrays: Mapping[Var, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, jaxpr: Any) -> Graph:
        eqns, outvars, constvars, consts = _inlined(jaxpr)
        eqns = _live(eqns, outvars)
        producers = {v: i for i, e in enumerate(eqns) for v in e.outvars}
        users: dict[Var, list[int]] = {}
        for i, eqn in enumerate(eqns):
            for atom in eqn.invars:
                if isinstance(atom, Var):
                    users.setdefault(atom, []).append(i)
        known = {v: c for v, c in zip(constvars, consts, strict=False) if _is_concrete(c)}
        scalars = {v: np.asarray(c).reshape(())[()] for v, c in known.items() if np.size(c) == 1}
        return cls(
            jaxpr,
            _compat.opened(jaxpr).invars,
            constvars,
            consts,
            eqns,
            outvars,
            producers,
            users,
            _numbered(eqns),
            collections.Counter(v for v in outvars if isinstance(v, Var)),
            scalars,
            known,
        )

    def same(self, a: Atom, b: Atom) -> bool:
        """Whether two variables hold the same value."""
        return a is b or (
            isinstance(a, Var) and isinstance(b, Var) and self.numbers.get(a, a) is self.numbers.get(b, b)
        )

    def array(self, atom: Atom) -> Any | None:
        """The value of a constant that the program closes over, as an array; None for anything else."""
        return self._arrays.get(atom) if isinstance(atom, Var) else None

    def producer(self, atom: Atom) -> JaxprEqn | None:
        """The equation that computes `atom`; None for an input, a constant or a literal."""
        index = self.producers.get(atom) if isinstance(atom, Var) else None
        return None if index is None else self.eqns[index]

    def users_of(self, var: Var) -> list[JaxprEqn]:
        return [self.eqns[i] for i in self.users.get(var, ())]

    def only_user(self, var: Var) -> JaxprEqn | None:
        """The equation that reads the value, if it is one, and reads it once, and it is no result."""
        users = self.users.get(var, ())
        return self.eqns[users[0]] if len(users) == 1 and var not in self.outputs else None

    def is_output(self, var: Var) -> bool:
        return var in self.outputs

    def use_count(self, var: Var) -> int:
        return len(self.users.get(var, ())) + self.outputs.get(var, 0)

    def escapes(self, inner: Iterable[JaxprEqn], results: Iterable[Var]) -> Var | None:
        """A value computed by `inner`, other than `results`, that something outside of `inner` uses.

        Views and casts of what `inner` takes from outside do not count: they are as cheap to share as their source.
        Nor do second computations of values of `inner` that nothing else uses: they are dead with it.
        """
        by_index = sorted({self.producers[e.outvars[0]]: e for e in inner}.items())
        inner_ids = {id(e) for _, e in by_index}
        kept = set(results)
        computed: set[Var] = set()
        numbers = {self.numbers.get(v, v) for _, e in by_index for v in e.outvars}

        def is_inside(eqn: JaxprEqn) -> bool:
            return id(eqn) in inner_ids or all(
                self.numbers.get(v, v) in numbers and not self.is_output(v) and all(map(is_inside, self.users_of(v)))
                for v in eqn.outvars
            )

        for _, eqn in by_index:
            if eqn.primitive.name in VIEWS and not any(a in computed for a in eqn.invars if isinstance(a, Var)):
                continue
            computed.update(eqn.outvars)
            for var in eqn.outvars:
                if var in kept or isinstance(var, DropVar):
                    continue
                if self.is_output(var) or not all(map(is_inside, self.users_of(var))):
                    return var
        return None

    def depends_on(self, atoms: Iterable[Atom], var: Var) -> bool:
        """Whether any of `atoms` is computed from `var`."""
        stack, seen = [a for a in atoms if isinstance(a, Var)], set()
        oldest = self.producers.get(var, -1)
        while stack:
            atom = stack.pop()
            if atom is var:
                return True
            index = self.producers.get(atom, -1)
            if atom in seen or index < oldest:  # everything that depends on var comes after it
                continue
            seen.add(atom)
            if index >= 0:
                stack.extend(a for a in self.eqns[index].invars if isinstance(a, Var))
        return False

    def made_of(self, params: Iterable[Var]) -> dict[Var, frozenset[Var]]:
        """For each value that needs nothing but `params` and constants: those of `params` that it is made of."""
        origins: dict[Var, frozenset[Var]] = {v: frozenset({v}) for v in params}
        origins |= {v: frozenset() for v in self.constvars}
        for eqn in self.eqns:
            operands = [a for a in eqn.invars if isinstance(a, Var)]
            if not eqn.effects and all(a in origins for a in operands):
                made_of = frozenset().union(*(origins[a] for a in operands))
                origins.update((v, made_of) for v in eqn.outvars)
        return origins

    def constant(self, atom: Atom) -> Any | None:
        """The value of an atom that is one constant in every element, as a numpy scalar of its dtype; else None."""
        if isinstance(atom, Literal):
            value = np.asarray(atom.val)
            return value.reshape(())[()] if value.size == 1 else None
        if atom not in self._constants:
            self._constants[atom] = self._evaluated(atom)
        return self._constants[atom]

    def _evaluated(self, var: Var) -> Any | None:
        index = self.producers.get(var)
        if index is None:
            return None
        eqn = self.eqns[index]
        if eqn.primitive.name not in _FOLDED or not hasattr(var.aval, "dtype"):
            return None
        values = []
        for atom in eqn.invars:
            value = self.constant(atom)
            if value is None:
                return None
            values.append(np.asarray(value))
        dtype = np.dtype(var.aval.dtype)
        with np.errstate(all="ignore"):
            return np.asarray(_FOLDED[eqn.primitive.name](eqn.params, *values)).astype(dtype)[()]

    def rewritten(
        self,
        replacements: Mapping[int, Sequence[JaxprEqn]],
        constvars: Sequence[Var] = (),
        consts: Sequence[Any] = (),
    ) -> Any:
        """The jaxpr with equation i replaced by `replacements[i]` (which may define any of the old variables).

        Equations that define a variable already defined by a replacement are dropped, what became dead too, and the
        rest is put into an order in which everything is computed before it is used.
        """
        replaced = {v for new in replacements.values() for e in new for v in e.outvars}
        eqns: list[JaxprEqn] = []
        for i, eqn in enumerate(self.eqns):
            if i in replacements:
                eqns.extend(replacements[i])
            if i not in replacements and not any(v in replaced for v in eqn.outvars):
                eqns.append(eqn)
        eqns, outvars = _deduplicated(_sorted(eqns), self.outvars)
        return _compat.rebuilt(
            self.source, _live(eqns, outvars), outvars, [*self.constvars, *constvars], [*self.consts, *consts]
        )


_FOLDED: dict[str, Callable[..., Any]] = {
    "add": lambda p, x, y: x + y,
    "and": lambda p, x, y: x & y if x.dtype != bool else np.logical_and(x, y),
    "broadcast_in_dim": lambda p, x: x,
    "convert_element_type": lambda p, x: x,
    "copy": lambda p, x: x,
    "copy_p": lambda p, x: x,
    "div": lambda p, x, y: np.trunc(x / y) if np.issubdtype(x.dtype, np.integer) else x / y,  # as XLA: towards 0
    "eq": lambda p, x, y: x == y,
    "exp": lambda p, x: np.exp(x),
    "ge": lambda p, x, y: x >= y,
    "gt": lambda p, x, y: x > y,
    "integer_pow": lambda p, x: x ** p["y"],
    "le": lambda p, x, y: x <= y,
    "log": lambda p, x: np.log(x),
    "lt": lambda p, x, y: x < y,
    "max": lambda p, x, y: np.maximum(x, y),
    "min": lambda p, x, y: np.minimum(x, y),
    "mul": lambda p, x, y: x * y,
    "ne": lambda p, x, y: x != y,
    "neg": lambda p, x: -x,
    "not": lambda p, x: np.logical_not(x) if x.dtype == bool else ~x,
    "or": lambda p, x, y: x | y if x.dtype != bool else np.logical_or(x, y),
    "pow": lambda p, x, y: x**y,
    "pvary": lambda p, x: x,
    "reshape": lambda p, x: x,
    "rsqrt": lambda p, x: 1 / np.sqrt(x),
    "select_n": lambda p, which, *cases: cases[int(which)],
    "sqrt": lambda p, x: np.sqrt(x),
    "square": lambda p, x: x * x,
    "squeeze": lambda p, x: x,
    "stop_gradient": lambda p, x: x,
    "sub": lambda p, x, y: x - y,
    "transpose": lambda p, x: x,
}


def _is_inlinable(eqn: JaxprEqn) -> bool:
    if eqn.primitive.name not in INLINED or eqn.effects:
        return False
    for name in ("in_shardings", "out_shardings", "in_layouts", "out_layouts"):
        if any(type(s).__name__ != "UnspecifiedValue" and s is not None for s in eqn.params.get(name, ())):
            return False
    if any(eqn.params.get("donated_invars", ())) or eqn.params.get("compiler_options_kvs"):
        return False
    return not _compat.is_high(_body(eqn))


def _body(eqn: JaxprEqn) -> Any:
    return eqn.params["jaxpr"] if "jaxpr" in eqn.params else eqn.params["call_jaxpr"]


def _inlined(jaxpr: Any) -> tuple[list[JaxprEqn], list[Atom], list[Var], list[Any]]:
    """Equations and outputs with nested jits opened, and all constants."""
    top = _compat.opened(jaxpr)
    constvars, consts = list(top.constvars), list(_compat.constants(jaxpr))
    by_identity: dict[int, Var] = {id(c): v for v, c in zip(constvars, consts, strict=False)}
    eqns: list[JaxprEqn] = []

    def walk(inner: Any, env: dict[Var, Atom], prefix: Any | None) -> list[Atom]:
        def read(atom: Atom) -> Atom:
            return env.get(atom, atom) if isinstance(atom, Var) else atom

        for eqn in _compat.opened(inner).eqns:
            invars = [read(a) for a in eqn.invars]
            if prefix is not None:
                source = eqn.source_info
                eqn = eqn.replace(source_info=source.replace(name_stack=prefix + source.name_stack))
            if _is_inlinable(eqn):
                body = _body(eqn)
                opened = _compat.opened(body)
                inner_env: dict[Var, Atom] = dict(zip(opened.invars, invars, strict=True))
                for var, value in zip(opened.constvars, _compat.constants(body), strict=True):
                    if id(value) not in by_identity:
                        by_identity[id(value)] = _compat.new_var(var.aval)
                        constvars.append(by_identity[id(value)])
                        consts.append(value)
                    inner_env[var] = by_identity[id(value)]
                results = walk(body, inner_env, eqn.source_info.name_stack)
                env.update((v, r) for v, r in zip(eqn.outvars, results, strict=True) if not isinstance(v, DropVar))
                continue
            outvars = eqn.outvars
            if inner is not jaxpr:  # the body of a cached jit may be inlined twice: its variables are renamed
                outvars = [v if isinstance(v, DropVar) else _compat.new_var(v.aval) for v in outvars]
                env.update(zip(eqn.outvars, outvars, strict=True))
            eqns.append(eqn.replace(invars=invars, outvars=outvars))
        return [read(a) for a in _compat.opened(inner).outvars]

    outvars = walk(jaxpr, {}, None)
    return eqns, outvars, constvars, consts


def _is_concrete(value: Any) -> bool:
    return isinstance(value, (np.ndarray, np.generic, jax.Array)) and not isinstance(value, jax.core.Tracer)


def _numbered(eqns: Sequence[JaxprEqn]) -> dict[Var, Var]:
    """For each variable that an earlier one equals, the earliest of them."""
    seen: dict[Any, Sequence[Var]] = {}
    numbers: dict[Var, Var] = {}

    def key(atom: Atom) -> Any:
        if isinstance(atom, Literal):
            value = np.asarray(atom.val)
            return (value.tobytes(), str(atom.aval)) if value.dtype != object else id(atom)
        return numbers.get(atom, atom)

    for eqn in eqns:
        if eqn.primitive.name not in NUMBERED or eqn.effects:
            continue
        params = sorted(((n, v) for n, v in eqn.params.items() if v is not None), key=lambda i: i[0])
        identity = (eqn.primitive.name, tuple(map(key, eqn.invars)), tuple(params))
        try:
            first = seen.setdefault(identity, eqn.outvars)
        except TypeError:  # an unhashable param
            continue
        if first is not eqn.outvars:
            numbers.update(
                (v, w)
                for v, w in zip(eqn.outvars, first, strict=True)
                if not isinstance(v, DropVar) and not isinstance(w, DropVar)
            )
    return numbers


def _deduplicated(eqns: Sequence[JaxprEqn], outvars: Sequence[Atom]) -> tuple[list[JaxprEqn], list[Atom]]:
    """The equations reading only first computations; the others are dead then."""
    numbers = _numbered(eqns)

    def read(atom: Atom) -> Atom:
        return numbers.get(atom, atom) if isinstance(atom, Var) else atom

    return [e.replace(invars=list(map(read, e.invars))) for e in eqns], list(map(read, outvars))


def _live(eqns: Sequence[JaxprEqn], outvars: Sequence[Atom]) -> list[JaxprEqn]:
    needed = {v for v in outvars if isinstance(v, Var)}
    kept = []
    for eqn in reversed(eqns):
        if eqn.effects or any(v in needed for v in eqn.outvars):
            needed.update(a for a in eqn.invars if isinstance(a, Var))
            kept.append(eqn)
    return kept[::-1]


def _sorted(eqns: Sequence[JaxprEqn]) -> list[JaxprEqn]:
    """A stable topological order: an equation moves only behind what it needs. Effects keep their order."""
    producer = {v: i for i, e in enumerate(eqns) for v in e.outvars if not isinstance(v, DropVar)}
    done = [False] * len(eqns)
    order: list[JaxprEqn] = []
    for start in range(len(eqns)):
        stack = [start]
        while stack:
            i = stack[-1]
            if done[i]:
                stack.pop()
                continue
            missing = [
                j for a in eqns[i].invars if isinstance(a, Var) and (j := producer.get(a)) is not None and not done[j]
            ]
            if missing:
                if len(stack) > len(eqns):
                    raise AssertionError("a rewrite made a cycle")
                stack.extend(missing)
                continue
            done[i] = True
            order.append(eqns[i])
            stack.pop()
    return order
