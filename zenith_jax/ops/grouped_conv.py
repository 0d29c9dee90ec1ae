"""Convolutions in groups of few channels, depthwise ones above all, as sums of products: a form for CPUs.

Letters: n batch, g groups, i input channels of a group, o its output channels: x has g * i of them, the result g * o.
There is no custom call here: XLA compiles the sum to one loop, which is differentiated, mapped and sharded as any code.
"""

from __future__ import annotations

import functools as ft
import itertools
import math
import operator
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from zenith_jax.errors import Refusal, refuse

# Beyond, XLA's own convolution is at par, and a product for each element of a filter takes long to compile.
_FEW_CHANNELS = 8
_FEW_CHANNELS_LAST = 4
_FEW_PRODUCTS = 80


class Geometry(NamedTuple):
    """Of a convolution, as `lax.conv_general_dilated` takes it; an entry for each spatial axis."""

    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]  # of the filter


def unsupported(dtype: Any, filter_shape: Sequence[int], groups: int, *, channels_last: bool = False) -> Refusal | None:
    """Why XLA's convolution is as good on a CPU. filter_shape: (g * o, i, *kernel)."""
    if np.dtype(dtype) not in (np.float32, np.float64):
        return refuse("the loop is measured for float32 only, this convolution is of {d}", d=np.dtype(dtype).name)
    channels, products = filter_shape[1], math.prod(filter_shape[1:])
    limit = _FEW_CHANNELS_LAST if channels_last else _FEW_CHANNELS
    if groups == 1 or channels > limit or products > _FEW_PRODUCTS:
        return refuse(
            "XLA's convolution is as fast for groups of {channels} channels and filters of {products} elements: a loop "
            "is faster for up to {limit} channels and {most} elements",
            channels=channels,
            products=products,
            limit=limit,
            most=_FEW_PRODUCTS,
        )
    return None


def grouped_conv(x, w, geometry: Geometry, groups: int):
    """The convolution, channels first: on a CPU by products where they are faster, else XLA's.

    x: (n, g * i, *spatial); w: (g * o, i, *kernel), of x's dtype.
    """

    def by_xla(x: Any, w: Any) -> Any:
        return lax.conv_general_dilated(
            x, w, geometry.strides, geometry.padding, rhs_dilation=geometry.dilation, feature_group_count=groups
        )

    if unsupported(x.dtype, w.shape, groups) is not None:
        return by_xla(x, w)
    return lax.platform_dependent(x, w, cpu=lambda x, w: by_products(x, w, geometry, groups), default=by_xla)


def by_products(x, w, geometry: Geometry, groups: int, *, channels_last: bool = False):
    """The sum over the elements of a filter of the shifted image times that element.

    XLA makes one loop of it, over contiguous rows. Its convolution takes several times as long on a CPU. In ms, of
    channels / groups: 144 / 144 of 56 x 56 by 3 x 3, batch 2, 28.0 against 0.46, channels last 26.2 against 0.37;
    576 / 576 of 14 x 14 by 5 x 5, 5.7 against 0.15; 256 / 256 of 28 x 28 by 7 x 7, 14.2 against 0.61; 256 / 256 of 500
    by 31, 5.0 against 0.16; 128 / 32 of 56 x 56 by 3 x 3, 9.7 against 0.40, channels last 8.6 against 3.0; 256 / 32 of
    28 x 28, 2.7 against 2.0, channels last 2.7 against 2.5. The gradients of the first take 66 against 20 ms, channels
    last 70 against 17 (two cores with AVX2, jax 0.10.2, 2026-11).

    x: (n, g * i, *spatial) or, with the channels last, (n, *spatial, g * i), as is the result; w: (g * o, i, *kernel).
    """
    rank = x.ndim - 2
    whole, edges = (0, 0, 0), [(low, high, 0) for low, high in geometry.padding]
    x = lax.pad(x, jnp.zeros((), x.dtype), [whole, *edges, whole] if channels_last else [whole, whole, *edges])
    spatial = x.shape[1:-1] if channels_last else x.shape[2:]
    i, o = w.shape[1], w.shape[0] // groups
    axis = rank + 1 if channels_last else 1  # that of the channels

    def seen(window: tuple[slice, ...]) -> Any:
        return x[(slice(None), *window)] if channels_last else x[(slice(None), slice(None), *window)]

    def along_channels(factor: Any) -> Any:
        return factor if channels_last else factor.reshape(*factor.shape, *(1,) * rank)

    def products() -> Iterator[Any]:
        for tap, window in taps(spatial, w.shape[2:], geometry):
            part, factors = seen(window), w[(..., *tap)]
            if i == o == 1:
                yield part * along_channels(factors[:, 0])
                continue
            by_group = part.reshape(*part.shape[:axis], groups, 1, i, *part.shape[axis + 1 :])
            for channel in range(i):  # (g, 1) of them beside factors (g, o)
                one = lax.index_in_dim(by_group, channel, axis + 2, keepdims=False)
                yield one * along_channels(factors.reshape(groups, o, i)[:, :, channel])

    y = ft.reduce(operator.add, products())
    return y if i == o == 1 else y.reshape(*y.shape[:axis], groups * o, *y.shape[axis + 2 :])


def taps(
    sizes: Sequence[int], kernel: Sequence[int], geometry: Geometry
) -> Iterator[tuple[tuple[int, ...], tuple[slice, ...]]]:
    """The index of each element of a kernel, and what it is multiplied with of an image of these sizes, padded."""
    for tap in itertools.product(*(range(k) for k in kernel)):
        seen = []
        for at, size, k, stride, dilation in zip(tap, sizes, kernel, geometry.strides, geometry.dilation, strict=True):
            seen.append(slice(at * dilation, size - (k - 1 - at) * dilation, stride))
        yield tap, tuple(seen)
