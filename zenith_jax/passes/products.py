"""Products by weights as a GPU computes them fastest, made of parameters alone: once for all calls, as `known.py` then
splits it off.

    x @ a, x @ b, x @ c  ->  slices of x @ [a b c]: query, key and value of attention. XLA merges such products too,
                             where they are small, and lays their weights side by side in each call.
    x @ w  ->  x @ w', w' stored (n, k), in float32: tensor cores take TensorFloat-32 operands along k alone, so that
               other weights go through slower products.

An encoder as BERT-base, float32, us of a call: one sentence 676 -> 621 merged; eight 1597 -> 1485 stored (n, k) -> 1421
merged too (H100, jax 0.11.2, 2026-11-27).
"""

from __future__ import annotations

import dataclasses
import functools as ft
import logging
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from zenith_jax import native
from zenith_jax.ir import _compat
from zenith_jax.ir._compat import JaxprEqn, Var
from zenith_jax.ir.emit import emitted
from zenith_jax.ir.graph import Graph

logger = logging.getLogger("zenith_jax")

# x, weights and result of a product that is merged with others: what XLA merges (xla_gpu_dot_merger_threshold_mb). From
# about there on, a product fills the device by itself.
_MERGED_BYTES = 32 << 20
# Rows from which float32 weights are stored (n, k): 128 rows are as fast either way.
_ROWS = 512
# The share of the device's memory that such copies may take, for each size that a model is compiled for.
_SHARE = 1 / 8


def _bytes(array: Any) -> int:
    return array.aval.size * array.aval.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class _Product:
    """x times weights made of parameters. index: of its equation. axis: of x, that is contracted. stored: the weights
    as they lie, before a transpose. by_rows: they are (n, k), not (k, n)."""

    index: int
    eqn: JaxprEqn
    axis: int
    stored: Var
    by_rows: bool

    @property
    def x(self) -> Any:
        return self.eqn.invars[0]

    @property
    def rows(self) -> int:
        return self.x.aval.size // max(self.x.aval.shape[self.axis], 1)

    @property
    def is_tf32(self) -> bool:
        return self.stored.aval.dtype == np.float32 and _compat.is_default_precision(self.eqn)

    @property
    def bytes(self) -> int:
        return sum(map(_bytes, (*self.eqn.invars, *self.eqn.outvars)))

    @property
    def kind(self) -> Any:
        """Alike of products that can be one."""
        shared = (self.eqn.params.get(name) for name in ("precision", "preferred_element_type", "out_sharding"))
        return (self.x, self.axis, self.stored.aval.dtype, *shared)


def with_fast_products(jaxpr: Any, count: int, platform: str) -> Any:
    """The closed jaxpr, whose first `count` inputs are parameters, with products by weights made of these as above."""
    if platform != "cuda" or _compat.is_high(jaxpr):
        return jaxpr
    graph = Graph.of(jaxpr)
    known = graph.made_of(graph.invars[:count])
    alike: dict[Any, list[_Product]] = {}
    for index, eqn in enumerate(graph.eqns):
        product = _product(graph, known, index, eqn)
        if product is not None:
            alike.setdefault(product.kind, []).append(product)
    groups = [g for products in alike.values() for g in _groups(products)]
    if not groups or not _fit(groups):
        return jaxpr
    replacements: dict[int, list[JaxprEqn]] = {}
    for group in groups:
        first, *others = group
        replacements[first.index] = _replaced(group)
        replacements.update((p.index, []) for p in others)
    return graph.rewritten(replacements)


def _product(graph: Graph, known: dict[Var, frozenset[Var]], index: int, eqn: JaxprEqn) -> _Product | None:
    if eqn.primitive.name != "dot_general":
        return None
    x, w = eqn.invars
    (of_x, of_w), (batch, _) = eqn.params["dimension_numbers"]
    if batch or len(of_x) != 1 or not known.get(w) or x in known or w.aval.ndim < 2:
        return None
    if x.aval.dtype != w.aval.dtype or not jnp.issubdtype(w.aval.dtype, jnp.floating) or not w.aval.size:
        return None
    stored, axis = w, of_w[0]
    producer = graph.producer(w)
    if producer is not None and producer.primitive.name == "transpose" and w.aval.ndim == 2:
        stored, axis = producer.invars[0], 1 - axis
    if axis not in (0, stored.aval.ndim - 1) or not isinstance(stored, Var):
        return None
    if _bytes(stored) > sum(map(_bytes, known[stored])):
        return None  # a cast or dequantised weight, which `known.py` leaves in the program
    return _Product(index, eqn, of_x[0], stored, axis != 0)


def _groups(alike: list[_Product]) -> list[list[_Product]]:
    """Those that become one product, and single ones whose weights are better stored in the other order."""
    small = [p for p in alike if p.bytes <= _MERGED_BYTES]
    merged = small if len({id(p.stored) for p in small}) == len(small) > 1 else []
    single = [p for p in alike if p not in merged and p.is_tf32 and not p.by_rows and p.rows >= _ROWS]
    return [*([merged] if merged else []), *([p] for p in single)]


def _fit(groups: list[list[_Product]]) -> bool:
    distinct = {frozenset(p.stored for p in group) for group in groups}
    copied = sum(_bytes(w) for group in distinct for w in group)
    memory = native.memory_bytes(native.default_device())
    if memory is None or copied <= memory * _SHARE:
        return True
    logger.info(
        "weights stay as they lie: %.1f GB in the order that products read fastest are more than an eighth of the "
        "device's memory",
        copied / 1e9,
    )
    return False


def _replaced(group: Sequence[_Product]) -> list[JaxprEqn]:
    first = group[0]
    by_rows = first.is_tf32 or first.by_rows
    traced = _traced(
        first.x.aval.shape,
        tuple((p.stored.aval.shape, p.by_rows, tuple(p.eqn.outvars[0].aval.shape)) for p in group),
        first.x.aval.dtype,
        first.axis,
        by_rows,
        first.eqn.params["precision"],
        first.eqn.params["preferred_element_type"],
    )
    operands, results = [first.x, *(p.stored for p in group)], [p.eqn.outvars[0] for p in group]
    return emitted(traced, operands, results, first.eqn.source_info)[0]


@ft.lru_cache(maxsize=1024)
def _traced(
    shape: tuple[int, ...],
    weights: tuple[tuple[tuple[int, ...], bool, tuple[int, ...]], ...],
    dtype: Any,
    axis: int,
    by_rows: bool,
    precision: Any,
    preferred: Any,
) -> Any:
    """weights: of each the shape, whether it is (n, k), and the shape of its product. by_rows: of the new ones."""

    def function(x: Any, *arrays: Any) -> list[Any]:
        k = shape[axis]
        matrices = []
        for w, (_, is_by_rows, _) in zip(arrays, weights, strict=True):
            matrix = w.reshape(-1, k) if is_by_rows else w.reshape(k, -1)
            matrices.append(matrix if is_by_rows == by_rows else matrix.T)
        features = 0 if by_rows else 1
        matrix = matrices[0] if len(matrices) == 1 else jnp.concatenate(matrices, features)
        y = lax.dot_general(
            x, matrix, (((axis,), (1 - features,)), ((), ())), precision=precision, preferred_element_type=preferred
        )
        sizes = [m.shape[features] for m in matrices]
        parts = [y] if len(sizes) == 1 else lax.split(y, sizes, axis=y.ndim - 1)
        return [p.reshape(result) for p, (_, _, result) in zip(parts, weights, strict=True)]

    arrays = [jax.ShapeDtypeStruct(s, dtype) for s, _, _ in weights]
    return jax.make_jaxpr(function)(jax.ShapeDtypeStruct(shape, dtype), *arrays)
