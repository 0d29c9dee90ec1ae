"""layer_norm, rms_norm, and both with a residual added first.

Canonical shape: x (*b, r, d): rows of d features, r rows to a group; the backward kernel sums the cotangents of scale
and bias over the r rows of each group, and the sum over groups is XLA's, so that a sharded batch stays sharded.

Ba, Kiros and Hinton 2016, arXiv:1607.06450. Zhang and Sennrich 2019, arXiv:1910.07467.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zenith_jax.errors import DTypeError, Refusal, ShapeError
from zenith_jax.ops._op import as_batches, check_kernel_dtype, dense, kernel, widened

# --- references -------------------------------------------------------------------------------------------------------


def _normalised(x: Any, eps: float, *, centre: bool) -> tuple[Any, Any]:
    """(xhat, 1/standard deviation) along the last axis, in the widened dtype."""
    x = widened(x)
    if centre:
        x = x - jnp.mean(x, axis=-1, keepdims=True)
    rstd = jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)
    return x * rstd, rstd


def _forward(x: Any, scale: Any, bias: Any | None, eps: float) -> Any:
    xhat, _ = _normalised(x, eps, centre=bias is not None)
    y = xhat * widened(scale)
    return (y if bias is None else y + widened(bias)).astype(x.dtype)


def _backward(x: Any, scale: Any, dy: Any, dsum: Any | None, eps: float, *, centre: bool) -> tuple[Any, Any, Any]:
    """(dx, dscale, dbias), the latter two summed over the rows of each group."""
    xhat, rstd = _normalised(x, eps, centre=centre)
    dy_wide = widened(dy)
    g = dy_wide * widened(scale)
    dx = g - xhat * jnp.mean(g * xhat, axis=-1, keepdims=True)
    if centre:
        dx = dx - jnp.mean(g, axis=-1, keepdims=True)
    dx = dx * rstd
    if dsum is not None:
        dx = dx + widened(dsum)
    return dx.astype(x.dtype), jnp.sum(dy_wide * xhat, axis=-2), jnp.sum(dy_wide, axis=-2)


# --- kernels ----------------------------------------------------------------------------------------------------------


def _supports(avals: Any, platform: str, **_: Any) -> Refusal | None:
    del platform
    return check_kernel_dtype("norm", avals[0].dtype)


def _ffi(avals: Any, *, eps: float) -> dict[str, Any]:
    del avals
    return dict(eps=np.float32(eps))


def _parameter_cotangent(partials: Any, parameter: Any) -> Any:
    return jnp.sum(partials, axis=tuple(range(partials.ndim - 1))).astype(parameter.dtype)


def _layer_norm_backward(operands, results, cotangents, needed, *, eps):
    del results, needed
    x, scale, bias = operands
    dx, dscale, dbias = layer_norm_bwd(x, scale, cotangents[0], eps=eps)
    return {0: dx, 1: _parameter_cotangent(dscale, scale), 2: _parameter_cotangent(dbias, bias)}


def _rms_norm_backward(operands, results, cotangents, needed, *, eps):
    del results, needed
    x, scale = operands
    dx, dscale = rms_norm_bwd(x, scale, cotangents[0], eps=eps)
    return {0: dx, 1: _parameter_cotangent(dscale, scale)}


def _add_layer_norm_backward(operands, results, cotangents, needed, *, eps):
    del needed
    _, _, scale, bias = operands
    dy, dsum = dense(cotangents)
    dx, dscale, dbias = add_layer_norm_bwd(results[1], scale, dy, dsum, eps=eps)
    return {0: dx, 1: dx, 2: _parameter_cotangent(dscale, scale), 3: _parameter_cotangent(dbias, bias)}


def _add_rms_norm_backward(operands, results, cotangents, needed, *, eps):
    del needed
    scale = operands[2]
    dy, dsum = dense(cotangents)
    dx, dscale = add_rms_norm_bwd(results[1], scale, dy, dsum, eps=eps)
    return {0: dx, 1: dx, 2: _parameter_cotangent(dscale, scale)}


_NATIVE = dict(supports=_supports, ffi_attributes=_ffi)
_F32 = jnp.float32


@kernel("layer_norm_bwd", "*b r d, d, *b r d -> *b r d, *b d, *b d", (0, _F32, _F32), visible=3, **_NATIVE)
def layer_norm_bwd(x, scale, dy, *, eps):
    return _backward(x, scale, dy, None, eps, centre=True)


@kernel("rms_norm_bwd", "*b r d, d, *b r d -> *b r d, *b d", (0, _F32), visible=2, **_NATIVE)
def rms_norm_bwd(x, scale, dy, *, eps):
    return _backward(x, scale, dy, None, eps, centre=False)[:2]


@kernel("add_layer_norm_bwd", "*b r d, d, *b r d, *b r d -> *b r d, *b d, *b d", (0, _F32, _F32), visible=3, **_NATIVE)
def add_layer_norm_bwd(x, scale, dy, dsum, *, eps):
    return _backward(x, scale, dy, dsum, eps, centre=True)


@kernel("add_rms_norm_bwd", "*b r d, d, *b r d, *b r d -> *b r d, *b d", (0, _F32), visible=2, **_NATIVE)
def add_rms_norm_bwd(x, scale, dy, dsum, *, eps):
    return _backward(x, scale, dy, dsum, eps, centre=False)[:2]


@kernel("layer_norm_fwd", "*b r d, d, d -> *b r d", (0,), backward=_layer_norm_backward, **_NATIVE)
def layer_norm_fwd(x, scale, bias, *, eps):
    return (_forward(x, scale, bias, eps),)


@kernel("rms_norm_fwd", "*b r d, d -> *b r d", (0,), backward=_rms_norm_backward, **_NATIVE)
def rms_norm_fwd(x, scale, *, eps):
    return (_forward(x, scale, None, eps),)


@kernel(
    "add_layer_norm_fwd",
    "*b r d, *b r d, d, d -> *b r d, *b r d",
    (0, 0),
    visible=2,
    backward=_add_layer_norm_backward,
    **_NATIVE,
)
def add_layer_norm_fwd(x, residual, scale, bias, *, eps):
    total = x + residual
    return _forward(total, scale, bias, eps), total


@kernel(
    "add_rms_norm_fwd",
    "*b r d, *b r d, d -> *b r d, *b r d",
    (0, 0),
    visible=2,
    backward=_add_rms_norm_backward,
    **_NATIVE,
)
def add_rms_norm_fwd(x, residual, scale, *, eps):
    total = x + residual
    return _forward(total, scale, None, eps), total


# --- ops --------------------------------------------------------------------------------------------------------------


def layer_norm(x, scale=None, bias=None, *, eps: float = 1e-5):
    """(x - mean(x)) / sqrt(var(x) + eps) * scale + bias along the last axis.

    x: (*b, d), float32, float16 or bfloat16 (float64 runs as XLA code). scale, bias: (d,), any float dtype; None is 1
    and 0. The result has x's shape and dtype. Statistics in float32, two-pass. Bit-reproducible for a device and shape.
    Raises ShapeError or DTypeError. Differentiable in all three arrays, forward and reverse, to any order.
    """
    scale, bias = _parameters("layer_norm", x, scale, bias)
    return layer_norm_fwd(_grouped(x), scale, bias, eps=float(eps))[0].reshape(x.shape)


def rms_norm(x, scale=None, *, eps: float = 1e-6):
    """x / sqrt(mean(x^2) + eps) * scale along the last axis. Shapes, dtypes and errors as in `layer_norm`."""
    scale, _ = _parameters("rms_norm", x, scale, None)
    return rms_norm_fwd(_grouped(x), scale, eps=float(eps))[0].reshape(x.shape)


def add_layer_norm(x, residual, scale=None, bias=None, *, eps: float = 1e-5):
    """(layer_norm(x + residual), x + residual) in one pass over memory. residual: x's shape and dtype."""
    _check_residual("add_layer_norm", x, residual)
    scale, bias = _parameters("add_layer_norm", x, scale, bias)
    y, total = add_layer_norm_fwd(_grouped(x), _grouped(residual), scale, bias, eps=float(eps))
    return y.reshape(x.shape), total.reshape(x.shape)


def add_rms_norm(x, residual, scale=None, *, eps: float = 1e-6):
    """(rms_norm(x + residual), x + residual) in one pass over memory. residual: x's shape and dtype."""
    _check_residual("add_rms_norm", x, residual)
    scale, _ = _parameters("add_rms_norm", x, scale, None)
    y, total = add_rms_norm_fwd(_grouped(x), _grouped(residual), scale, eps=float(eps))
    return y.reshape(x.shape), total.reshape(x.shape)


def _check_residual(name: str, x: Any, residual: Any) -> None:
    if x.shape != residual.shape or x.dtype != residual.dtype:
        raise ShapeError(
            f"{name}: residual must have the shape and dtype of x, {x.shape} {x.dtype}, "
            f"got {residual.shape} {residual.dtype}"
        )


def _parameters(name: str, x: Any, scale: Any, bias: Any) -> tuple[Any, Any]:
    """scale and bias as arrays of one dtype, that of x or float32, with their defaults."""
    if x.ndim < 1:
        raise ShapeError(f"{name}: x must have at least one axis, the normalised one, got shape {x.shape}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise DTypeError(f"{name}: x must have a real floating dtype, got {x.dtype}; convert it first")
    width = x.shape[-1]
    given = [p for p in (scale, bias) if p is not None]
    narrow = given and all(p.dtype == x.dtype for p in given)
    dtype = x.dtype if narrow else jnp.promote_types(x.dtype, jnp.float32)

    def parameter(role: str, value: Any, default: float) -> Any:
        if value is None:
            return jnp.full((width,), default, dtype)
        if value.shape != (width,):
            raise ShapeError(
                f"{name}: {role} must have shape ({width},) to match x of shape {x.shape}, got {value.shape}"
            )
        return value.astype(dtype)

    return parameter("scale", scale, 1.0), parameter("bias", bias, 0.0)


def rows_per_group(rows: int, total_rows: int) -> int:
    """The r of x (*b, r, d): how many of `rows` consecutive rows share one partial sum of dscale.

    About 1/256 of all rows, so that groups fill the 132 multiprocessors of an H100 about twice, and at most 64, so
    that partials stay under 1/32 of the bytes of dx; a divisor of `rows`, because groups are cut by a reshape.
    """
    wanted = min(64, max(4, total_rows // 256))
    return max((r for r in range(1, min(wanted, rows) + 1) if rows % r == 0), default=max(rows, 1))


def _grouped(x: Any) -> Any:
    """(..., rows, d) as (*b, groups, r, d)."""
    x = as_batches(x, 0) if x.ndim < 2 else x
    *lead, rows, width = x.shape
    r = rows_per_group(rows, math.prod(lead) * rows)
    groups = rows // r if rows else 0
    return as_batches(x.reshape(*lead, groups, r, width), 2)
