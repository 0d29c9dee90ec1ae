"""Softmax cross entropy of a linear layer's result, without the array of logits in memory.

    logits[*b, v] = sum over d of x[*b, d] * w[d, v]  (+ bias[v])

Tokens pass in chunks: a chunk's logits are made by XLA's matrix product, read by `cross_entropy`'s row kernels, and
gone.
There are two roads, which differ in when the cotangents of the rows' values (lse, picked, total) are known:

- `reduced`: the program sums them over all tokens into one number S, by a `tail` that is affine in them but for lse**2.
  Then dS/d(rows) is known in the forward pass, and so are dx, dw, dbias: the JVP rule makes them there, each chunk's
  logits serving value and gradient, three products in all. The pullback only scales them by the cotangent of S.
- `rows`: each row's values are the result. Their cotangents are known in the backward pass only, dw does not factor out
  of them, and so a chunk's logits are computed again there: four products.

Chunks take every k-th token along one axis where there are several devices, so that a sharded axis stays so.
"""

from __future__ import annotations

import dataclasses
import functools as ft
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero

from zenith_jax.errors import DTypeError, Refusal, ShapeError
from zenith_jax.ir import _compat
from zenith_jax.ops._op import WIDENED, Kernel, Signature, absent, dense, is_absent
from zenith_jax.ops.cross_entropy import (
    as_int32,
    check_labels,
    loss_of_rows,
    row_gradient,
    row_statistics,
)

# Gradients of a 16-bit w are summed over up to four chunks in w's dtype, so that no array is wider than they are: each
# chunk's product, accumulated in float32, is rounded as it is added, 1.7 times the (root mean square) error of a single
# rounding; the largest error was 2.25 times as large (8192x768x50304, H100). More chunks are summed in float32, with
# the error of a single rounding.
_NARROW_CHUNKS, _WIDE_CHUNKS = 4, 8
# Tokens of a chunk: below, products lose speed; above, they gain none, and memory grows.
_MIN_TOKENS, _MAX_TOKENS = 128, 4096


@dataclasses.dataclass(frozen=True)
class Layer:
    """How logits are made of x and w. contracting: the dimension of w that x's features meet. compute, logits: dtypes
    of the product's operands and of its result."""

    contracting: int
    compute: str
    logits: str
    precision: Any = None

    def __call__(self, x: Any, w: Any, bias: Any) -> Any:
        """w is in the dtype `compute` already."""
        dims = (((x.ndim - 1,), (self.contracting,)), ((), ()))
        y = lax.dot_general(
            x.astype(self.compute), w, dims, precision=self.precision, preferred_element_type=jnp.dtype(self.logits)
        )
        return y if bias is None else y + bias.astype(y.dtype)

    def classes(self, w: Any) -> int:
        return w.shape[1 - self.contracting]


@dataclasses.dataclass(frozen=True)
class Chunks:
    """A division of the tokens (*batch) into `count` parts. axis: part j has the tokens j, j + count, ... along it;
    None: parts follow each other, which needs no copy of x."""

    batch: tuple[int, ...]
    axis: int | None
    count: int

    @property
    def size(self) -> int:
        return math.prod(self.batch) if self.axis is None else self.batch[self.axis]

    @property
    def length(self) -> int:
        return -(-self.size // self.count)

    def split(self, x: Any) -> Any:
        """Parts along a new first axis. The last tokens are padded with zeros."""
        if self.axis is None:
            x = x.reshape(self.size, *x.shape[len(self.batch) :])
        axis = self.axis or 0
        padding = self.length * self.count - self.size
        if padding:
            x = jnp.pad(x, [(0, padding if d == axis else 0) for d in range(x.ndim)])
        if self.axis is None:
            return x.reshape(self.count, self.length, *x.shape[1:])
        return jnp.moveaxis(x.reshape(*x.shape[:axis], self.length, self.count, *x.shape[axis + 1 :]), axis + 1, 0)

    def join(self, parts: Any) -> Any:
        if self.axis is None:
            x = lax.slice_in_dim(parts.reshape(-1, *parts.shape[2:]), 0, self.size)
            return x.reshape(*self.batch, *x.shape[1:])
        x = jnp.moveaxis(parts, 0, self.axis + 1)
        x = x.reshape(*x.shape[: self.axis], -1, *x.shape[self.axis + 2 :])
        return lax.slice_in_dim(x, 0, self.size, axis=self.axis)


def chunks_of(batch: Sequence[int], w_dtype: Any, count: int | None = None) -> Chunks:
    """`count` is what `linear_cross_entropy` was told. Where arrays may be sharded, along the last axis of tokens that
    is long enough."""
    batch = tuple(batch)
    tokens = math.prod(batch)
    if count is None:
        least = _NARROW_CHUNKS if jnp.finfo(w_dtype).bits < 32 else _WIDE_CHUNKS
        count = max(min(least, tokens // _MIN_TOKENS), -(-tokens // _MAX_TOKENS))
    count = max(1, count)
    axis = None
    if batch and jax.device_count() > 1:
        longest = max(range(len(batch)), key=lambda d: batch[d])
        axis = max((d for d, n in enumerate(batch) if n >= count), default=longest)
    length = -(-(tokens if axis is None else batch[axis]) // count)
    whole = Chunks(batch, axis, 1)
    return dataclasses.replace(whole, count=max(1, -(-whole.size // max(1, length))))


# --- the loops over chunks --------------------------------------------------------------------------------------------


def statistics(x: Any, w: Any, bias: Any, labels: Any, *, layer: Layer, chunks: Chunks) -> tuple[Any, Any, Any]:
    """(lse, picked, total) of each row of the logits, as `row_statistics`."""
    w = w.astype(layer.compute)
    if chunks.count == 1:
        return row_statistics(layer(x, w, bias), labels)

    def step(_: None, chunk: tuple[Any, Any]) -> tuple[None, tuple[Any, Any, Any]]:
        x, labels = chunk
        return None, row_statistics(layer(x, w, bias), labels)

    _, parts = lax.scan(step, None, (chunks.split(x), chunks.split(labels)))
    lse, picked, total = map(chunks.join, parts)
    return lse, picked, total


@dataclasses.dataclass(frozen=True)
class Cotangents:
    """Of the rows' values: dlse + curvature * lse, dpicked, dtotal, each (*b). lse: where it is known already."""

    dlse: Any
    dpicked: Any
    dtotal: Any
    curvature: Any = None
    lse: Any = None


jax.tree_util.register_dataclass(Cotangents)

Wanted = tuple[bool, bool, bool]


def gradients(
    x: Any, w: Any, bias: Any, labels: Any, cotangents: Cotangents, *, layer: Layer, chunks: Chunks, wanted: Wanted
) -> tuple[Any, tuple[Any, Any, Any]]:
    """(rows' values, (dx, dw, dbias)); values where `cotangents` has no lse, gradients where they are wanted."""
    x, w, labels, *given = _compat.vary_alike((x, w, labels, *jax.tree.leaves((bias, cotangents))))
    bias, cotangents = jax.tree.unflatten(jax.tree.structure((bias, cotangents)), given)
    narrow = w.astype(layer.compute)
    sum_dtype = w.dtype
    if jnp.finfo(w.dtype).bits < 32 and chunks.count > _NARROW_CHUNKS:
        sum_dtype = jnp.dtype(jnp.float32)

    def of_chunk(x: Any, labels: Any, cotangents: Cotangents) -> tuple[Any, Any, Any, Any]:
        logits = layer(x, narrow, bias)
        values, lse = None, cotangents.lse
        if lse is None:
            values = row_statistics(logits, labels)
            lse = values[0]
        dlse = cotangents.dlse
        if cotangents.curvature is not None:
            dlse = dlse + cotangents.curvature * lse
        dlogits = row_gradient(logits, labels, lse, dlse, cotangents.dpicked, cotangents.dtotal)
        dbias = jnp.sum(dlogits, range(labels.ndim), dtype=jnp.promote_types(dlogits.dtype, jnp.float32))
        dlogits = dlogits.astype(layer.compute)
        dx = _dx(dlogits, narrow, x.dtype, layer) if wanted[0] else None
        dw = _dw(x.astype(layer.compute), dlogits, w, sum_dtype, layer) if wanted[1] else None
        return values, dx, dw, dbias if wanted[2] else None

    if chunks.count == 1:
        values, dx, dw, dbias = of_chunk(x, labels, cotangents)
    else:
        # Rows' numbers pass as columns of one array. Where a chunk's lie in one piece, XLA's GPU backend makes one
        # fusion of a row kernel and the slice that it reads, or the update that it writes, and then runs a kernel with
        # several results twice: the forward one again after its logits were written over, so that they were copied.
        # 8192x768x50304: 5.15 ms and 440 MiB in place of 4.06 and 243 (jax 0.11.2, H100, 2026-11-26).
        numbers, structure = jax.tree.flatten(cotangents)
        columns = jnp.stack(numbers, axis=-1), jnp.stack((labels, ~labels), axis=-1)

        def step(sums: Any, chunk: Any) -> tuple[Any, Any]:
            x, numbers, labels = chunk
            of_rows = jax.tree.unflatten(structure, [numbers[..., i] for i in range(numbers.shape[-1])])
            values, dx, *more = of_chunk(x, labels[..., 0], of_rows)
            values = None if values is None else jnp.stack(values, axis=-1)
            return jax.tree.map(jnp.add, sums, tuple(more)), (values, dx)

        sums = (
            jnp.zeros_like(w, sum_dtype) if wanted[1] else None,
            jnp.zeros_like(bias, jnp.promote_types(layer.logits, jnp.float32)) if wanted[2] else None,
        )
        sums = jax.tree.map(lambda s: _compat.vary_alike((s, x))[0], sums)
        parts = jax.tree.map(chunks.split, (x, *columns))
        (dw, dbias), joined = lax.scan(step, sums, parts)
        values, dx = jax.tree.map(chunks.join, joined)
        values = None if values is None else tuple(values[..., i] for i in range(3))
    return values, (
        dx,
        None if dw is None else dw.astype(w.dtype),
        None if dbias is None else dbias.astype(bias.dtype),
    )


def _dx(dlogits: Any, w: Any, dtype: Any, layer: Layer) -> Any:
    dims = (((dlogits.ndim - 1,), (1 - layer.contracting,)), ((), ()))
    return lax.dot_general(dlogits, w, dims, precision=layer.precision, preferred_element_type=dtype)


def _dw(x: Any, dlogits: Any, w: Any, dtype: Any, layer: Layer) -> Any:
    tokens = tuple(range(x.ndim - 1))
    first, second = (x, dlogits) if layer.contracting == 0 else (dlogits, x)
    sharding = _compat.explicit_sharding(jax.typeof(w))  # else it would be ambiguous where the tokens are sharded
    return lax.dot_general(
        first,
        second,
        ((tokens, tokens), ((), ())),
        precision=layer.precision,
        preferred_element_type=dtype,
        **({} if sharding is None else {"out_sharding": sharding}),
    )


# --- rows: cotangents are known in the backward pass ------------------------------------------------------------------


def _rows_reference(x, w, bias, labels, *, layer: Layer, count: int | None):
    chunks = chunks_of(labels.shape, w.dtype, count)
    return statistics(x, w, None if is_absent(bias) else bias, labels, layer=layer, chunks=chunks)


def _rows_backward(operands, results, cotangents, needed, *, layer: Layer, count: int | None):
    x, w, bias, labels = operands
    chunks = chunks_of(labels.shape, w.dtype, count)
    dlse, dpicked, dtotal = dense(cotangents)
    wanted = (0 in needed, 1 in needed, 2 in needed)
    bias = None if is_absent(bias) else bias
    of_rows = Cotangents(dlse, dpicked, dtotal, lse=results[0])
    _, found = gradients(x, w, bias, labels, of_rows, layer=layer, chunks=chunks, wanted=wanted)
    return {i: d for i, d in enumerate(found) if d is not None}


_rows = Kernel(
    "linear_cross_entropy",
    Signature.parse("*b d, d v, ?v, *b -> *b, *b, *b"),
    _rows_reference,
    (WIDENED,) * 3,
    visible=3,
    backward=_rows_backward,
    supports=lambda avals, platform, **_: Refusal("its products are XLA's, and its rows are cross_entropy's"),
)


def rows_of_layer(x: Any, w: Any, bias: Any, labels: Any, *, layer: Layer, count: int | None = None) -> list[Any]:
    """(lse, picked, total) of each token. count: of chunks."""
    if layer.contracting == 1:
        w, layer = w.T, dataclasses.replace(layer, contracting=0)
    return _rows(x, w, absent(w.dtype) if bias is None else bias, labels, layer=layer, count=count)


# --- reduced: cotangents are known in the forward pass ----------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Plan:
    """tail: (rows' values, labels, *extras) -> a number; affine in the values, apart from a multiple of lse**2 of each
    row. Hashable, since JAX caches by it."""

    layer: Layer
    chunks: Chunks
    tail: Callable[..., Any]


@ft.partial(jax.custom_jvp, nondiff_argnums=(0,))
def reduced(plan: Plan, x: Any, w: Any, bias: Any, labels: Any, extras: tuple[Any, ...]) -> Any:
    """plan.tail of the rows' values. bias may be None. Gradients are made in the forward pass, if it has any."""
    values = statistics(x, w, bias, labels, layer=plan.layer, chunks=plan.chunks)
    return plan.tail(values, labels, *extras)


def _reduced_jvp(plan: Plan, primals: tuple, tangents: tuple) -> tuple[Any, Any]:
    x, w, bias, labels, extras = primals
    directions = tangents[:3]
    moving = (_moves(directions[0]), _moves(directions[1]), bias is not None and _moves(directions[2]))
    if any(moving):
        of_rows = _cotangents(plan.tail, x, labels, extras)
        values, found = gradients(x, w, bias, labels, of_rows, layer=plan.layer, chunks=plan.chunks, wanted=moving)
        found = [None if g is None else checkpoint_name(g, "zenith_linear_cross_entropy") for g in found]
    else:
        values, found = statistics(x, w, bias, labels, layer=plan.layer, chunks=plan.chunks), ()
    out, tangent = _tail_jvp(plan.tail, values, labels, extras, tangents[4])
    for gradient, direction in zip(found, directions, strict=False):
        if gradient is not None:
            tangent = tangent + _inner(gradient, direction).astype(out.dtype)
    return out, tangent


reduced.defjvp(_reduced_jvp, symbolic_zeros=True)


def _moves(tangent: Any) -> bool:
    return tangent is not None and not isinstance(tangent, SymbolicZero)


def _inner(a: Any, b: Any) -> Any:
    wide = jnp.promote_types(a.dtype, jnp.float32)
    a, b = _compat.vary_alike((a, b))
    return jnp.sum(a.astype(wide) * b.astype(wide))


def _cotangents(tail: Callable[..., Any], x: Any, labels: Any, extras: tuple[Any, ...]) -> Cotangents:
    """Of the tail in the rows' values: by lse at 0 and at 1, since it is affine in lse."""
    zero = jnp.zeros_like(labels, jnp.promote_types(x.dtype, jnp.float32))
    zero = _compat.vary_alike((zero, x, labels))[0]

    def at(lse: Any) -> Any:
        out, pull = jax.vjp(lambda *values: tail(values, labels, *extras), lse, zero, zero)
        return pull(jnp.ones_like(out))

    dlse, dpicked, dtotal = at(zero)
    return Cotangents(dlse, dpicked, dtotal, curvature=at(zero + 1)[0] - dlse)


def _tail_jvp(tail: Callable[..., Any], values: Any, labels: Any, extras: Sequence[Any], tangents: Sequence[Any]):
    """Value, and its tangent along those of `extras`."""
    moving = [i for i, t in enumerate(tangents) if _moves(t)]

    def of_moving(*given: Any) -> Any:
        full = list(extras)
        for i, value in zip(moving, given, strict=True):
            full[i] = value
        return tail(values, labels, *full)

    if not moving:
        out = of_moving()
        return out, jnp.zeros_like(out)
    return jax.jvp(of_moving, tuple(extras[i] for i in moving), tuple(tangents[i] for i in moving))


# --- the function for people ------------------------------------------------------------------------------------------

Reduction = Literal["mean", "sum", "none"]


@dataclasses.dataclass(frozen=True)
class _Loss:
    """The tail of `linear_cross_entropy`: (rows' values, labels, weights, kept) -> losses, or their sum or mean."""

    classes: int
    label_smoothing: float
    z_loss: float
    reduction: Reduction

    def __call__(self, values: Any, labels: Any, weights: Any, kept: Any) -> Any:
        loss = loss_of_rows(values, labels, self.classes, self.label_smoothing, self.z_loss)
        if weights is not None:
            loss = loss * weights
        if kept is not None:
            loss = jnp.where(kept, loss, 0)
        if self.reduction == "none":
            return loss
        if self.reduction == "sum":
            return jnp.sum(loss)
        counted = jnp.ones_like(loss) if weights is None else weights
        return jnp.sum(loss) / jnp.sum(counted if kept is None else jnp.where(kept, counted, 0))


def linear_cross_entropy(
    x,
    w,
    labels,
    *,
    bias=None,
    weights=None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    ignore_index: int | None = None,
    reduction: Reduction = "mean",
    chunks: int | None = None,
    precision: Any = None,
):
    """`cross_entropy(x @ w + bias, labels)`, reduced over tokens, without the logits in memory.

    x: (*b, d), float32, float16 or bfloat16 (float64 runs as XLA code). w: (d, v), read in x's dtype; where it is
    wider, as a float32 parameter beside bfloat16 activations, its gradient is summed in float32. bias: (v,).
    labels: (*b), integers in [0, v); the loss of another label is NaN. weights: (*b), of each token's loss.
    ignore_index: a label whose tokens have loss 0 and no part in the mean. label_smoothing, z_loss: as in
    `cross_entropy`. reduction: "mean" (by the sum of weights), "sum", or "none" for (*b).
    chunks: how many; by default 4 (8 of a float32 w), and more past 4096 tokens in each. Memory for logits is that of
    one.

    Products accumulate in float32; logits have x's dtype, the rest is float32. Differentiable in x, w, bias and
    weights, forward and reverse, to any order. The gradients of a sum or mean are made in the forward pass, from the
    same logits. Those of "none" wait for the cotangents, and compute the logits again: reduce where you can.
    """
    for name, array in (("x", x), ("w", w)):
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise DTypeError(
                f"linear_cross_entropy: {name} must have a real floating dtype, got {array.dtype}; convert it first"
            )
    check_labels("linear_cross_entropy", labels)
    if x.ndim == 0 or w.ndim != 2 or x.shape[-1] != w.shape[0]:
        raise ShapeError(
            f"linear_cross_entropy: w must have shape (d, v) for x of shape (*b, d), got x {x.shape} and w {w.shape}; "
            f"of an embedding table of shape (v, d) pass its transpose"
        )
    for name, array, shape in (
        ("labels", labels, x.shape[:-1]),
        ("weights", weights, x.shape[:-1]),
        ("bias", bias, w.shape[1:]),
    ):
        if array is not None and array.shape != shape:
            raise ShapeError(
                f"linear_cross_entropy: {name} must have shape {shape} for x {x.shape} and w {w.shape}, "
                f"got {array.shape}"
            )
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"linear_cross_entropy: reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    classes = w.shape[1]
    layer = Layer(0, x.dtype.name, x.dtype.name, precision)
    loss = _Loss(classes, label_smoothing, z_loss, reduction)
    extras = weights, None if ignore_index is None else labels != ignore_index
    labels = as_int32(labels, classes)
    if reduction == "none":
        return loss(rows_of_layer(x, w, bias, labels, layer=layer, count=chunks), labels, *extras)
    return reduced(Plan(layer, chunks_of(labels.shape, w.dtype, chunks), loss), x, w, bias, labels, extras)
