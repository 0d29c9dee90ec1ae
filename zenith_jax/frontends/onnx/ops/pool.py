"""Pooling over windows and over all of a channel, and max-unpooling: https://onnx.ai/onnx/operators/

x is (n, c, *spatial), with any number of spatial axes.
"""

from __future__ import annotations

import functools as ft
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from zenith_jax.frontends.onnx.dtypes import cast, is_floating
from zenith_jax.frontends.onnx.limits import check_size
from zenith_jax.frontends.onnx.ops._arrays import in_jax
from zenith_jax.frontends.onnx.ops._windows import Windows, check_fits, per_axis, windows
from zenith_jax.frontends.onnx.registry import operator
from zenith_jax.frontends.onnx.values import ints


def _reduced(x: Any, geometry: Windows, initial: Any, function: Any) -> Any:
    """`function` over the windows of x, whose spatial axes are its last."""
    outer = x.ndim - len(geometry.size)
    check_fits(x, geometry)
    ones = (1,) * outer
    return lax.reduce_window(
        x,
        initial,
        function,
        window_dimensions=(*ones, *geometry.size),
        window_strides=(*ones, *geometry.stride),
        padding=[(0, 0)] * outer + geometry.padding,
        window_dilation=(*ones, *geometry.dilation),
    )


def _lowest(dtype: Any) -> np.ndarray:
    return np.array(-np.inf if jnp.issubdtype(dtype, jnp.floating) else jnp.iinfo(dtype).min, dtype)


@operator("MaxPool")
@in_jax
def max_pool(
    x,
    *,
    kernel_shape,
    auto_pad="NOTSET",
    ceil_mode=0,
    dilations=None,
    pads=None,
    storage_order=0,
    strides=None,
    node,
):
    """The maximum of each window and, if wanted, where in x it stands: an index into all of x, flattened."""
    geometry = windows(
        x.shape[2:],
        kernel_shape,
        strides=strides,
        dilations=dilations,
        pads=pads,
        auto_pad=auto_pad,
        ceil_mode=ceil_mode,
    )
    y = _reduced(x, geometry, _lowest(x.dtype), lax.max)
    if len(node.wanted) < 2 or not node.wanted[1]:
        return y
    return y, _max_indices(lax.stop_gradient(x), geometry, column_major=bool(storage_order))


def _max_indices(x: Any, geometry: Windows, *, column_major: bool) -> Any:
    """Index of the first maximum of each window; with `column_major` the first spatial axis is the one that runs."""
    spatial = x.shape[2:]
    index_dtype = cast(jnp.zeros(()), np.int64).dtype
    order = jnp.arange(math.prod(x.shape), dtype=index_dtype).reshape(x.shape)

    def first_larger(a: Any, b: Any) -> Any:
        take_b = (b[0] > a[0]) | ((b[0] == a[0]) & (b[1] < a[1]))
        return jnp.where(take_b, b[0], a[0]), jnp.where(take_b, b[1], a[1])

    outside = np.array(jnp.iinfo(index_dtype).max, index_dtype)
    outer = (1, 1)
    _, index = lax.reduce_window(
        (x, order),
        (_lowest(x.dtype), outside),
        first_larger,
        window_dimensions=(*outer, *geometry.size),
        window_strides=(*outer, *geometry.stride),
        padding=[(0, 0)] * 2 + geometry.padding,
        window_dilation=(*outer, *geometry.dilation),
    )
    if not column_major:
        return index
    size = math.prod(spatial)
    channel, position = index // size, jnp.unravel_index(index % size, spatial)
    strides = [math.prod(spatial[:i]) for i in range(len(spatial))]
    return channel * size + sum(p * s for p, s in zip(position, strides, strict=True))


def _counts(spatial: tuple[int, ...], geometry: Windows, *, with_padding: bool) -> np.ndarray:
    """How many elements each window averages: those of x, or of x with the padding that the model asks for."""
    counts = []
    for i, n in enumerate(spatial):
        starts = np.arange(geometry.outputs[i]) * geometry.stride[i] - geometry.before[i]
        covered = starts[:, None] + np.arange(geometry.size[i]) * geometry.dilation[i]
        low, high = (-geometry.before[i], n + geometry.pad_after[i]) if with_padding else (0, n)
        counts.append(((covered >= low) & (covered < high)).sum(axis=1))
    return ft.reduce(np.multiply.outer, counts)


@operator("AveragePool")
@in_jax
def average_pool(
    x,
    *,
    kernel_shape,
    auto_pad="NOTSET",
    ceil_mode=0,
    count_include_pad=0,
    dilations=None,
    pads=None,
    strides=None,
):
    """The mean of each window; float16 and bfloat16 are summed in float32."""
    geometry = windows(
        x.shape[2:],
        kernel_shape,
        strides=strides,
        dilations=dilations,
        pads=pads,
        auto_pad=auto_pad,
        ceil_mode=ceil_mode,
    )
    wide = jnp.promote_types(x.dtype, jnp.float32)
    check_fits(x, geometry)
    counts = _counts(x.shape[2:], geometry, with_padding=bool(count_include_pad))
    total = _reduced(x.astype(wide), geometry, np.zeros((), wide), lax.add)
    return (total / jnp.asarray(np.maximum(counts, 1), wide)).astype(x.dtype)


@operator("LpPool")
@in_jax
def lp_pool(
    x,
    *,
    kernel_shape,
    auto_pad="NOTSET",
    ceil_mode=0,
    dilations=None,
    p=2,
    pads=None,
    strides=None,
):
    """(sum |x|^p)^(1/p) of each window."""
    geometry = windows(
        x.shape[2:],
        kernel_shape,
        strides=strides,
        dilations=dilations,
        pads=pads,
        auto_pad=auto_pad,
        ceil_mode=ceil_mode,
    )
    wide = jnp.promote_types(x.dtype, jnp.float32)
    total = _reduced(jnp.abs(x.astype(wide)) ** p, geometry, np.zeros((), wide), lax.add)
    return (total ** (1 / p)).astype(x.dtype)


def _spatial(x: Any) -> tuple[int, ...]:
    return tuple(range(2, x.ndim))


@operator("GlobalAveragePool")
@in_jax
def global_average_pool(x):
    # Scaled before the sum. After it, XLA fuses the scaling into what reads the mean, where LLVM contracts it: the
    # softmax of logits near 1e10 that ends the official suite's squeezenet saw x * r - max without x * r being rounded,
    # 500 instead of 0, and was NaN (jaxlib 0.10.2).
    wide = jnp.promote_types(x.dtype, jnp.float32)
    scale = 1 / math.prod(x.shape[2:])
    return jnp.sum(x.astype(wide) * scale, axis=_spatial(x), keepdims=True).astype(x.dtype)


@operator("GlobalMaxPool")
@in_jax
def global_max_pool(x):
    return jnp.max(x, axis=_spatial(x), keepdims=True)


@operator("GlobalLpPool")
@in_jax
def global_lp_pool(x, *, p=2):
    wide = jnp.promote_types(x.dtype, jnp.float32) if is_floating(x) else x.dtype
    total = jnp.sum(jnp.abs(x.astype(wide)) ** p, axis=_spatial(x), keepdims=True)
    return (total ** (1 / p)).astype(x.dtype)


@operator("MaxUnpool", since=9)
def max_unpool(x, indices, output_shape=None, *, kernel_shape, pads=None, strides=None):
    """x at `indices`, those of MaxPool, else 0. An output_shape that is larger than what kernel, strides and pads give
    is filled with zeros at the end of each axis: the indices count elements of the smaller one."""
    x, indices = jnp.asarray(x), jnp.asarray(indices)
    rank = len(kernel_shape)
    strides, pads = per_axis(strides, rank), per_axis(pads, 2 * rank, 0)
    spatial = [(n - 1) * strides[i] + kernel_shape[i] - pads[i] - pads[i + rank] for i, n in enumerate(x.shape[2:])]
    shape = (*x.shape[:2], *spatial)
    check_size(shape, x.dtype)
    y = jnp.zeros(math.prod(shape), x.dtype).at[indices.reshape(-1)].set(x.reshape(-1)).reshape(shape)
    if output_shape is None:
        return y
    wanted = ints(output_shape, "output_shape")
    check_size(wanted, x.dtype)
    return lax.pad(y, np.zeros((), x.dtype), [(0, w - n, 0) for w, n in zip(wanted, shape, strict=True)])
