"""Pooling over regions of interest: https://onnx.ai/onnx/operators/onnx__RoiAlign.html and onnx__MaxRoiPool.html

Letters: r regions, n images, c channels, (h, w) their size, (p, q) the size of an output. Coordinates are (x, y).
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from zenith_jax.frontends.onnx.limits import check_size
from zenith_jax.frontends.onnx.ops._arrays import in_jax
from zenith_jax.frontends.onnx.registry import operator
from zenith_jax.frontends.onnx.values import is_known


@operator("RoiAlign", since=10)
def roi_align_from_corner(x, rois, batch_indices, **attributes):
    """Coordinates of opset 10 count from the corner of the first element."""
    return roi_align(x, rois, batch_indices, coordinate_transformation_mode="output_half_pixel", **attributes)


@operator("RoiAlign", since=16)
@in_jax
def roi_align(
    x,
    rois,
    batch_indices,
    *,
    coordinate_transformation_mode="half_pixel",
    mode="avg",
    output_height=1,
    output_width=1,
    sampling_ratio=0,
    spatial_scale=1.0,
):
    """x: (n, c, h, w); rois: (r, 4); batch_indices: (r,) -> (r, c, output_height, output_width).

    Each bin of a region is the mean (mode "max": the maximum, over the corners too, each times its weight) of
    `sampling_ratio`^2 points in it, interpolated; with 0, of one point for each element that it is wide and high. That
    number depends on data: for traced regions it bounds a loop, which has no reverse-mode derivative.
    He et al. 2017, arXiv:1703.06870.
    """
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    check_size((rois.shape[0], x.shape[1], output_height, output_width), dtype)
    half = 0.5 if coordinate_transformation_mode == "half_pixel" else 0.0
    low_x, low_y, high_x, high_y = (rois.astype(dtype) * spatial_scale - half).T
    size_x, size_y = high_x - low_x, high_y - low_y
    if not half:
        size_x, size_y = jnp.maximum(size_x, 1), jnp.maximum(size_y, 1)
    bin_x, bin_y = size_x / output_width, size_y / output_height
    if sampling_ratio:
        count_x = count_y = jnp.full(bin_x.shape, sampling_ratio, jnp.int32)
        bounds: Any = (sampling_ratio, sampling_ratio)
    else:
        count_x, count_y = (jnp.maximum(jnp.ceil(b), 0).astype(jnp.int32) for b in (bin_x, bin_y))
        bounds = (jnp.max(count_x, initial=0), jnp.max(count_y, initial=0))
        if is_known(bounds):
            bounds = (int(bounds[0]), int(bounds[1]))

    images = x.astype(dtype)
    batch = batch_indices.astype(jnp.int32)[:, None, None]

    def axis(low: Any, bin_size: Any, count: Any, outputs: int, size: int, i: Any) -> tuple[Any, Any, Any, Any]:
        """Of point i in each bin, (r, outputs): the two elements that it lies between, and their weights."""
        at = low[:, None] + (jnp.arange(outputs) + ((i + 0.5) / jnp.maximum(count, 1))[:, None]) * bin_size[:, None]
        inside = (at >= -1) & (at <= size)
        at = jnp.maximum(at, 0)
        first = jnp.minimum(jnp.floor(at).astype(jnp.int32), size - 1)
        second = jnp.minimum(first + 1, size - 1)
        fraction = jnp.where(first >= size - 1, 0, at - first)
        return first, second, jnp.where(inside, 1 - fraction, 0), jnp.where(inside, fraction, 0)

    def step(i: Any, carry: Any) -> Any:
        ix, iy = i % bounds[0], i // bounds[0]
        x0, x1, wx0, wx1 = axis(low_x, bin_x, count_x, output_width, x.shape[3], ix)
        y0, y1, wy0, wy1 = axis(low_y, bin_y, count_y, output_height, x.shape[2], iy)
        corners = [
            jnp.moveaxis(images[batch, :, ys[:, :, None], xs[:, None, :]], -1, 1)
            * (wy[:, :, None] * wx[:, None, :])[:, None]
            for ys, wy in ((y0, wy0), (y1, wy1))
            for xs, wx in ((x0, wx0), (x1, wx1))
        ]
        valid = ((ix < count_x) & (iy < count_y))[:, None, None, None]
        if mode == "max":
            best = jnp.maximum(jnp.maximum(corners[0], corners[1]), jnp.maximum(corners[2], corners[3]))
            return jnp.where(valid, jnp.maximum(carry, best), carry)
        return carry + jnp.where(valid, sum(corners), 0)

    initial = -jnp.inf if mode == "max" else 0
    carry = jnp.full((rois.shape[0], x.shape[1], output_height, output_width), initial, dtype)
    result = lax.fori_loop(0, bounds[0] * bounds[1], step, carry)
    if mode == "max":
        result = jnp.where(jnp.isneginf(result), 0, result)
    else:
        result = result / jnp.maximum(count_x * count_y, 1)[:, None, None, None]
    return result.astype(x.dtype)


@operator("MaxRoiPool")
@in_jax
def max_roi_pool(x, rois, *, pooled_shape, spatial_scale=1.0):
    """The maximum of each bin of each region, rounded to whole elements; of an empty bin 0.

    x: (n, c, h, w); rois: (r, 5), image and corners. Girshick 2015, arXiv:1504.08083.
    """
    # The largest of what is made on the way.
    check_size((rois.shape[0], x.shape[1], *pooled_shape, max(x.shape[2:])), x.dtype)
    batch = rois[:, 0].astype(jnp.int32)
    # Half away from zero, as in the original: coordinates are not negative.
    low_x, low_y, high_x, high_y = jnp.floor(rois[:, 1:].astype(jnp.float32) * spatial_scale + 0.5).T
    columns = _bins(low_x, high_x, pooled_shape[1], x.shape[3])
    rows = _bins(low_y, high_y, pooled_shape[0], x.shape[2])
    images = x[batch]
    lowest = np.array(-np.inf, x.dtype)
    by_row = jnp.max(jnp.where(rows[:, None, :, :, None], images[:, :, None], lowest), axis=3)  # (r, c, p, w)
    y = jnp.max(jnp.where(columns[:, None, None], by_row[:, :, :, None], lowest), axis=4)
    filled = rows.any(-1)[:, None, :, None] & columns.any(-1)[:, None, None, :]
    return jnp.where(filled, y, jnp.zeros((), x.dtype))


def _bins(low: Any, high: Any, bins: int, size: int) -> Any:
    """Whether a bin of a region covers an element: (r, bins, size)."""
    width = jnp.maximum(high - low + 1, 1) / bins
    index = jnp.arange(bins)
    first = jnp.floor(index * width[:, None]) + low[:, None]
    last = jnp.ceil((index + 1) * width[:, None]) + low[:, None]
    at = np.arange(size)
    return (at >= first[..., None]) & (at < last[..., None])
