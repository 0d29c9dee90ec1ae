"""A convolution of images as one kernel, channels last, for CPUs: activation(scale * conv(x, w) + bias + residual), or
without residual the maximum of windows of that which lie side by side.

Letters: *b images, h w height and width of x, c channels, p q height and width of the result, n features. Canonical
shape: x (*b, h, w, c), the filter (kernel height * kernel width * c * n,) flat, scale and bias (n,), residual
(*b, p, q, n); scale and residual may be absent. The contract of the kernel is ffi/kernels/conv.h. The scale is a batch
norm's with stored statistics: weights then need no folding. The convolutions of the backward pass are XLA's.
"""

from __future__ import annotations

import functools as ft
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from zenith_jax.errors import DTypeError, Refusal, ShapeError
from zenith_jax.ops._op import absent, as_batches, dense, is_absent, kernel, summed_to, widened

ACTIVATIONS = {
    "none": lambda x: x,
    "relu": jax.nn.relu,
    "maximum": lambda x: jnp.maximum(x, 0),  # relu with the derivative 1/2 at 0
}
NUMBERS = ("NHWC", "HWIO", "NHWC")


Pool = tuple[int, int]  # height and width of the windows whose maximum is taken; NO_POOL for none
NO_POOL: Pool = (1, 1)


class Geometry(NamedTuple):
    """Of a convolution of images; each entry for the vertical and the horizontal axis."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]

    def out(self, size: Sequence[int]) -> tuple[int, int]:
        """Height and width of the result of an image of such `size`."""
        p, q = (
            max(0, (n + low + high - (k - 1) * d - 1) // s + 1)
            for n, k, s, (low, high), d in zip(size, *self, strict=True)
        )
        return p, q


def unsupported(platform: str, dtype: Any) -> Refusal | None:
    """Why no kernel computes the convolution, or None."""
    if platform != "cpu":  # us on an H100, 32 x 56 x 56 of 64 to 256 channels by 1 x 1, float32: 61, bias and relu 60
        return Refusal("on a GPU XLA hands it to cuDNN, with bias, residual and relu in its epilogue")
    if np.dtype(dtype) != np.dtype(jnp.float32):
        return Refusal("on the CPU a convolution has a kernel for float32, not for {d}", dict(d=np.dtype(dtype).name))
    return None


def _supports(avals: Any, platform: str, **_: Any) -> Refusal | None:
    x = avals[0]
    others = sorted({a.dtype.name for a in avals if not is_absent(a)} - {x.dtype.name})
    if others:
        return Refusal("all operands must be {x}, got {others}", dict(x=x.dtype.name, others=", ".join(others)))
    if min(x.shape[-1], math.prod(avals[1].shape)) == 0:
        return Refusal("the filter is empty")
    return unsupported(platform, x.dtype)


def _attributes(avals: Any, *, geometry: Geometry, p: int, q: int, activation: str, pool: Pool) -> dict[str, Any]:
    del avals, p, q
    return {
        "kernel": np.asarray(geometry.kernel, np.int64),
        "strides": np.asarray(geometry.strides, np.int64),
        "dilation": np.asarray(geometry.dilation, np.int64),
        "before": np.asarray([low for low, _ in geometry.padding], np.int64),
        "pool": np.asarray(pool, np.int64),
        "relu": np.int32(activation != "none"),
    }


def _with_full_residual(operands: Any, platform: str, *, p: int, q: int, **_: Any) -> list[Any]:
    """The kernel reads a residual of every pixel: one that vmap shares is repeated."""
    del platform
    x, w, scale, bias, residual = operands
    if not is_absent(residual):
        residual = jnp.broadcast_to(residual, (*x.shape[:-3], p, q, bias.shape[0]))
    return [x, w, scale, bias, residual]


def product(x: Any, w: Any, geometry: Geometry) -> Any:
    """XLA's convolution of x (*b, h, w, c) with the flat filter."""
    batch, c = x.shape[:-3], x.shape[-1]
    y = lax.conv_general_dilated(
        x.reshape(-1, *x.shape[-3:]),
        w.reshape(*geometry.kernel, c, -1),
        geometry.strides,
        geometry.padding,
        rhs_dilation=geometry.dilation,
        dimension_numbers=NUMBERS,
    )
    return y.reshape(*batch, *y.shape[1:])


def _before_activation(y: Any, scale: Any, bias: Any, residual: Any) -> Any:
    """Of the product y, widened."""
    y = widened(y)
    y = (y if is_absent(scale) else y * widened(scale)) + widened(bias)
    return y if is_absent(residual) else y + widened(residual)


def _maxima(y: Any, pool: Pool) -> Any:
    """Of y (*b, p, q, n). What fills no window is left out."""
    if pool == NO_POOL:
        return y
    window = (*(1 for _ in y.shape[:-3]), *pool, 1)
    return lax.reduce_window(y, np.array(-np.inf, y.dtype), lax.max, window, window, "VALID")


def _backward(operands, results, cotangents, needed, *, geometry, activation, pool, **_):
    x, w, scale, bias, residual = operands
    dy, y = widened(dense(cotangents)[0]), results[0]
    convolved = ft.cache(lambda: product(x, w, geometry))  # again, where the result does not say enough
    pre = ft.cache(lambda: _before_activation(convolved(), scale, bias, residual))
    if pool != NO_POOL:
        y = ACTIVATIONS[activation](pre())
        dy = jax.vjp(lambda y: _maxima(y, pool), y)[1](dy)[0]
    if activation == "relu":  # of which the result says as much as what it came from
        dy = jnp.where(y > 0, dy, 0)
    elif activation != "none":
        dy = jax.vjp(ACTIVATIONS[activation], pre())[1](dy)[0]
    dproduct = (dy if is_absent(scale) else dy * widened(scale)).astype(x.dtype)
    batch = tuple(range(dy.ndim - 1))
    # Transposed, and not differentiated: what is differentiated inside of a rewriting has its convolutions fused.
    cotangent = {}
    if 0 in needed:
        cotangent[0] = jax.linear_transpose(lambda x: product(x, w, geometry), x)(dproduct)[0]
    if 1 in needed:
        cotangent[1] = jax.linear_transpose(lambda w: product(x, w, geometry), w)(dproduct)[0]
    if 2 in needed:
        cotangent[2] = jnp.sum(dy * widened(convolved()), batch).astype(scale.dtype)
    if 3 in needed:
        cotangent[3] = jnp.sum(dy, batch).astype(bias.dtype)
    if 4 in needed:
        cotangent[4] = summed_to(dy.astype(residual.dtype), residual.shape)
    return cotangent


@kernel(
    "conv_fwd",
    "*b h w c, k, ?n, n, ?*b p q n -> *b p q n",
    (0,),
    backward=_backward,
    supports=_supports,
    ffi_attributes=_attributes,
    adapted=_with_full_residual,
    partitioned=False,  # features, too, may be what is sharded
)
def conv_fwd(x, w, scale, bias, residual, *, geometry, p, q, activation, pool):
    del p, q
    pre = _before_activation(product(x, w, geometry), scale, bias, residual)
    return (_maxima(ACTIVATIONS[activation](pre).astype(x.dtype), pool),)


def conv(
    x,
    w,
    bias=None,
    residual=None,
    *,
    scale=None,
    strides: Sequence[int] = (1, 1),
    padding: Sequence[Sequence[int]] = ((0, 0), (0, 0)),
    dilation: Sequence[int] = (1, 1),
    activation: str = "none",
    pool: Sequence[int] = NO_POOL,
):
    """activation(scale * conv(x, w) + bias + residual), and of that the maximum of windows.

    x: (b, h, w, c); w: (kernel height, kernel width, c, n); scale and bias: (n,); residual: as the result,
    (b, p, q, n); all of x's dtype: float32 has a kernel on the CPU, others run as XLA code. padding: (before, after)
    for each axis, negative to crop. dilation: of the filter. activation: "none", "relu", or "maximum", which is relu
    with the derivative 1/2 at 0. pool: height and width of windows that lie side by side; rows and columns that fill no
    window are left out, as by flax's max_pool, a NaN is a window's maximum, and there can be no residual. For groups
    there is `lax.conv_general_dilated`, of which `zenith.jit` takes what it has a faster form for.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"conv: activation must be one of {sorted(ACTIVATIONS)}, got {activation!r}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise DTypeError(f"conv: x must have a real floating dtype, got {x.dtype}; convert it first")
    if x.ndim != 4 or w.ndim != 4 or w.shape[2] != x.shape[3]:
        raise ShapeError(
            f"conv: x must have shape (b, h, w, c) and w (height, width, c, n), got x {x.shape} and w {w.shape}"
        )
    if 0 in w.shape[:3]:
        raise ShapeError(f"conv: w must have a height, a width and channels, got shape {w.shape}")
    for name, pair in dict(strides=strides, padding=padding, dilation=dilation).items():
        if isinstance(pair, str) or len(pair) != 2:
            raise ShapeError(f"conv: {name} must have one entry for each of the two axes of an image, got {pair!r}")
    if min(*strides, *dilation) < 1:
        raise ShapeError(f"conv: strides and dilation must be positive, got {strides} and {dilation}")
    n = w.shape[3]
    geometry = Geometry(w.shape[:2], tuple(strides), tuple((low, high) for low, high in padding), tuple(dilation))
    if isinstance(pool, str) or len(pool) != 2 or min(pool) < 1:
        raise ShapeError(f"conv: pool must be the height and width of a window, got {pool!r}")
    if residual is not None and tuple(pool) != NO_POOL:
        raise ShapeError(f"conv: a residual has no place before a maximum of windows, got pool {tuple(pool)}")
    p, q = (size // window for size, window in zip(geometry.out(x.shape[1:3]), pool, strict=True))
    expected = dict(scale=(n,), bias=(n,), residual=(x.shape[0], p, q, n))
    for name, value in dict(scale=scale, bias=bias, residual=residual).items():
        if value is not None and value.shape != expected[name]:
            raise ShapeError(f"conv: {name} must have shape {expected[name]}, got {value.shape}")
    operands = (
        as_batches(x, 3),
        w.reshape(-1),
        absent(x.dtype) if scale is None else scale,
        jnp.zeros((n,), x.dtype) if bias is None else bias,
        absent(x.dtype) if residual is None else as_batches(residual, 3),
    )
    y = conv_fwd(*operands, geometry=geometry, p=p, q=q, activation=activation, pool=(pool[0], pool[1]))[0]
    return y.reshape(expected["residual"])
