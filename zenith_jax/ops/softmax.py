"""softmax along one axis. Canonical shape: x (*b, d)."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from zenith_jax.errors import DTypeError, Refusal, ShapeError
from zenith_jax.ops._op import as_batches, check_kernel_dtype, kernel, widened


def _supports(avals: Any, platform: str, **_: Any) -> Refusal | None:
    del platform
    return check_kernel_dtype("softmax", avals[0].dtype)


def _backward(operands, results, cotangents, needed):
    del operands, needed
    return {0: softmax_bwd(results[0], cotangents[0])[0]}


@kernel("softmax_bwd", "*b d, *b d -> *b d", (0,), supports=_supports)
def softmax_bwd(y, dy):
    y_wide, dy_wide = widened(y), widened(dy)
    dx = y_wide * (dy_wide - jnp.sum(dy_wide * y_wide, axis=-1, keepdims=True))
    return (dx.astype(y.dtype),)


@kernel("softmax_fwd", "*b d -> *b d", (0,), backward=_backward, supports=_supports)
def softmax_fwd(x):
    x_wide = widened(x)
    e = jnp.exp(x_wide - jnp.max(x_wide, axis=-1, keepdims=True, initial=-jnp.inf))
    return ((e / jnp.sum(e, axis=-1, keepdims=True)).astype(x.dtype),)


def softmax(x, axis: int = -1):
    """exp(x - max(x)) / sum(exp(x - max(x))) along `axis`.

    x: float32, float16 or bfloat16 (float64 runs as XLA code), at least one axis; the result has its shape and dtype.
    The sum is kept in float32. A row that is all -inf gives NaN, as `jax.nn.softmax` does.
    Online normaliser: Milakov and Gimelshein 2018, arXiv:1805.02867.
    """
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise DTypeError(f"softmax: x must have a real floating dtype, got {x.dtype}; convert it first")
    if not -x.ndim <= axis < x.ndim:
        raise ShapeError(f"softmax: axis must be in [{-x.ndim}, {x.ndim}) for x of shape {x.shape}, got {axis}")
    last = jnp.moveaxis(x, axis, -1)
    y = softmax_fwd(as_batches(last, 1))[0].reshape(last.shape)
    return jnp.moveaxis(y, -1, axis)
