"""Resize and Upsample: interpolation along one axis after the other.

Along an axis every output is a weighted sum of input elements ("taps") whose positions and weights depend on sizes
only, so they are computed in NumPy. https://onnx.ai/onnx/operators/onnx__Resize.html (version 19)
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from zenith_jax.frontends.onnx.limits import check_size
from zenith_jax.frontends.onnx.registry import operator
from zenith_jax.frontends.onnx.values import OnnxError, UnsupportedError, ints, is_static, static, xp

# Up to this many taps are added up one by one; more (antialiased reduction) are a product with a matrix.
MAX_GATHERED_TAPS = 4


@dataclasses.dataclass(frozen=True)
class _Method:
    mode: str = "nearest"
    coordinates: str = "half_pixel"
    nearest: str = "round_prefer_floor"
    cubic_a: float = -0.75
    exclude_outside: bool = False
    antialias: bool = False
    extrapolation: float = 0.0


@operator("Upsample")
def upsample_2d(x, *, height_scale, width_scale, mode="nearest"):
    return upsample(x, np.array([1, 1, height_scale, width_scale], np.float32), mode=mode)


@operator("Upsample", since=7)
def upsample(x, scales, *, mode="nearest"):
    """`scales` is an attribute before opset 9, an input since."""
    return resize_asymmetric(x, np.asarray(static(scales, "scales"), np.float32), mode=mode)


@operator("Resize", since=10)
def resize_asymmetric(x, scales, *, mode="nearest"):
    """Opset 10 says nothing of coordinates. As in ONNX Runtime: x / scale; nearest cuts off, or rounds up to shrink."""
    scales = static(scales, "scales").reshape(-1)
    method = _Method(_mode(mode), "asymmetric", "simple")
    return _resize(
        x, method, range(x.ndim), [_Axis(d, _scaled(d, s), float(s)) for d, s in zip(x.shape, scales, strict=True)]
    )


@operator("Resize", since=11)
def resize(
    x,
    roi=None,
    scales=None,
    sizes=None,
    *,
    mode="nearest",
    coordinate_transformation_mode="half_pixel",
    nearest_mode="round_prefer_floor",
    cubic_coeff_a=-0.75,
    exclude_outside=0,
    extrapolation_value=0.0,
    antialias=0,
    axes=None,
    keep_aspect_ratio_policy="stretch",
):
    """By `scales`, or to `sizes`; an empty one counts as absent. `roi` matters for tf_crop_and_resize only."""
    axes = tuple(range(x.ndim)) if axes is None else tuple(a % x.ndim for a in axes)
    given = [x.shape[a] for a in axes]
    if scales is not None and scales.size:
        factors = [float(s) for s in static(scales, "scales").reshape(-1)]
        out = [_scaled(d, np.float32(s)) for d, s in zip(given, factors, strict=True)]
    elif sizes is not None and sizes.size:
        out = list(ints(sizes, "sizes"))
        factors = [o / d if d else 1.0 for o, d in zip(out, given, strict=True)]
        if keep_aspect_ratio_policy != "stretch":
            factor = (min if keep_aspect_ratio_policy == "not_larger" else max)(factors)
            factors = [factor] * len(axes)
            out = [math.floor(factor * d + 0.5) for d in given]
    else:
        raise OnnxError("Resize needs scales or sizes")
    crop = coordinate_transformation_mode == "tf_crop_and_resize"
    regions: Any = [(0.0, 1.0)] * len(axes)
    if crop:
        if roi is None or not roi.size:
            raise OnnxError("Resize by tf_crop_and_resize needs a region of interest")
        regions = static(roi, "roi").astype(np.float64).reshape(2, -1).T
    method = _Method(
        _mode(mode),
        coordinate_transformation_mode,
        nearest_mode,
        cubic_coeff_a,
        bool(exclude_outside),
        bool(antialias),
        extrapolation_value,
    )
    plans = [_Axis(*plan) for plan in zip(given, out, factors, [tuple(r) for r in regions], strict=True)]
    return _resize(x, method, axes, plans)


def _mode(mode: str) -> str:
    """Before opset 11 linear was also spelled bilinear and trilinear."""
    mode = {"bilinear": "linear", "trilinear": "linear"}.get(mode, mode)
    if mode not in ("nearest", "linear", "cubic"):
        raise UnsupportedError(f"Resize has no mode {mode!r}; its modes are nearest, linear and cubic")
    return mode


def _scaled(size: int, scale: Any) -> int:
    """floor(size * scale) in float32, the type of `scale`: 10 * 0.7 is 7 there, and 6.9999 in float64."""
    return math.floor(np.float32(size) * np.float32(scale))


@dataclasses.dataclass(frozen=True)
class _Axis:
    size: int
    out: int
    scale: float
    region: tuple[float, float] = (0.0, 1.0)

    def is_unchanged(self, method: _Method) -> bool:
        crop = method.coordinates == "tf_crop_and_resize" and self.region != (0.0, 1.0)
        return self.size == self.out and self.scale == 1.0 and not crop


def _resize(x: Any, method: _Method, axes: Any, plans: list[_Axis]) -> Any:
    m = xp(x)
    dtype = x.dtype
    shape = list(x.shape)
    for axis, plan in zip(axes, plans, strict=True):
        shape[axis] = plan.out
    check_size(shape, np.float64)  # as wide as positions are computed
    changed = [(a, p) for a, p in zip(axes, plans, strict=True) if not p.is_unchanged(method)]
    for _, plan in changed:
        if plan.out and not plan.size:
            raise OnnxError(f"Resize of an empty axis of {x.shape} to {plan.out} elements")
    if method.mode != "nearest":
        x = x.astype(m.promote_types(dtype, m.float32) if jnp.issubdtype(dtype, jnp.floating) else m.float32)
    outside = None
    for axis, plan in changed:
        position = _positions(method, plan)
        if method.coordinates == "tf_crop_and_resize":
            beyond = (position < 0) | (position > plan.size - 1)
            beyond = beyond.reshape([-1 if i == axis else 1 for i in range(x.ndim)])
            outside = beyond if outside is None else outside | beyond
        if method.mode == "nearest":
            x = _taken(x, np.clip(_nearest(position, method, plan), 0, plan.size - 1), axis)
        else:
            x = _weighted(x, *_taps(position, method, plan), axis)
    if outside is not None:
        x = m.where(outside, m.asarray(method.extrapolation, x.dtype), x)
    return x.astype(dtype)


def _positions(method: _Method, axis: _Axis) -> np.ndarray:
    """The coordinate in the input of each output element."""
    i = np.arange(axis.out, dtype=np.float64)
    length = axis.scale * axis.size  # of the output, before it was cut to an integer
    match method.coordinates:
        case "half_pixel":
            return (i + 0.5) / axis.scale - 0.5
        case "half_pixel_symmetric":
            return axis.size / 2 * (1 - axis.out / length) + (i + 0.5) / axis.scale - 0.5
        case "pytorch_half_pixel":
            return (i + 0.5) / axis.scale - 0.5 if axis.out > 1 else np.zeros_like(i)
        case "align_corners":
            return i * (axis.size - 1) / (length - 1) if axis.out > 1 else np.zeros_like(i)
        case "asymmetric":
            return i / axis.scale
        case "tf_crop_and_resize":
            low, high = axis.region
            if axis.out == 1:
                return np.full_like(i, 0.5 * (low + high) * (axis.size - 1))
            return low * (axis.size - 1) + i * (high - low) * (axis.size - 1) / (length - 1)
    raise UnsupportedError(f"Resize has no coordinate_transformation_mode {method.coordinates!r}")


def _nearest(position: np.ndarray, method: _Method, axis: _Axis) -> np.ndarray:
    match method.nearest:
        case "round_prefer_floor":
            rounded = np.ceil(position - 0.5)
        case "round_prefer_ceil":
            rounded = np.floor(position + 0.5)
        case "floor":
            rounded = np.floor(position)
        case "ceil":
            rounded = np.ceil(position)
        case "simple":
            rounded = np.ceil(position) if axis.scale < 1 else np.floor(position)
        case _:
            raise UnsupportedError(f"Resize has no nearest_mode {method.nearest!r}")
    return rounded.astype(np.int64)


def _taps(position: np.ndarray, method: _Method, axis: _Axis) -> tuple[np.ndarray, np.ndarray]:
    """Positions and weights, (taps, out) both; positions beyond the edge are the edge."""
    stretch = min(axis.scale, 1.0) if method.antialias else 1.0
    reach = 1 if method.mode == "linear" else 2
    first = math.floor(-reach / stretch) + 1
    floor = np.floor(position)
    offsets = np.arange(first, 2 - first)[:, None]
    distance = np.abs(offsets - (position - floor)) * stretch
    weights = np.maximum(1 - distance, 0) if reach == 1 else cubic_weight(distance, method.cubic_a)
    where = floor.astype(np.int64) + offsets
    if method.exclude_outside:
        weights = np.where((where >= 0) & (where < axis.size), weights, 0)
    if method.exclude_outside or method.antialias:
        weights = weights / weights.sum(0)
    used = weights.any(1)
    return np.clip(where, 0, axis.size - 1)[used], weights[used]


def cubic_weight(t: Any, a: float) -> Any:
    """The convolution kernel of Keys 1981, doi:10.1109/TASSP.1981.1163711, equation (4)."""
    m = xp(t)
    near = ((a + 2) * t - (a + 3)) * t * t + 1
    far = ((a * t - 5 * a) * t + 8 * a) * t - 4 * a
    return m.where(t <= 1, near, m.where(t < 2, far, 0))


def _taken(x: Any, where: np.ndarray, axis: int) -> Any:
    """Whole multiples are a broadcast, which XLA fuses into what reads it, instead of a gather."""
    size, out = x.shape[axis], where.shape[0]
    if size and out % size == 0 and np.array_equal(where, np.repeat(np.arange(size), out // size)):
        return xp(x).repeat(x, out // size, axis)
    if size and where.size and np.array_equal(where, np.arange(out) * (step := max(where[-1] // max(out - 1, 1), 1))):
        return x[(slice(None),) * axis + (slice(0, int(where[-1]) + 1, int(step)),)]
    return xp(x).take(x, where, axis)


def _weighted(x: Any, where: np.ndarray, weights: np.ndarray, axis: int) -> Any:
    weights = weights.astype(x.dtype)
    if len(where) <= MAX_GATHERED_TAPS:
        shape = [-1 if i == axis else 1 for i in range(x.ndim)]
        taps = [_taken(x, w, axis) * v.reshape(shape) for w, v in zip(where, weights, strict=True)]
        return sum(taps[1:], taps[0]) if taps else _taken(x, np.zeros(where.shape[1], np.int64), axis)
    matrix = np.zeros((where.shape[1], x.shape[axis]), x.dtype)
    np.add.at(matrix, (np.arange(where.shape[1])[None], where), weights)
    if is_static(x):
        return np.moveaxis(np.tensordot(x, matrix, (axis, 1)), -1, axis)
    return jnp.moveaxis(jnp.tensordot(x, matrix, (axis, 1), precision="highest"), -1, axis)
