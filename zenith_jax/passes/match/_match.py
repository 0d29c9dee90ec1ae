"""What a matcher finds, and how an array is brought into an op's canonical shape."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp

from zenith_jax.ir._compat import JaxprEqn, Var
from zenith_jax.ir.graph import Atom, Graph
from zenith_jax.ir.term import Axis, Term, is_float


@dataclasses.dataclass(frozen=True, eq=False)
class Match:
    """A subgraph that is an op.

    emit(*values of `leaves`, **static) computes `results`; it is a module-level function, so that its trace can be
    cached by (emit, static, avals). inner: the equations that the op replaces. cost: flops and bytes of the fused op,
    and the bytes that unfused code moves besides.
    """

    op: str
    root: JaxprEqn
    results: tuple[Var, ...]
    inner: tuple[JaxprEqn, ...]
    leaves: tuple[Atom, ...]
    emit: Callable[..., Sequence[Any]]
    static: tuple[tuple[str, Any], ...]
    detail: str = ""
    # The cases the cost model chooses by: shapes, dtype, flags. See passes/choose/.
    case: tuple[tuple[str, Any], ...] = ()
    # What to fuse instead where another match has taken some of `inner`: the norm without the sum before it.
    simpler: Match | None = None
    # For each leaf the dimensions that must be whole on a device, where no kernel's signature says it.
    whole: tuple[frozenset[int], ...] | None = None
    # Of a registered pattern. exact: as emit, by the reference, in any dtype. declined: (platform) -> why not, or None;
    # its equations are then left to other patterns.
    exact: Callable[..., Sequence[Any]] | None = None
    declined: Callable[[str], Any] | None = None
    # Whether its equations are left to other matchers where it is declined for any reason.
    yields: bool = False
    # Whether it is no site where it is declined: XLA's code is as good.
    unmentioned: bool = False
    # Whether `emit` is XLA's operations alone, in another form than the program's.
    is_form: bool = False


def narrowed(graph: Graph, match: Match) -> Match:
    """The match with what its result is cast down to as result, if nothing else reads it: a kernel then writes that.

    For matches of which `emit` casts the first result to its static argument `dtype`.
    """
    result, static = match.results[0], dict(match.static)
    users = graph.users_of(result)
    if "dtype" not in static or len(users) != 1 or graph.is_output(result):
        return match
    cast = users[0].outvars[0]
    if users[0].primitive.name != "convert_element_type" or not is_float(cast.aval.dtype):
        return match
    if not is_wider(result.aval.dtype, cast.aval.dtype):
        return match
    static["dtype"] = cast.aval.dtype.name
    return dataclasses.replace(
        match,
        results=(cast, *match.results[1:]),
        inner=(*match.inner, users[0]),
        static=tuple(static.items()),
    )


CASTS = ("convert_element_type", "copy", "copy_p")


def is_wider(dtype: Any, than: Any) -> bool:
    return jnp.finfo(dtype).bits > jnp.finfo(than).bits


def as_precise(x: Any, dtype: Any) -> Any:
    """x, cast up where the program's result is of a wider dtype: kernels round their results to that of x."""
    return x.astype(dtype) if is_wider(dtype, x.dtype) else x


Order = tuple[int, ...]


def order_of(term: Term, axes: Sequence[Axis | None]) -> Order | None:
    """For each of `axes` the dimension of `term.atom` that it is, or -1; None if the term has other axes too."""
    if not term.axis_set <= {a for a in axes if a is not None}:
        return None
    return tuple(-1 if a is None or a not in term.axes else term.axes.index(a) for a in axes)


def arranged(x: Any, order: Order) -> Any:
    """x with dimension order[i] as dimension i, size 1 where that is -1. Dimensions not named have size 1."""
    named = [d for d in order if d >= 0]
    unnamed = [d for d in range(x.ndim) if d not in named]
    shape = [1 if d < 0 else x.shape[d] for d in order]
    return jnp.transpose(x, (*named, *unnamed)).reshape(shape)


def restored(y: Any, order: Order, shape: Sequence[int], dtype: Any) -> Any:
    """The inverse: y's dimension i is dimension order[i] of the result, which has `shape` and `dtype`."""
    named = sorted((d, i) for i, d in enumerate(order) if d >= 0)
    unnamed = [i for i, d in enumerate(order) if d < 0]
    return jnp.transpose(y, (*(i for _, i in named), *unnamed)).reshape(shape).astype(dtype)
