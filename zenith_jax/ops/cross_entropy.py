"""Softmax cross entropy of integer labels, without the array of log-probabilities in memory.

Canonical shape: logits (*b, d), labels (*b). The kernel gives what every variant of the loss is made of, by rows:

  lse = log(sum_c exp(logits[c])),  picked = logits[label],  total = sum_c logits[c]

The loss is lse - picked; label smoothing uses total, a z-loss lse once more. The kernels' contract is
ffi/kernels/cross_entropy.h.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from zenith_jax.errors import DTypeError, Refusal, ShapeError
from zenith_jax.ops._op import as_batches, check_kernel_dtype, dense, kernel, widened

_F32 = jnp.float32


def _supports(avals: Any, platform: str, **_: Any) -> Refusal | None:
    del platform
    if avals[0].shape[-1] == 0:
        return Refusal("there are no classes")
    return check_kernel_dtype("cross_entropy", avals[0].dtype)


def _one_hot(labels: Any, logits: Any) -> Any:
    """True at each row's label; a label outside of [0, d) is nowhere."""
    return labels[..., None] == jnp.arange(logits.shape[-1], dtype=labels.dtype)


def _backward(operands, results, cotangents, needed):
    del needed
    return {0: cross_entropy_bwd(*operands, results[0], *dense(cotangents))[0]}


@kernel("cross_entropy_bwd", "*b d, *b, *b, *b, *b, *b -> *b d", (0,), supports=_supports, in_place=((0, 0),))
def cross_entropy_bwd(logits, labels, lse, dlse, dpicked, dtotal):
    dlogits = dlse[..., None] * jnp.exp(widened(logits) - lse[..., None]) + dtotal[..., None]
    dlogits = dlogits + jnp.where(_one_hot(labels, logits), dpicked[..., None], 0)
    return (dlogits.astype(logits.dtype),)


@kernel("cross_entropy_fwd", "*b d, *b -> *b, *b, *b", (_F32,) * 3, visible=3, backward=_backward, supports=_supports)
def cross_entropy_fwd(logits, labels):
    wide = widened(logits)
    lse = jax.nn.logsumexp(wide, axis=-1)
    picked = jnp.sum(jnp.where(_one_hot(labels, logits), wide, 0), axis=-1)
    return tuple(x.astype(_F32) for x in (lse, picked, jnp.sum(wide, axis=-1)))


def row_statistics(logits, labels):
    """(lse, picked, total), float32, of logits (*b, d) and int32 labels (*b); picked is 0 where the label is no class.

    float64 logits give float64, as XLA code. Differentiable in logits, to any order.
    """
    if logits.dtype == jnp.float64:
        picked = jnp.sum(jnp.where(_one_hot(labels, logits), logits, 0), axis=-1)
        return jax.nn.logsumexp(logits, axis=-1), picked, jnp.sum(logits, axis=-1)
    batch = labels.shape
    labels = labels.reshape((1,) * (2 - labels.ndim) + batch)
    return tuple(x.reshape(batch) for x in cross_entropy_fwd(as_batches(logits, 1), labels))


def row_gradient(logits, labels, lse, dlse, dpicked, dtotal):
    """The cotangent of logits (*b, d) from those of `row_statistics`' results, each (*b)."""
    if logits.dtype == jnp.float64:
        return cross_entropy_bwd.reference(logits, labels, lse, dlse, dpicked, dtotal)[0]
    rows = [as_batches(x, 0) for x in (labels, lse, dlse, dpicked, dtotal)]
    return cross_entropy_bwd(as_batches(logits, 1), *rows)[0].reshape(logits.shape)


def cross_entropy(logits, labels, *, label_smoothing: float = 0.0, z_loss: float = 0.0):
    """-log(softmax(logits)[label]) for each row, without the log-probabilities in memory.

    logits: (*b, d), float32, float16 or bfloat16 (float64 runs as XLA code). labels: (*b), integers in [0, d); the loss
    of any other label is NaN, and its row of the gradient is not. Returns (*b), float32.
    label_smoothing: the weight of a uniform distribution over all classes beside the label's.
    z_loss: the factor before lse**2 that is added, lse = log(sum(exp(logits))); keeps logits from drifting.
    Sums in float32. Differentiable in logits, forward and reverse, to any order. Bit-reproducible.
    Online normaliser: Milakov and Gimelshein 2018, arXiv:1805.02867.
    """
    if not jnp.issubdtype(logits.dtype, jnp.floating):
        raise DTypeError(
            f"cross_entropy: logits must have a real floating dtype, got {logits.dtype}; convert them first"
        )
    check_labels("cross_entropy", labels)
    if logits.ndim == 0 or labels.shape != logits.shape[:-1]:
        raise ShapeError(
            f"cross_entropy: labels must have the shape of logits without its last axis, got labels {labels.shape} and "
            f"logits {logits.shape}"
        )
    classes = logits.shape[-1]
    labels = as_int32(labels, classes)
    return loss_of_rows(row_statistics(logits, labels), labels, classes, label_smoothing, z_loss)


def loss_of_rows(values, labels, classes: int, label_smoothing: float, z_loss: float):
    """The loss of each row from what `row_statistics` gives."""
    lse, picked, total = values
    picked = jnp.where((labels >= 0) & (labels < classes), picked, jnp.nan)
    loss = lse - (1 - label_smoothing) * picked
    if label_smoothing:
        loss = loss - label_smoothing / classes * total
    return loss + z_loss * lse**2 if z_loss else loss


def check_labels(op: str, labels):
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise DTypeError(
            f"{op}: labels must be integers, got {labels.dtype}; of one-hot or soft labels use "
            f"-(labels * jax.nn.log_softmax(logits)).sum(-1)"
        )


def as_int32(labels, classes: int):
    """Labels as the kernel takes them; one that int32 does not hold becomes another that is no class."""
    if jnp.iinfo(labels.dtype).bits > 32 or labels.dtype == jnp.uint32:
        labels = jnp.clip(labels, -1 if jnp.iinfo(labels.dtype).min < 0 else 0, classes)
    return labels.astype(jnp.int32)
