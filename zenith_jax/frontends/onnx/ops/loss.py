"""Losses: https://onnx.ai/onnx/operators/onnx__SoftmaxCrossEntropyLoss.html"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from zenith_jax.frontends.onnx.ops._arrays import in_jax
from zenith_jax.frontends.onnx.registry import operator


@operator("NegativeLogLikelihoodLoss", since=12)
@in_jax
def negative_log_likelihood_loss(log_probabilities, target, weight=None, *, ignore_index=None, reduction="mean"):
    """-weight[target] * log_probabilities[target], zero where target is ignore_index.

    log_probabilities: (n, c, *d); target: (n, *d). The mean is one weighted by weight[target].
    """
    ignored = None if ignore_index is None else target == ignore_index
    target = target if ignored is None else jnp.where(ignored, 0, target)  # ignore_index may be no class
    loss = -jnp.take_along_axis(log_probabilities, target[:, None], axis=1)[:, 0]
    factor: Any = jnp.ones_like(loss) if weight is None else weight[target]
    factor = factor if ignored is None else jnp.where(ignored, 0, factor)
    # Not loss * factor: an ignored class may have log-probability -inf.
    loss = jnp.where(factor == 0, 0, loss * factor).astype(log_probabilities.dtype)
    if reduction == "none":
        return loss
    total = jnp.sum(loss)
    return total if reduction == "sum" else total / jnp.sum(factor)


@operator("SoftmaxCrossEntropyLoss", since=12)
@in_jax
def softmax_cross_entropy_loss(scores, labels, weights=None, *, ignore_index=None, reduction="mean"):
    """The loss above of log_softmax(scores) along axis 1, and that log_softmax."""
    log_probabilities = jax.nn.log_softmax(scores, axis=1)
    loss = negative_log_likelihood_loss(
        log_probabilities, labels, weights, ignore_index=ignore_index, reduction=reduction
    )
    return loss, log_probabilities
