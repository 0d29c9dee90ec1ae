"""layer_norm, rms_norm, and both with a residual added first.

Canonical shape: x (*b, d), rows of d features. The backward kernel takes x as (*b, r, d) and sums the cotangents of
scale and bias over each of g groups of the r rows. The sum over groups is XLA's. Groups are chosen when the program is
lowered and the number of its devices is known, so that rows stay where they are sharded.

Ba, Kiros and Hinton 2016, arXiv:1607.06450. Zhang and Sennrich 2019, arXiv:1910.07467.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zenith_jax.errors import DTypeError, Refusal, ShapeError
from zenith_jax.ops._groups import row_batch
from zenith_jax.ops._op import Kernel, as_batches, check_kernel_dtype, dense, is_zero, kernel, widened

# --- references -------------------------------------------------------------------------------------------------------


def standardised(x: Any, eps: float, *, centre: bool) -> tuple[Any, Any]:
    """(xhat, 1/standard deviation) along the last axis, in the widened dtype."""
    x = widened(x)
    if centre:
        x = x - jnp.mean(x, axis=-1, keepdims=True)
    rstd = jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)
    return x * rstd, rstd


def _forward(x: Any, scale: Any, bias: Any | None, eps: float) -> Any:
    xhat, _ = standardised(x, eps, centre=bias is not None)
    y = xhat * widened(scale)
    return (y if bias is None else y + widened(bias)).astype(x.dtype)


def _backward(x: Any, scale: Any, dy: Any, dsum: Any | None, eps: float, *, centre: bool) -> tuple[Any, Any, Any]:
    """(dx, dscale, dbias), all (*b, d)."""
    xhat, rstd = standardised(x, eps, centre=centre)
    dy_wide = widened(dy)
    g = dy_wide * widened(scale)
    dx = g - xhat * jnp.mean(g * xhat, axis=-1, keepdims=True)
    if centre:
        dx = dx - jnp.mean(g, axis=-1, keepdims=True)
    dx = dx * rstd
    if dsum is not None:
        dx = dx + widened(dsum)
    return dx.astype(x.dtype), dy_wide * xhat, dy_wide


# --- kernels ----------------------------------------------------------------------------------------------------------


def _supports(avals: Any, platform: str, **_: Any) -> Refusal | None:
    del platform
    return check_kernel_dtype("norm", avals[0].dtype)


def _ffi(avals: Any, *, eps: float, g: int | None = None) -> dict[str, Any]:
    del avals, g  # the number of groups is in the results' shapes
    return dict(eps=np.float32(eps))


def _layer_norm_backward(operands, results, cotangents, needed, *, eps):
    del results, needed
    x, scale, bias = operands
    dx, dscale, dbias = layer_norm_bwd(x, scale, cotangents[0], eps=eps, kept=0)
    return {0: dx, 1: dscale.astype(scale.dtype), 2: dbias.astype(bias.dtype)}


def _rms_norm_backward(operands, results, cotangents, needed, *, eps):
    del results, needed
    x, scale = operands
    dx, dscale = rms_norm_bwd(x, scale, cotangents[0], eps=eps, kept=0)
    return {0: dx, 1: dscale.astype(scale.dtype)}


def _backward_of(cotangents, norm, with_sum):
    """The kernel, and the cotangents that it reads: that of the sum where it is used by more than the norm."""
    dy, dsum = cotangents
    return (norm, dense([dy])) if is_zero(dsum) else (with_sum, dense([dy, dsum]))


def _add_layer_norm_backward(operands, results, cotangents, needed, *, eps):
    del needed
    _, _, scale, bias = operands
    backward, read = _backward_of(cotangents, layer_norm_bwd, add_layer_norm_bwd)
    dx, dscale, dbias = backward(results[1], scale, *read, eps=eps, kept=0)
    return {0: dx, 1: dx, 2: dscale.astype(scale.dtype), 3: dbias.astype(bias.dtype)}


def _add_rms_norm_backward(operands, results, cotangents, needed, *, eps):
    del needed
    scale = operands[2]
    backward, read = _backward_of(cotangents, rms_norm_bwd, add_rms_norm_bwd)
    dx, dscale = backward(results[1], scale, *read, eps=eps, kept=0)
    return {0: dx, 1: dx, 2: dscale.astype(scale.dtype)}


def _sums_of_groups(terms: Any, groups: int) -> Any:
    """(*b, r, d) to (*b, groups, d): group i has the rows from r * i // groups on."""
    rows = terms.shape[-2]
    starts = [rows * i // groups for i in range(groups + 1)]
    runs = [jnp.sum(terms[..., i:j, :], -2, keepdims=True) for i, j in itertools.pairwise(starts)]
    return jnp.concatenate(runs, -2)


_NATIVE = dict(supports=_supports, ffi_attributes=_ffi)
_F32 = jnp.float32


def _backward_kernel(name: str, *, centre: bool, residual: bool) -> Kernel:
    """Operands x, scale, dy and, with a residual, dsum; results dx, dscale and, if centred, dbias."""
    results = 2 + centre
    dtypes: tuple[Any, ...] = (0, _F32, _F32)[:results]
    common: dict[str, Any] = dict(visible=results, supports=_supports)

    def signature(rows: str, partials: str) -> str:
        operands = [rows, "d", rows, rows][: 3 + residual]
        return f"{', '.join(operands)} -> {', '.join([rows, partials, partials][:results])}"

    def cotangents(x, scale, dy, dsum=None, *, eps):
        return _backward(x, scale, dy, dsum, eps, centre=centre)[:results]

    @kernel(name, signature("*b r d", "*b g d"), dtypes, ffi_attributes=_ffi, **common)
    def of_groups(*operands, eps, g):
        dx, *terms = cotangents(*operands, eps=eps)
        return dx, *(_sums_of_groups(t, g) for t in terms)

    def by_groups(operands, partitions, *, eps, kept):
        x = operands[0]
        *batch, rows = row_batch(x.shape[:-1], kept, partitions)
        groups = _groups(x.shape[-1] * x.dtype.itemsize) // max(1, math.prod(batch))
        shape = (*batch, rows, x.shape[-1])
        dx, *partials = of_groups(
            *(x if x.ndim == 1 else x.reshape(shape) for x in operands),
            eps=eps,
            g=max(1, min(groups, rows // _LEAST_ROWS)),
        )
        summed = range(kept, len(shape) - 1)
        return dx.reshape(x.shape), *(jnp.sum(p, summed) for p in partials)

    @kernel(name, signature("*b d", "*k d"), dtypes, lowered=by_groups, **common)
    def of_rows(*operands, eps, kept):
        dx, *terms = cotangents(*operands, eps=eps)
        return dx, *(jnp.sum(t, range(kept, t.ndim - 1)) for t in terms)

    return of_rows


layer_norm_bwd = _backward_kernel("layer_norm_bwd", centre=True, residual=False)
rms_norm_bwd = _backward_kernel("rms_norm_bwd", centre=False, residual=False)
add_layer_norm_bwd = _backward_kernel("add_layer_norm_bwd", centre=True, residual=True)
add_rms_norm_bwd = _backward_kernel("add_rms_norm_bwd", centre=False, residual=True)


@kernel("layer_norm_fwd", "*b d, d, d -> *b d", (0,), backward=_layer_norm_backward, **_NATIVE)
def layer_norm_fwd(x, scale, bias, *, eps):
    return (_forward(x, scale, bias, eps),)


@kernel("rms_norm_fwd", "*b d, d -> *b d", (0,), backward=_rms_norm_backward, **_NATIVE)
def rms_norm_fwd(x, scale, *, eps):
    return (_forward(x, scale, None, eps),)


@kernel(
    "add_layer_norm_fwd",
    "*b d, *b d, d, d -> *b d, *b d",
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
    "*b d, *b d, d -> *b d, *b d",
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
    scale, bias = parameters("layer_norm", x, _width("layer_norm", x), scale, bias)
    return layer_norm_fwd(as_batches(x, 1), scale, bias, eps=float(eps))[0].reshape(x.shape)


def rms_norm(x, scale=None, *, eps: float = 1e-6):
    """x / sqrt(mean(x^2) + eps) * scale along the last axis. Shapes, dtypes and errors as in `layer_norm`."""
    scale, _ = parameters("rms_norm", x, _width("rms_norm", x), scale, None)
    return rms_norm_fwd(as_batches(x, 1), scale, eps=float(eps))[0].reshape(x.shape)


def add_layer_norm(x, residual, scale=None, bias=None, *, eps: float = 1e-5):
    """(layer_norm(x + residual), x + residual) in one pass over memory. residual: x's shape and dtype."""
    _check_residual("add_layer_norm", x, residual)
    scale, bias = parameters("add_layer_norm", x, _width("add_layer_norm", x), scale, bias)
    y, total = add_layer_norm_fwd(as_batches(x, 1), as_batches(residual, 1), scale, bias, eps=float(eps))
    return y.reshape(x.shape), total.reshape(x.shape)


def add_rms_norm(x, residual, scale=None, *, eps: float = 1e-6):
    """(rms_norm(x + residual), x + residual) in one pass over memory. residual: x's shape and dtype."""
    _check_residual("add_rms_norm", x, residual)
    scale, _ = parameters("add_rms_norm", x, _width("add_rms_norm", x), scale, None)
    y, total = add_rms_norm_fwd(as_batches(x, 1), as_batches(residual, 1), scale, eps=float(eps))
    return y.reshape(x.shape), total.reshape(x.shape)


def _check_residual(name: str, x: Any, residual: Any) -> None:
    if x.shape != residual.shape or x.dtype != residual.dtype:
        raise ShapeError(
            f"{name}: residual must have the shape and dtype of x, {x.shape} {x.dtype}, "
            f"got {residual.shape} {residual.dtype}"
        )


def _width(name: str, x: Any) -> int:
    if x.ndim < 1:
        raise ShapeError(f"{name}: x must have at least one axis, the normalised one, got shape {x.shape}")
    return x.shape[-1]


def parameters(name: str, x: Any, width: int, scale: Any, bias: Any) -> tuple[Any, Any]:
    """scale and bias as arrays (width,) of one dtype, that of x or float32, with their defaults."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise DTypeError(f"{name}: x must have a real floating dtype, got {x.dtype}; convert it first")
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


# Groups, (bytes of a row up to which, so many), that are best on an H100: they fill its 132 multiprocessors with blocks
# of the backward kernel, and their partial sums are little beside the rows. us of 2^26 bfloat16s in 128, 256, 512 and
# 1024 groups: of 256 176, 147, 147, 149; 1024 230, 165, 166, 172; 2048 306, 196, 166, 163; 4096 203, 167, 168, 173;
# 8192 176, 182, 192, 209 (11/2026).
_GROUPS = ((2048, 256), (4096, 512), (8192, 256))
_GROUPS_OF_WIDE_ROWS = 128
# Rows of which several blocks have a part each (cuda/core/long_rows.cuh): as many groups as clusters run at once, since
# one more is a round more. 16384 columns in 132, 124, 120, 112 groups 163, 160, 160, 159, 32768 in 66, 62, 60, 56 216,
# 159, 160, 160, 65536 in 31, 30, 28 234, 159, 163, 20480 and 24576 in 48 and 80, 44 and 74 249 and 233, 171 and 161
# (H100, 2026-11-26).
_PART_BYTES, _MOST_PARTS, _BLOCKS = 1 << 14, 8, 224
_LEAST_ROWS = 4  # of a group: sums of fewer are too many bytes beside the rows


def _groups(row_bytes: int) -> int:
    parts = -(-row_bytes // _PART_BYTES)
    if 1 < parts <= _MOST_PARTS:
        return _BLOCKS // parts
    return next((groups for most, groups in _GROUPS if row_bytes <= most), _GROUPS_OF_WIDE_ROWS)
