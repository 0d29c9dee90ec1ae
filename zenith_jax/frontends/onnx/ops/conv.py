"""Convolutions of any number of spatial axes, channels first: https://onnx.ai/onnx/operators/

Letters: n batch, c channels of the input, m channels of the output, g groups.
"""

from __future__ import annotations

import dataclasses
import functools as ft
import itertools
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from zenith_jax.frontends.onnx.limits import check_size
from zenith_jax.frontends.onnx.ops._arrays import in_jax
from zenith_jax.frontends.onnx.ops._windows import Windows, check_fits, per_axis, windows
from zenith_jax.frontends.onnx.ops.linear import as_int8, requantized
from zenith_jax.frontends.onnx.registry import operator
from zenith_jax.ops.grouped_conv import Geometry, grouped_conv, taps


def _convolved(x: Any, w: Any, geometry: Windows, group: int) -> Any:
    """x: (n, c, *spatial), w: (m, c/g, *kernel), both of one dtype of floats."""
    return grouped_conv(x, w, _geometry(geometry), group)


def _geometry(w: Windows) -> Geometry:
    return Geometry(w.stride, tuple(w.padding), w.dilation)


def not_constant(w: Any, x: Any) -> Any:
    """w, whose elements are equal, in a form in which XLA does not see that.

    Its CPU compiler (jaxlib 0.10.2) fuses a convolution, the broadcast of its weights, and a sum over pixels after it
    into one call of a library, which computes garbage. test_convolution_with_weights_of_one_value is for this.
    """
    if not isinstance(x, Tracer) or not x.size or x.dtype == bool:
        return w
    zero = jnp.minimum((x.reshape(-1)[0] > 0).astype(jnp.int32), 0)
    w = jnp.asarray(w)
    return jnp.where(lax.broadcasted_iota(jnp.int32, w.shape, 0) < zero, jnp.zeros((), w.dtype), w)


def _channels(x: Any, rank: int) -> Any:
    """A vector of channels, or a scalar, to be broadcast with (n, c, *spatial)."""
    return x.reshape(-1, *(1,) * rank) if x.size > 1 else x.reshape(())


@operator("Conv")
@in_jax
def conv(x, w, b=None, *, auto_pad="NOTSET", dilations=None, group=1, kernel_shape=None, pads=None, strides=None):
    """x: (n, c, *spatial); w: (m, c/g, *kernel); b: (m,)."""
    del kernel_shape  # that of w
    geometry = windows(x.shape[2:], w.shape[2:], strides=strides, dilations=dilations, pads=pads, auto_pad=auto_pad)
    check_fits(x, geometry)
    y = _convolved(x, w, geometry, group)
    return y if b is None else y + b.reshape(-1, *(1,) * (x.ndim - 2))


# --- quantised --------------------------------------------------------------------------------------------------------


def integer_conv(x: Any, w: Any, x_zero_point: Any, w_zero_point: Any, geometry: Windows, group: int) -> Any:
    """The convolution of x - x_zero_point with w - w_zero_point in int32, from int8 or uint8; exact modulo 2^32.

    As in `integer_matmul` the zero points are taken out, and the product is one of int8. Padding stands for a zero,
    which is x_zero_point, so x is padded with that first.
    """
    rank = x.ndim - 2
    check_fits(x, geometry)
    x, zero_x = as_int8(x, x_zero_point)
    w, zero_w = as_int8(w, w_zero_point)
    fill = jnp.int8(0) if zero_x is None else zero_x.reshape(()).astype(jnp.int8)
    x = lax.pad(x, fill, [(0, 0, 0)] * 2 + [(low, high, 0) for low, high in geometry.padding])
    geometry = dataclasses.replace(geometry, before=(0,) * rank, after=(0,) * rank)
    y = _integer_sums(x, w, geometry, group)
    spatial = tuple(range(1, w.ndim))
    if zero_x is not None:
        y = y - zero_x.reshape(()) * _channels(jnp.sum(w, axis=spatial, dtype=jnp.int32), rank)
    if zero_w is not None:
        zero_w = _channels(jnp.broadcast_to(zero_w.reshape(-1), (w.shape[0],)), rank)
        sums = _integer_sums(x, jnp.ones_like(w), geometry, group)
        y = y - zero_w * sums
        if zero_x is not None:
            y = y + zero_x.reshape(()) * zero_w * math.prod(w.shape[1:])
    return y


# A float32 sum of that many products of int8, each at most 2^14 in size, is exact: it stays within 2^24.
_EXACT_TAPS = 2**24 // 2**14


def _integer_sums(x: Any, w: Any, geometry: Windows, group: int) -> Any:
    """The convolution of int8 with int8, without padding, in int32."""
    by_floats = ft.partial(_sums_by_floats, geometry=geometry, group=group)
    by_taps = ft.partial(_sums_by_taps, geometry=geometry, group=group)
    return lax.platform_dependent(jnp.asarray(x), jnp.asarray(w), cpu=by_floats, default=by_taps)


def _sums_by_floats(x: Any, w: Any, *, geometry: Windows, group: int) -> Any:
    """In float32, by as many channels at a time as stay exact.

    XLA has no fast convolution of integers on the CPU: 32 channels of 56 x 56 by 3 x 3 took 12.2 ms, and 0.53 ms in
    float32 (two cores with AVX2, other work on them, jax 0.11.2, 2026-11). On a GPU it would not be exact: cuDNN may
    choose Winograd's algorithm, which multiplies by fractions.
    """
    step = _EXACT_TAPS // max(math.prod(w.shape[2:]), 1)
    if step == 0:
        return _sums_by_taps(x, w, geometry=geometry, group=group)
    by_group = x.reshape(x.shape[0], group, -1, *x.shape[2:])
    total: Any = 0
    for start in range(0, w.shape[1], step):
        some = slice(start, start + step)
        part = by_group[:, :, some].reshape(x.shape[0], -1, *x.shape[2:]).astype(jnp.float32)
        sums = _convolved(part, w[:, some].astype(jnp.float32), geometry, group)
        total = total + sums.astype(jnp.int32)
    return total


def _sums_by_taps(x: Any, w: Any, *, geometry: Windows, group: int) -> Any:
    """A product of int8 matrices for each element of the kernel."""
    spatial, kernel = x.shape[2:], w.shape[2:]
    x = x.reshape(x.shape[0], group, -1, *spatial)
    w = w.reshape(group, -1, *w.shape[1:])
    total: Any = 0
    for tap, window in taps(spatial, kernel, _geometry(geometry)):
        part = x[(slice(None),) * 3 + window]
        flat = part.reshape(*part.shape[:3], -1)
        of_tap = w[(slice(None),) * 3 + tap]
        sums = jnp.einsum("ngcs,gmc->ngms", flat, of_tap, preferred_element_type=jnp.int32)
        total = total + sums.reshape(x.shape[0], -1, *part.shape[3:])
    return total


@operator("ConvInteger", since=10)
def conv_integer(
    x,
    w,
    x_zero_point=None,
    w_zero_point=None,
    *,
    auto_pad="NOTSET",
    dilations=None,
    group=1,
    kernel_shape=None,
    pads=None,
    strides=None,
):
    del kernel_shape
    geometry = windows(x.shape[2:], w.shape[2:], strides=strides, dilations=dilations, pads=pads, auto_pad=auto_pad)
    return integer_conv(x, w, x_zero_point, w_zero_point, geometry, group)


@operator("QLinearConv", since=10)
def qlinear_conv(
    x,
    x_scale,
    x_zero_point,
    w,
    w_scale,
    w_zero_point,
    y_scale,
    y_zero_point,
    b=None,
    *,
    auto_pad="NOTSET",
    dilations=None,
    group=1,
    kernel_shape=None,
    pads=None,
    strides=None,
):
    """b: int32, quantised with x_scale * w_scale and zero point 0."""
    del kernel_shape
    rank = x.ndim - 2
    geometry = windows(x.shape[2:], w.shape[2:], strides=strides, dilations=dilations, pads=pads, auto_pad=auto_pad)
    accumulator = integer_conv(x, w, x_zero_point, w_zero_point, geometry, group)
    if b is not None:
        accumulator = accumulator + _channels(jnp.asarray(b), rank)
    scale = jnp.asarray(x_scale) * _channels(jnp.asarray(w_scale), rank) / jnp.asarray(y_scale)
    return requantized(accumulator, scale, jnp.asarray(y_zero_point))


# --- transposed -------------------------------------------------------------------------------------------------------


@operator("ConvTranspose")
@in_jax
def conv_transpose(
    x,
    w,
    b=None,
    *,
    auto_pad="NOTSET",
    dilations=None,
    group=1,
    kernel_shape=None,
    output_padding=None,
    output_shape=None,
    pads=None,
    strides=None,
):
    """x: (n, c, *spatial); w: (c, m/g, *kernel). Each element of x adds its multiple of the kernel to the output.

    Computed as a convolution of x, spread out by the strides, with the kernel reversed.
    """
    del kernel_shape
    rank = x.ndim - 2
    strides, dilations = per_axis(strides, rank), per_axis(dilations, rank)
    extra = per_axis(output_padding, rank, 0)
    pads = per_axis(pads, 2 * rank, 0)
    padding, crop = [], []
    size = list(x.shape)
    for i in range(rank):
        extent = (w.shape[2 + i] - 1) * dilations[i] + 1
        full = strides[i] * (x.shape[2 + i] - 1) + extra[i] + extent
        front, back = pads[i], pads[i + rank]
        if output_shape is not None or auto_pad in ("SAME_UPPER", "SAME_LOWER"):
            wanted = (
                x.shape[2 + i] * strides[i] if output_shape is None else int(output_shape[len(output_shape) - rank + i])
            )
            total = full - wanted
            front = total // 2 if auto_pad == "SAME_UPPER" else total - total // 2
            back = total - front
        elif auto_pad == "VALID":
            front = back = 0
        low, high = extent - 1 - front, extent - 1 - back + extra[i]
        padding.append((max(low, 0), max(high, 0)))
        crop.append((max(-low, 0), max(-high, 0)))
        size[2 + i] = full + padding[i][0] + padding[i][1]
    check_size(size, x.dtype)
    c, m = w.shape[0], w.shape[1] * group
    kernel = jnp.flip(w, tuple(range(2, w.ndim))).reshape(group, c // group, m // group, *w.shape[2:])
    kernel = jnp.swapaxes(kernel, 1, 2).reshape(m, c // group, *w.shape[2:])
    y = lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(1,) * rank,
        padding=padding,
        lhs_dilation=strides,
        rhs_dilation=dilations,
        feature_group_count=group,
    )
    y = y[(..., *(slice(low, n - high) for (low, high), n in zip(crop, y.shape[2:], strict=True)))]
    return y if b is None else y + b.reshape(-1, *(1,) * rank)


# --- deformable -------------------------------------------------------------------------------------------------------


@operator("DeformConv", since=19)
@in_jax
def deform_conv(
    x,
    w,
    offset,
    b=None,
    mask=None,
    *,
    dilations=None,
    group=1,
    kernel_shape=None,
    offset_group=1,
    pads=None,
    strides=None,
):
    """Convolution whose taps are moved by `offset` and weighted by `mask`: Dai et al. 2017, arXiv:1703.06211.

    offset: (n, offset_group * taps * r, *outputs), r spatial axes, the coordinates of a tap side by side;
    mask: (n, offset_group * taps, *outputs). Between elements x is interpolated linearly, outside of them it is 0.
    """
    del kernel_shape
    n, c, *sizes = x.shape
    rank, m = len(sizes), w.shape[0]
    geometry = windows(sizes, w.shape[2:], strides=strides, dilations=dilations, pads=pads)
    check_fits(x, geometry)
    taps, points = math.prod(geometry.size), math.prod(geometry.outputs)

    # Positions, (n, offset_group, taps * points) for each axis.
    offset = offset.reshape(n, offset_group, taps, rank, points).astype(jnp.promote_types(x.dtype, jnp.float32))
    grid = np.meshgrid(
        *[np.arange(k) * d for k, d in zip(geometry.size, geometry.dilation, strict=True)], indexing="ij"
    )
    starts = [np.arange(o) * s - p for o, s, p in zip(geometry.outputs, geometry.stride, geometry.before, strict=True)]
    origin = np.meshgrid(*starts, indexing="ij")
    positions = [
        (offset[:, :, :, i] + (grid[i].reshape(-1, 1) + origin[i].reshape(1, -1))).reshape(
            n, offset_group, taps * points
        )
        for i in range(rank)
    ]
    sampled = _interpolated(x.reshape(n, offset_group, c // offset_group, -1), sizes, positions)
    if mask is not None:
        sampled = sampled * mask.reshape(n, offset_group, 1, taps * points)
    sampled = sampled.reshape(n, group, c // group, taps, points)
    kernel = w.reshape(group, m // group, c // group, taps)
    y = jnp.einsum("gmct,ngctp->ngmp", kernel, sampled).reshape(n, m, *geometry.outputs)
    return y if b is None else y + b.reshape(-1, *(1,) * rank)


def _interpolated(x: Any, sizes: list[int], positions: list[Any]) -> Any:
    """x (n, o, c, prod(sizes)) at positions, each (n, o, p), multilinear, zero outside: (n, o, c, p)."""
    floors = [jnp.floor(p) for p in positions]
    result: Any = 0
    for corner in itertools.product((0, 1), repeat=len(sizes)):
        index: Any = 0
        weight: Any = 1
        for size, position, floor, step in zip(sizes, positions, floors, corner, strict=True):
            at = floor + step
            weight = weight * jnp.where((at >= 0) & (at < size), 1 - jnp.abs(position - at), 0)
            index = index * size + jnp.clip(at, 0, size - 1).astype(jnp.int32)
        result = result + jnp.take_along_axis(x, index[:, :, None], axis=-1) * weight[:, :, None].astype(x.dtype)
    return result
