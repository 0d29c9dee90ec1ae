"""A registered reference as a matcher: what `zenith.register` makes, and the one list of what is registered."""

from __future__ import annotations

import dataclasses
import functools as ft
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from zenith_jax.errors import Refusal, RegistrationError, refuse
from zenith_jax.ir._compat import JaxprEqn, Literal
from zenith_jax.ir.graph import Graph
from zenith_jax.ops._op import Spec
from zenith_jax.passes.match._match import Match, restored
from zenith_jax.passes.registered import pattern as patterns
from zenith_jax.passes.registered.pattern import Difference, Found, Pattern, laid_out

DERIVATIVES = ("auto", "own", "reference")
VMAPS = ("replacement", "batch", "reference")
MAX_BATCH_RANK = 4
# Stand for attributes while the reference is traced; no program's own constant.
SENTINELS = {float: 0.7310585786300049, int: 7919}

Attributes = tuple[tuple[str, Any], ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Registration:
    """One registered reference; see `zenith_jax.register`. A context manager that unregisters when its block ends."""

    reference: Callable[..., Any]
    replacement: Callable[..., Any]
    name: str
    specs: tuple[Spec, ...] | None  # of a signature, else
    examples: tuple[jax.ShapeDtypeStruct, ...]  # arguments of fixed rank
    dtypes: tuple[Any, ...]
    attributes: dict[str, float | int]
    platforms: tuple[str, ...] | None
    supports: Callable[..., Refusal | str | None] | None
    derivative: str
    vmap: str

    def unregister(self) -> None:
        """Functions traced from now on are not searched for the reference; compiled ones stay as they are."""
        deactivate(self)

    def __enter__(self) -> Registration:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.unregister()

    def __repr__(self) -> str:
        return f"Registration({self.name})"

    # --- matching ---

    def __call__(self, graph: Graph, eqn: JaxprEqn) -> Match | Refusal | None:
        """The reference computed around `eqn`, if that is its rarest primitive. A matcher, as those in passes/match."""
        if eqn.primitive.name not in self.anchors:
            return None
        difference = Difference()
        for found in self._found(graph, eqn, difference):
            match = self._match(graph, eqn, found)
            if isinstance(match, Match):
                return match
            difference.note(str(match), match.depth)
        needed = min(len(self.skeleton(rank).graph.eqns) for rank in self._ranks)
        return refuse("{why}", why=difference.text, depth=difference.depth) if 2 * difference.depth >= needed else None

    @property
    def _ranks(self) -> Sequence[int]:
        return range(MAX_BATCH_RANK + 1) if self.specs and any(s.batched for s in self.specs) else (0,)

    @ft.cached_property
    def anchors(self) -> frozenset[str]:
        return frozenset(self.skeleton(rank).anchor for rank in self._ranks)

    @ft.cached_property
    def holes(self) -> dict[str, float | int]:
        """Attribute -> what stands for it in a skeleton."""
        return {name: SENTINELS[type(v)] + i * type(v)(1) for i, (name, v) in enumerate(self.attributes.items())}

    def skeleton(self, batch_rank: int) -> Pattern:
        """The pattern at made-up sizes, or those of the examples."""
        return _skeleton(self, batch_rank)

    def _found(self, graph: Graph, eqn: JaxprEqn, difference: Difference) -> Iterator[Found]:
        tried: set[Any] = set()
        for rank in self._ranks:
            loose = self.skeleton(rank)
            if loose.anchor != eqn.primitive.name:
                continue
            for root in patterns.candidates(graph, loose, eqn):
                for unifier, _ in patterns.laid_over(graph, loose, root, self.holes, difference, strict=False):
                    leaves = [unifier.found.leaves[v] for v in loose.graph.invars]
                    attributes = tuple(sorted((self.attributes | unifier.found.attributes).items()))
                    for high in (False, True):
                        avals = tuple((a.sizes, patterns.aval_of(a, high).dtype) for a in leaves)
                        if (id(root), avals, attributes, high) not in tried:
                            tried.add((id(root), avals, attributes, high))
                            yield from self._strictly(graph, root, avals, attributes, high, difference)

    def _strictly(
        self, graph: Graph, root: JaxprEqn, avals: tuple, attributes: Attributes, high: bool, difference: Difference
    ) -> Iterator[Found]:
        exact = _exact(self, avals, attributes)
        if isinstance(exact, str):
            difference.note(f"the reference does not take {avals}: {exact}", 1)
            return
        for unifier, tops in patterns.laid_over(graph, exact, root, {}, difference, strict=True):
            leaves = [unifier.found.leaves[v] for v in exact.graph.invars]
            if avals == tuple((a.sizes, patterns.aval_of(a, high).dtype) for a in leaves):
                unifier.found.attributes.update(attributes)
                found = patterns.finished(graph, exact, unifier, tops, high=high, difference=difference)
                if found is not None:
                    yield found

    def _match(self, graph: Graph, eqn: JaxprEqn, found: Found) -> Match | Refusal:
        escaped = graph.escapes(found.inner, found.results)
        if escaped is not None:
            depth = 2 * len(graph.eqns)
            return refuse("an inner value ({aval}) is used elsewhere", aval=escaped.aval, depth=depth)
        if len(set(found.results)) != len(found.results):
            return refuse("two results of the reference are one value here", depth=len(graph.eqns))
        attributes = tuple(sorted(found.attributes.items()))
        values = tuple(patterns.value_of(a, found.high) for a in found.leaves)
        if any(graph.depends_on(values, result) for result in found.results):
            return refuse("an argument is computed from a result of the same site", depth=len(graph.eqns))
        avals = tuple((a.sizes, patterns.aval_of(a, found.high).dtype) for a in found.leaves)
        static = dict(
            registration=self,
            attributes=attributes,
            layouts=tuple((a.order, a.sizes) for a in found.leaves),
            orders=found.result_orders,
            shapes=tuple(tuple(v.aval.shape) for v in found.results),
            dtypes=tuple(v.aval.dtype.name for v in found.results),
        )
        root = graph.producer(found.results[0])
        shown = ", ".join(f"{np.dtype(d).name}[{','.join(map(str, s))}]" for s, d in avals)
        return Match(
            op=self.name,
            root=root or eqn,
            results=found.results,
            inner=found.inner,
            leaves=values,
            emit=emit,
            static=tuple(static.items()),
            detail=" ".join([shown, *(f"{k}={v:.6g}" for k, v in attributes)]),
            case=(("dtype", np.dtype(avals[0][1]).name),),
            exact=emit_reference,
            declined=ft.partial(self._declined, avals, attributes, found.avals),
        )

    def _declined(self, avals: tuple, attributes: Attributes, results: tuple, platform: str) -> Refusal | None:
        if self.platforms is not None and platform not in self.platforms:
            return refuse("{name} is registered for {platforms}", name=self.name, platforms=", ".join(self.platforms))
        structs = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in avals]
        if self.supports is not None:
            answer = self.supports(*structs, **dict(attributes))
            if answer is not None:
                return answer if isinstance(answer, Refusal) else refuse("{why}", why=answer)
        try:
            given = jax.eval_shape(implementation(self, attributes), *structs)
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            return refuse("the replacement raised {error}", error=f"{type(error).__name__}: {lines[0]}")
        wanted = [(tuple(a.shape), np.dtype(a.dtype)) for a in results]
        if [(tuple(a.shape), np.dtype(a.dtype)) for a in given] != wanted:
            return refuse("the replacement returns {a}, the reference {b}", a=_shown(given), b=_shown(results))
        return None


def _shown(avals: Sequence[Any]) -> str:
    return ", ".join(f"{np.dtype(a.dtype).name}{list(a.shape)}" for a in avals)


@ft.lru_cache(maxsize=1024)
def _skeleton(registration: Registration, batch_rank: int) -> Pattern:
    r = registration
    avals = patterns.avals_of(r.specs, batch_rank, r.dtypes) if r.specs is not None else list(r.examples)
    return patterns.traced(r.reference, avals, r.holes, r.name)


@ft.lru_cache(maxsize=1024)
def _exact(registration: Registration, avals: tuple, attributes: Attributes) -> Pattern | str:
    structs = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in avals]
    try:
        return patterns.traced(registration.reference, structs, dict(attributes), registration.name)
    except Exception as error:  # the user's function, at sizes that it may not take
        return str(error)


# --- what takes its place ---------------------------------------------------------------------------------------------


@ft.lru_cache(maxsize=1024)
def implementation(registration: Registration, attributes: Attributes) -> Callable[..., tuple[Any, ...]]:
    """(*arguments) -> results, differentiable, in vmap as registered."""
    r, options = registration, dict(attributes)

    def reference(*args: Any) -> tuple[Any, ...]:
        return tuple(jax.tree.leaves(r.reference(*args, **options)))

    def replacement(*args: Any) -> tuple[Any, ...]:
        return tuple(jax.tree.leaves(r.replacement(*args, **options)))

    batched = replacement if r.vmap == "replacement" else _with_vmap(replacement, reference, r)
    if r.derivative == "own":
        return batched
    function = jax.custom_jvp(batched)

    @function.defjvp
    def _(primals: Sequence[Any], tangents: Sequence[Any]) -> tuple[Any, Any]:
        return function(*primals), jax.jvp(reference, primals, tangents)[1]

    return function


def _with_vmap(replacement: Callable, reference: Callable, registration: Registration) -> Callable:
    function = jax.custom_batching.custom_vmap(replacement)

    @function.def_vmap
    def _(size: int, is_batched: Sequence[bool], *args: Any) -> tuple[Any, Any]:
        specs = registration.specs or ()
        one_more = registration.vmap == "batch" and all(
            s.batched or not b for s, b in zip(specs, is_batched, strict=True)
        )
        if one_more:
            full = [
                x if b or not s.batched else jax.numpy.broadcast_to(x, (size, *x.shape))
                for x, b, s in zip(args, is_batched, specs, strict=True)
            ]
            results = function(*full)
        else:
            results = jax.vmap(reference, [0 if b else None for b in is_batched])(*args)
        return tuple(results), (True,) * len(results)

    return function


def _arguments(values: Sequence[Any], layouts: Sequence[tuple]) -> list[Any]:
    return [laid_out(x, order, sizes) for x, (order, sizes) in zip(values, layouts, strict=True)]


def emit(*values, registration, attributes, layouts, orders, shapes, dtypes):
    results = implementation(registration, attributes)(*_arguments(values, layouts))
    return tuple(restored(y, *how) for y, *how in zip(results, orders, shapes, dtypes, strict=True))


def emit_reference(*values, registration, attributes, layouts, orders, shapes, dtypes):
    """The same by the reference, in whatever dtype the values have: the oracle of `zenith.verify`."""
    del dtypes
    results = jax.tree.leaves(registration.reference(*_arguments(values, layouts), **dict(attributes)))
    return tuple(restored(y, order, shape, y.dtype) for y, order, shape in zip(results, orders, shapes, strict=True))


# --- the list ---------------------------------------------------------------------------------------------------------

_lock = threading.Lock()
_active: tuple[Registration, ...] = ()


def active() -> tuple[Registration, ...]:
    """Registrations in force, the latest first: it claims equations before earlier ones and before Zenith's own ops."""
    return _active


def activate(registration: Registration) -> Registration:
    """Raises RegistrationError where the reference cannot be a pattern."""
    global _active
    r = registration
    if r.derivative not in DERIVATIVES[1:] or r.vmap not in VMAPS:
        raise RegistrationError(f"{r.name}: derivative is one of {DERIVATIVES}, vmap one of {VMAPS}")
    if r.vmap == "batch" and not (r.specs and any(s.batched for s in r.specs)):
        raise RegistrationError(f'{r.name}: vmap="batch" needs a signature with batch dimensions, such as "*b d, d"')
    bad = {name: v for name, v in r.attributes.items() if type(v) not in SENTINELS}
    if bad:
        raise RegistrationError(f"{r.name}: attributes are Python floats or ints, got {bad}")
    skeleton = r.skeleton(1 if len(r._ranks) > 1 else 0)
    constants = _constants(skeleton.graph)
    for name, sentinel in r.holes.items():
        if not any(c == np.asarray(sentinel).astype(c.dtype) for c in constants if c.dtype != bool):
            raise RegistrationError(
                f"{r.name}: attribute {name} is no literal of the reference's program, so that it cannot be read off "
                "another one. It may be used only as it is, not computed with"
            )
    with _lock:
        _active = (registration, *_active)
    return registration


def _constants(graph: Graph) -> list[np.ndarray]:
    atoms = [a for e in graph.eqns for a in e.invars if isinstance(a, Literal) or graph.producer(a) is not None]
    values = [(graph.constant(a), a.aval.dtype) for a in atoms]
    return [np.asarray(v).astype(dtype) for v, dtype in values if v is not None]


def deactivate(registration: Registration) -> None:
    global _active
    with _lock:
        _active = tuple(r for r in _active if r is not registration)
