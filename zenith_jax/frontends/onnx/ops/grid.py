"""GridSample and AffineGrid: an image read at computed positions. Of any rank, differentiable in image and grid."""

from __future__ import annotations

import itertools
import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from zenith_jax.frontends.onnx.limits import check_size
from zenith_jax.frontends.onnx.ops.resize import cubic_weight
from zenith_jax.frontends.onnx.registry import operator
from zenith_jax.frontends.onnx.values import UnsupportedError, ints, xp

_MODES = {"bilinear": "linear", "bicubic": "cubic", "linear": "linear", "cubic": "cubic", "nearest": "nearest"}
_TAPS = {"nearest": (0,), "linear": (0, 1), "cubic": (-1, 0, 1, 2)}


@operator("GridSample", since=16)
def grid_sample(x, grid, *, mode="linear", padding_mode="zeros", align_corners=0):
    """x: (n, c, *in), grid: (n, *out, rank) of coordinates in [-1, 1], the last axis of the image first.

    -1 and 1 are the middles of the corner pixels with `align_corners`, else their outer edges.
    """
    if mode not in _MODES or padding_mode not in ("zeros", "border", "reflection"):
        raise UnsupportedError(f"GridSample has no mode {mode!r} with padding {padding_mode!r}")
    mode = _MODES[mode]
    m = xp(x, grid)
    n, c, *image = x.shape
    out = grid.shape[1:-1]
    grid = grid.astype(m.promote_types(grid.dtype, m.float32))
    axes = []  # for each axis of the image a list of taps: (position, whether it is inside, weight)
    for axis, size in enumerate(image):
        # flat positions, so that one gather reads all channels
        along = grid[..., len(image) - 1 - axis].reshape(n, -1)
        along = (along + 1) / 2 * (size - 1) if align_corners else ((along + 1) * size - 1) / 2
        axes.append(_taps(along, size, mode, padding_mode, bool(align_corners)))
    dtype = x.dtype
    pixels = x.reshape(n, c, math.prod(image))
    pixels = pixels if mode == "nearest" else pixels.astype(m.promote_types(dtype, m.float32))
    total: Any = 0
    for taps in itertools.product(*axes):
        flat: Any = 0
        inside: Any = True
        weight: Any = 1.0
        for size, (position, is_inside, w) in zip(image, taps, strict=True):
            flat, inside, weight = flat * size + position, inside & is_inside, weight * w
        value = m.take_along_axis(pixels, flat[:, None, :], 2)
        value = (
            m.where(m.asarray(inside)[:, None, :], value, m.zeros((), value.dtype))
            if padding_mode == "zeros"
            else value
        )
        total = value if mode == "nearest" else total + value * m.asarray(weight)[:, None, :].astype(value.dtype)
    return total.reshape(n, c, *out).astype(dtype)


def _taps(along: Any, size: int, mode: str, padding: str, align_corners: bool) -> list[tuple[Any, Any, Any]]:
    m = xp(along)
    low, high = (0.0, size - 1.0) if align_corners else (-0.5, size - 0.5)
    along = m.rint(along) if mode == "nearest" else along
    beyond = (along < low) | (along > high)
    if padding == "border":
        along = m.where(beyond, m.clip(along, 0, size - 1), along)
    elif padding == "reflection":
        along = m.where(beyond, _reflected(along, low, high), along)
    first = m.floor(along)
    taps = []
    for offset in _TAPS[mode]:
        position = first + offset
        inside = (position >= 0) & (position < size)
        if padding == "reflection":
            position = m.where((position < low) | (position > high), m.trunc(_reflected(position, low, high)), position)
        distance = m.abs(along - first - offset)
        weight = {"nearest": 1.0, "linear": 1 - distance, "cubic": cubic_weight(distance, -0.75)}[mode]
        # NaN, of which there is no nearest pixel, reads the first one.
        position = m.nan_to_num(m.clip(position, 0, size - 1)).astype(m.int32)
        taps.append((position, inside, weight))
    return taps


def _reflected(position: Any, low: float, high: float) -> Any:
    """Back and forth between the borders."""
    m = xp(position)
    length = high - low
    if length == 0:
        return m.full_like(position, low)
    distance = m.abs(position - low)
    turns = m.floor(distance / length)
    rest = distance - turns * length
    return m.where(turns % 2 == 0, low + rest, high - rest)


@operator("AffineGrid", since=20)
def affine_grid(theta, size, *, align_corners=0):
    """theta: (n, 2, 3) or (n, 3, 4); size: (n, c, *image). The grid for GridSample: theta @ (x, y, [z,] 1)."""
    n, _, *image = ints(size, "size")
    check_size((n, *image, len(image) + 1), np.float64)
    axes = []
    for d in image:
        if align_corners:
            axes.append(np.linspace(-1.0, 1.0, d) if d > 1 else np.full(1, -1.0))
        else:
            axes.append((2 * np.arange(d) + 1) / d - 1)
    coordinates = [*np.meshgrid(*axes, indexing="ij")[::-1], np.ones(image)]
    points = np.stack(coordinates, -1).reshape(-1, len(image) + 1).astype(theta.dtype)
    m = xp(theta)
    grid = (
        np.matmul(points, np.swapaxes(theta, 1, 2))
        if m is np
        else jnp.matmul(points, jnp.swapaxes(theta, 1, 2), precision="highest")
    )
    return grid.reshape(n, *image, len(image)).astype(theta.dtype)
