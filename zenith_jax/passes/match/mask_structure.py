"""Masks that a kernel takes as numbers of each query or key instead of a tensor over both."""

from __future__ import annotations

import dataclasses
import functools as ft
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from zenith_jax.ir.term import Axis, Term, Terms
from zenith_jax.passes.match._match import Order, arranged, order_of

# Positions beyond these are no different from them, and sums of a few stay in int32.
FAR = 1 << 28


@dataclasses.dataclass(frozen=True)
class Source:
    """A boolean term of the program, or its complement."""

    mask: Term
    negated: bool


@dataclasses.dataclass(frozen=True)
class Edge:
    """A key position: offset + sum of coefficient * axis position + factor * term; of a bool term 0 or 1."""

    offset: int
    coefficients: tuple[tuple[Axis, int], ...] = ()
    term: Term | None = None
    factor: int = 1

    def is_small(self) -> bool:
        return abs(self.offset) + sum(abs(c) * axis.size for axis, c in self.coefficients) < FAR


@dataclasses.dataclass(frozen=True)
class HalfLine:
    """Keys below the highest of the edges (upper), or from the lowest of them on. source: the same as a tensor."""

    upper: bool
    edges: tuple[Edge, ...]
    source: Source | None


@dataclasses.dataclass(frozen=True)
class Segments:
    """Queries and keys of equal integers."""

    query: Term
    key: Term
    source: Source


def united(first: Sequence[HalfLine], second: Sequence[HalfLine], source: Source) -> tuple[HalfLine, ...] | None:
    """(a and b) or c = (a or c) and (b or c), where all are open to the same side."""
    if len({line.upper for line in (*first, *second)}) != 1:
        return None
    return tuple(HalfLine(a.upper, (*a.edges, *b.edges), source) for a in first for b in second)


# --- as static data and values ----------------------------------------------------------------------------------------

StaticEdge = tuple[int, tuple[int, ...], int, int, Order]  # offset, coefficients, leaf or -1, factor, order
StaticLine = tuple[bool, tuple[StaticEdge, ...]]


def static_line(terms: Terms, line: HalfLine, axes: Sequence[Axis | None], leaves: list[Term]) -> StaticLine | None:
    """The line over `axes`, its terms appended to `leaves`; None where it has other axes."""
    edges: list[StaticEdge] = []
    found: list[Term] = []
    for edge in line.edges:
        coefficients = dict(edge.coefficients)
        term = None if edge.term is None else terms.split(edge.term)
        order = () if term is None else order_of(term, axes)
        if order is None or not coefficients.keys() <= {a for a in axes if a is not None}:
            return None
        leaf = -1 if term is None else len(leaves) + len(found)
        found += [] if term is None else [term]
        edges.append((edge.offset, tuple(coefficients.get(a, 0) if a else 0 for a in axes), leaf, edge.factor, order))
    leaves += found
    return line.upper, tuple(edges)


def interval(lines: Sequence[StaticLine], arrays: Sequence[Any], sizes: Sequence[int], keys: int) -> Any:
    """(first, last) of the keys that all lines allow, over axes of these sizes, 1 where nothing varies."""
    bounds = {True: [], False: []}
    for upper, edges in lines:
        positions = [_position(edge, arrays, sizes) for edge in edges]
        bounds[upper].append(ft.reduce(jnp.maximum if upper else jnp.minimum, positions))
    last = ft.reduce(jnp.minimum, bounds[True], jnp.int32(keys))
    first = ft.reduce(jnp.maximum, bounds[False], jnp.int32(0))
    ones = jnp.zeros((1,) * len(sizes), jnp.int32)
    return jnp.stack(jnp.broadcast_arrays(first + ones, last + ones), axis=-1)


def _position(edge: StaticEdge, arrays: Sequence[Any], sizes: Sequence[int]) -> Any:
    offset, coefficients, leaf, factor, order = edge
    value = jnp.int32(offset)
    for dim, c in enumerate(coefficients):
        if c:
            shape = tuple(n if d == dim else 1 for d, n in enumerate(sizes))
            value = value + c * lax.broadcasted_iota(jnp.int32, shape, dim)
    if leaf >= 0:
        x = arranged(arrays[leaf], order)
        if x.dtype != bool:
            info = jnp.iinfo(x.dtype)
            x = jnp.clip(x, max(info.min, -FAR), min(info.max, FAR))
        value = value + factor * x.astype(jnp.int32)
    return value
