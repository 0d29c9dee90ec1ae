"""group_norm, with silu after it where asked.

Canonical shape: x (*b, r, g, k) or, with channels first, (*b, g, k, r): r positions, g groups of k channels; scale and
bias (g * k,). Two signatures and not one with two memory layouts: XLA's CPU compiler copies an array whose layout it is
told. The forward kernel writes mean and 1/standard deviation of
each group too, for the backward kernel, which sums the cotangents of scale and bias over the positions of each sample;
the sum over samples is XLA's, so that a sharded batch stays sharded.

Wu and He 2018, arXiv:1803.08494.
"""

from __future__ import annotations

import functools as ft
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zenith_jax.errors import DTypeError, Refusal, ShapeError
from zenith_jax.ops._op import WIDENED, Kernel, as_batches, check_kernel_dtype, kernel, widened
from zenith_jax.ops.activation import silu_formula
from zenith_jax.ops.norm import parameters

ACTIVATIONS = {"none": lambda x: x, "silu": silu_formula}

# --- references -------------------------------------------------------------------------------------------------------


def _by_group(parameter: Any, x: Any) -> Any:
    """A parameter (g * k,) along the last two axes of x."""
    return widened(parameter).reshape(x.shape[-2:])


def _along_groups(statistic: Any) -> Any:
    """A statistic (*b, g) along x (*b, r, g, k)."""
    return statistic[..., None, :, None]


def _statistics(x: Any, eps: float) -> tuple[Any, Any]:
    """Mean and 1/standard deviation, (*b, g)."""
    wide = widened(x)
    mean = jnp.mean(wide, axis=(-3, -1))
    return mean, jax.lax.rsqrt(jnp.mean(jnp.square(wide - _along_groups(mean)), axis=(-3, -1)) + eps)


def _before_activation(x: Any, scale: Any, bias: Any, mean: Any, rstd: Any) -> tuple[Any, Any]:
    """(xhat, xhat * scale + bias)"""
    xhat = (widened(x) - _along_groups(mean)) * _along_groups(rstd)
    return xhat, xhat * _by_group(scale, x) + _by_group(bias, x)


# --- kernels ----------------------------------------------------------------------------------------------------------


def unsupported(platform: str, *, dtype: Any, channels_last: bool, width: int, groups: int) -> Refusal | None:
    """Why no kernel computes the norm, or None."""
    if platform == "cuda":
        if not channels_last:
            return Refusal(
                "on a GPU group norm has a kernel for channels last only",
                advice="move the channels to the last axis once, outside of the model",
            )
        itemsize = np.dtype(dtype).itemsize
        vector = _VECTOR_BYTES // itemsize if width * itemsize % _VECTOR_BYTES == 0 else 1
        channels = width // max(groups, 1)
        if math.lcm(channels, vector) > _BLOCK_VECTORS * vector:
            return Refusal("on a GPU a group of {k} channels is wider than a block of threads", dict(k=channels))
    return check_kernel_dtype("group_norm", dtype)


# What cuda/group_norm.cuh takes: the channels of some whole groups, one vector a thread.
_VECTOR_BYTES, _BLOCK_VECTORS = 16, 256


def _supports(avals: Any, platform: str, *, channels_last: bool, **rest: Any) -> Refusal | None:
    del rest
    x = avals[0]
    groups, channels = x.shape[-2:] if channels_last else x.shape[-3:-1]
    return unsupported(platform, dtype=x.dtype, channels_last=channels_last, width=groups * channels, groups=groups)


def _forward_attributes(avals: Any, *, eps: float, **rest: Any) -> dict[str, Any]:
    return dict(eps=np.float32(eps), **_backward_attributes(avals, eps=eps, **rest))


def _backward_attributes(avals: Any, *, eps: float, activation: str, channels_last: bool) -> dict[str, Any]:
    del avals, eps
    return dict(silu=np.int32(activation == "silu"), channels_last=np.int32(channels_last))


def _parameter_cotangent(partials: Any, parameter: Any) -> Any:
    return jnp.sum(partials, axis=tuple(range(partials.ndim - 1))).astype(parameter.dtype)


def _kernels(stem: str, x_axes: str, *, last: bool) -> Kernel:
    """The forward kernel for x (*b, *x_axes), tied to its backward kernel."""

    def with_channels_last(x: Any) -> Any:
        return x if last else jnp.moveaxis(x, -1, -3)

    def as_given(y: Any) -> Any:
        return y if last else jnp.moveaxis(y, -3, -1)

    @kernel(
        f"{stem}_bwd",
        f"*b {x_axes}, d, d, *b {x_axes}, *b g, *b g -> *b {x_axes}, *b d, *b d",
        (0, WIDENED, WIDENED),
        visible=3,
        supports=_supports,
        ffi_attributes=_backward_attributes,
    )
    def backward_kernel(x, scale, bias, dy, mean, rstd, *, eps, activation, channels_last):
        del mean, rstd, channels_last  # made of x again: a derivative of this must see that they depend on it
        x, dy = with_channels_last(x), with_channels_last(dy)
        mean, rstd = _statistics(x, eps)
        xhat, z = _before_activation(x, scale, bias, mean, rstd)
        dz = jax.vjp(ACTIVATIONS[activation], z)[1](widened(dy))[0]
        g = dz * _by_group(scale, x)
        mean_g = jnp.mean(g, axis=(-3, -1), keepdims=True)
        mean_gx = jnp.mean(g * xhat, axis=(-3, -1), keepdims=True)
        dx = (g - mean_g - xhat * mean_gx) * _along_groups(rstd)
        by_channel = (jnp.sum(v, axis=-3).reshape(*v.shape[:-3], v.shape[-2] * v.shape[-1]) for v in (dz * xhat, dz))
        return as_given(dx.astype(x.dtype)), *by_channel

    def backward(operands, results, cotangents, needed, **attributes):
        del needed
        x, scale, bias = operands
        dx, dscale, dbias = backward_kernel(x, scale, bias, cotangents[0], *results[1:], **attributes)
        return {0: dx, 1: _parameter_cotangent(dscale, scale), 2: _parameter_cotangent(dbias, bias)}

    @kernel(
        f"{stem}_fwd",
        f"*b {x_axes}, d, d -> *b {x_axes}, *b g, *b g",
        (0, WIDENED, WIDENED),
        backward=backward,
        supports=_supports,
        ffi_attributes=_forward_attributes,
    )
    def forward_kernel(x, scale, bias, *, eps, activation, channels_last):
        del channels_last
        x = with_channels_last(x)
        mean, rstd = _statistics(x, eps)
        _, z = _before_activation(x, scale, bias, mean, rstd)
        return as_given(ACTIVATIONS[activation](z).astype(x.dtype)), mean, rstd

    return forward_kernel


_LAST = _kernels("group_norm", "r g k", last=True)
_FIRST = _kernels("group_norm_first", "g k r", last=False)


# --- op ---------------------------------------------------------------------------------------------------------------


def group_norm(
    x,
    scale=None,
    bias=None,
    *,
    groups: int,
    eps: float = 1e-5,
    channel_axis: int = -1,
    activation: str | None = None,
):
    """activation((x - mean) / sqrt(var + eps) * scale + bias), mean and variance over each group of channels and all
    positions.

    x: (b, *positions, c) with channel_axis=-1, (b, c, *positions) with 1; float32, float16 or bfloat16 (float64 runs
    as XLA code). Its axis 0 is the batch; `jax.vmap` adds others. `groups` divides c; groups=c is instance norm.
    scale, bias: (c,), any float dtype; None is 1 and 0. activation: None or "silu". The result has x's shape and dtype.
    Statistics in float32, about the mean. Bit-reproducible for a device and shape. Raises ShapeError, DTypeError or
    ValueError. Differentiable in all three arrays, forward and reverse, to any order.
    """
    axis = _channel_axis(x, channel_axis)
    batch, channels = x.shape[0], x.shape[axis]
    if groups < 1 or channels % groups:
        raise ShapeError(
            f"group_norm: groups must divide the {channels} channels of axis {axis} of x, of shape {x.shape}, "
            f"got {groups}"
        )
    if activation not in (None, *ACTIVATIONS):
        raise ValueError(f"group_norm: activation must be None or one of {list(ACTIVATIONS)}, got {activation!r}")
    rows = math.prod(x.shape[1:axis]) * math.prod(x.shape[axis + 1 :])
    canonical = ft.partial(group_norm_canonical, scale=scale, bias=bias, groups=groups, eps=eps, activation=activation)
    if axis == 1:
        return canonical(x.reshape(batch, channels, rows), channels_last=False).reshape(x.shape)
    last = jnp.moveaxis(x, axis, -1)
    y = canonical(last.reshape(batch, rows, channels), channels_last=True)
    return jnp.moveaxis(y.reshape(last.shape), -1, axis)


def group_norm_canonical(x, scale, bias, *, groups: int, eps: float, activation: str | None, channels_last: bool):
    """x: (*b, r, c), or (*b, c, r) without `channels_last`; scale and bias: (c,), or None."""
    width, rows = x.shape[-1 if channels_last else -2], x.shape[-2 if channels_last else -1]
    scale, bias = parameters("group_norm", x, width, scale, bias)
    grouped = (groups, width // groups)
    last = channels_last or rows == 1
    canonical = x.reshape(*x.shape[:-2], *((rows, *grouped) if last else (*grouped, rows)))
    y = (_LAST if last else _FIRST)(
        as_batches(canonical, 3), scale, bias, eps=float(eps), activation=activation or "none", channels_last=last
    )[0]
    return y.reshape(x.shape)


def _channel_axis(x: Any, channel_axis: int) -> int:
    if x.ndim < 2:
        raise ShapeError(f"group_norm: x must have a batch axis and a channel axis, got shape {x.shape}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise DTypeError(f"group_norm: x must have a real floating dtype, got {x.dtype}; convert it first")
    axis = channel_axis + x.ndim if channel_axis < 0 else channel_axis
    if not 1 <= axis < x.ndim:
        raise ShapeError(
            f"group_norm: channel_axis must be one of the axes 1 to {x.ndim - 1} of x, of shape {x.shape}, whose axis "
            f"0 is the batch, got {channel_axis}; give x a batch axis, or use jax.vmap"
        )
    return axis
