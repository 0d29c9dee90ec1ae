"""One step of an optimiser: https://onnx.ai/onnx/operators/onnx_aionnxpreviewtraining_Adam.html and its neighbours.

The tensors come in groups: all values, all gradients, then all states of each kind; the results likewise, without the
gradients. r: learning rate; t: how many updates came before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from zenith_jax.frontends.onnx.errors import OnnxError
from zenith_jax.frontends.onnx.ops._arrays import in_jax
from zenith_jax.frontends.onnx.registry import operator

PREVIEW = "ai.onnx.preview.training"


def _each(tensors: tuple[Any, ...], kinds: int, update: Callable[..., tuple[Any, ...]]) -> tuple[Any, ...]:
    """`update` of each tensor's (value, gradient, *states), as groups again."""
    if len(tensors) % kinds:
        raise OnnxError(f"tensors must come in {kinds} groups of one length, got {len(tensors)} tensors")
    count = len(tensors) // kinds
    updated = [update(*tensors[i::count]) for i in range(count)]
    return tuple(result.astype(tensors[0].dtype) for group in zip(*updated, strict=True) for result in group)


@operator("Adagrad", domain=PREVIEW)
@in_jax
def adagrad(r, t, *tensors, decay_factor=0.0, epsilon=1e-6, norm_coefficient=0.0):
    """Duchi et al. 2011, https://jmlr.org/papers/v12/duchi11a.html."""
    rate = r / (1 + t * decay_factor)

    def update(x: Any, gradient: Any, squares: Any) -> tuple[Any, ...]:
        gradient = norm_coefficient * x + gradient
        squares = squares + gradient * gradient
        return x - rate * gradient / (jnp.sqrt(squares) + epsilon), squares

    return _each(tensors, 3, update)


@operator("Adam", domain=PREVIEW)
@in_jax
def adam(r, t, *tensors, alpha=0.9, beta=0.999, epsilon=1e-6, norm_coefficient=0.0, norm_coefficient_post=0.0):
    """Kingma and Ba 2014, arXiv:1412.6980; the first step (t = 0) is not corrected for its bias."""
    count = jnp.maximum(t, 1)
    rate = jnp.where(t > 0, r * jnp.sqrt(1 - beta**count) / (1 - alpha**count), r)

    def update(x: Any, gradient: Any, mean: Any, squares: Any) -> tuple[Any, ...]:
        gradient = norm_coefficient * x + gradient
        mean = alpha * mean + (1 - alpha) * gradient
        squares = beta * squares + (1 - beta) * gradient * gradient
        x = x - rate * mean / (jnp.sqrt(squares) + epsilon)
        return (1 - norm_coefficient_post) * x, mean, squares

    return _each(tensors, 4, update)


@operator("Momentum", domain=PREVIEW)
@in_jax
def momentum(r, t, *tensors, alpha, beta, mode, norm_coefficient):
    """mode: "standard" or "nesterov"."""
    if mode not in ("standard", "nesterov"):
        raise OnnxError(f"Momentum: mode must be 'standard' or 'nesterov', got {mode!r}")
    factor = jnp.where(t > 0, beta, 1.0)

    def update(x: Any, gradient: Any, velocity: Any) -> tuple[Any, ...]:
        gradient = norm_coefficient * x + gradient
        velocity = alpha * velocity + factor * gradient
        step = gradient + alpha * velocity if mode == "nesterov" else velocity
        return x - r * step, velocity

    return _each(tensors, 3, update)
