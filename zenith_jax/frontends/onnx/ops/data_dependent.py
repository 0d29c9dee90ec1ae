"""Operators with as many results as the data decides.

Outside of `jax.jit` the count is exact. Inside it, it is `node.size_bound`, given by the user: what is too much is cut
off and what is missing is zeros. Without a bound there is NotStaticError, to which the converter adds the node's name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from zenith_jax.frontends.onnx import dtypes
from zenith_jax.frontends.onnx.registry import Node, operator
from zenith_jax.frontends.onnx.values import NotStaticError, is_known, is_static, static


def _exact_or_bounded(exact: Callable, bounded: Callable, node: Node, *operands: Any) -> tuple[Any, ...]:
    """`exact` on NumPy arrays where the values can be read, else `bounded` with the node's bound."""
    if is_known(operands):
        results = exact(*(None if x is None else np.asarray(x) for x in operands))
        if is_static(operands):
            return results
        return tuple(jnp.asarray(r.astype(dtypes.held(r.dtype))) for r in results)
    if node.size_bound is None:
        raise NotStaticError(
            f"the size of a result of {node.op_type} depends on traced data; outside of jax.jit it is exact, "
            f"inside it needs a size bound"
        )
    return bounded(*operands, size=node.size_bound)


@operator("NonZero")
def non_zero(x, *, node: Node):
    """(rank, count): a column of indices for each element that is not zero, in row-major order."""

    def exact(x):
        # A scalar has an index of no components.
        return (np.stack(np.nonzero(x)).astype(np.int64) if x.ndim else np.zeros((0, int(x != 0)), np.int64),)

    def bounded(x, size):
        if not x.ndim:
            return (jnp.zeros((0, size), dtypes.held(np.int64)),)
        return (dtypes.cast(jnp.stack(jnp.nonzero(x, size=size, fill_value=0)), np.int64),)

    return _exact_or_bounded(exact, bounded, node, x)


@operator("Compress")
def compress(x, condition, *, axis=None, node: Node):
    """The slices along `axis` (elements, without one) for which `condition` holds; it may be shorter than the axis."""
    if axis is None:
        x, axis = x.reshape(-1), 0
    if is_known(condition):
        chosen = np.flatnonzero(static(condition, "condition"))
        return x.take(chosen, axis)

    def bounded(condition, size):
        (chosen,) = jnp.nonzero(condition, size=size, fill_value=x.shape[axis])
        return (jnp.take(jnp.asarray(x), chosen, axis, mode="fill", fill_value=0),)

    return _exact_or_bounded(lambda *_: (), bounded, node, condition)


@operator("Unique")
def unique(x, *, axis=None, sorted=1, node: Node):
    """Values, first positions, for each element of `x` the position of its value, and how often each occurs."""

    def exact(x):
        flat = x.reshape(-1) if axis is None else x
        along = 0 if axis is None else axis
        if flat.dtype == object:
            flat = flat.astype(str)
        values, first, inverse, counts = np.unique(flat, True, True, True, axis=along)
        inverse = inverse.reshape(-1)
        if not sorted:
            order = np.argsort(first, kind="stable")
            values, first, counts = values.take(order, along), first[order], counts[order]
            inverse = np.argsort(order)[inverse]
        return (values.astype(x.dtype), *(v.astype(np.int64) for v in (first, inverse, counts)))

    def bounded(x, size):
        along = None if axis is None else axis % x.ndim
        values, first, inverse, counts = jnp.unique(
            x, True, True, True, axis=along, size=size, fill_value=jnp.zeros((), x.dtype)
        )
        found = counts > 0
        if not sorted:
            order = jnp.argsort(jnp.where(found, first, x.size), stable=True)
            values = jnp.take(values, order, along or 0)
            first, counts, found = first[order], counts[order], found[order]
            inverse = jnp.argsort(order)[inverse]
        first = jnp.where(found, first, 0)
        return (values, *(dtypes.cast(v, np.int64) for v in (first, inverse.reshape(-1), counts)))

    return _exact_or_bounded(exact, bounded, node, x)


@operator("NonMaxSuppression")
def non_max_suppression(
    boxes,
    scores,
    max_output_boxes_per_class=None,
    iou_threshold=None,
    score_threshold=None,
    *,
    center_point_box=0,
    node: Node,
):
    """Rows (batch, class, box) of the boxes that overlap no better one by more than `iou_threshold`.

    boxes: (batch, n, 4), two opposite corners or centre and size; scores: (batch, classes, n). Of equal scores the
    first box is the better one. Without `max_output_boxes_per_class` nothing is selected.
    """

    def order_and_kept(m, boxes, score, most, overlap, least):
        """For one class: the boxes from the best score on, and which of them stay."""
        order = np.argsort(-score, kind="stable") if m is np else jnp.argsort(-score, stable=True)
        boxes = boxes[order]
        eligible = m.ones(score.shape, bool) if least is None else score[order] > least
        corners = _corners(boxes, center_point_box)

        def step(i, kept):
            stays = eligible[i] & (kept.sum() < most) & ~(kept & (_overlap(m, corners, i) > overlap)).any()
            if m is np:
                kept[i] = stays
                return kept
            return kept.at[i].set(stays)

        kept = m.zeros(score.shape, bool)
        if m is jnp:
            return order, lax.fori_loop(0, score.shape[0], step, kept)
        for i in np.flatnonzero(eligible):
            kept = step(i, kept)
        return order, kept

    def scalar(value, default):
        return default if value is None or value.size == 0 else value.reshape(-1)[0]

    def exact(boxes, scores, most, overlap, least):
        rows: list[Any] = [np.zeros((0, 3), np.int64)]
        for b, c in np.ndindex(scores.shape[:2]):
            limits = scalar(most, 0), scalar(overlap, 0.0), scalar(least, None)
            order, kept = order_and_kept(np, boxes[b], scores[b, c], *limits)
            rows.append(np.array([(b, c, i) for i in order[kept]], np.int64).reshape(-1, 3))
        return (np.concatenate(rows),)

    def bounded(boxes, scores, most, overlap, least, size):
        limits = scalar(most, 0), scalar(overlap, 0.0), scalar(least, None)
        boxes, scores = jnp.asarray(boxes), jnp.asarray(scores)
        of_class = jax.vmap(lambda box, score: order_and_kept(jnp, box, score, *limits), (None, 0))
        order, kept = jax.vmap(of_class)(boxes, scores)
        batch, kind, rank = jnp.nonzero(kept, size=size, fill_value=0)
        found = jnp.arange(size) < kept.sum()
        rows = jnp.stack([batch, kind, order[batch, kind, rank]], 1)
        return (dtypes.cast(jnp.where(found[:, None], rows, 0), np.int64),)

    operands = boxes, scores, max_output_boxes_per_class, iou_threshold, score_threshold
    return _exact_or_bounded(exact, bounded, node, *operands)


def _corners(boxes: Any, center_point_box: int) -> tuple[Any, Any, Any, Any]:
    """Low and high ends of both coordinates."""
    a, b, c, d = (boxes[:, i] for i in range(4))
    if center_point_box:  # x and y of the centre, width, height
        return b - d / 2, b + d / 2, a - c / 2, a + c / 2
    m = np if is_static(boxes) else jnp
    return m.minimum(a, c), m.maximum(a, c), m.minimum(b, d), m.maximum(b, d)


def _overlap(m: Any, corners: tuple[Any, Any, Any, Any], i: Any) -> Any:
    """Intersection over union of box i with every box; boxes without area overlap with none."""
    y1, y2, x1, x2 = corners
    area = (y2 - y1) * (x2 - x1)
    height = m.minimum(y2, y2[i]) - m.maximum(y1, y1[i])
    width = m.minimum(x2, x2[i]) - m.maximum(x1, x1[i])
    both = m.maximum(height, 0) * m.maximum(width, 0)
    union = area + area[i] - both
    return m.where((union > 0) & (area > 0) & (area[i] > 0), both / m.where(union > 0, union, 1), 0)
