"""Activations, in the formulas that Zenith's rewriter knows.

It replaces them where a kernel pays, which for gelu and silu is on the CPU, and reads attention from softmax.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from zenith_jax.frontends.onnx.ops._arrays import in_jax
from zenith_jax.frontends.onnx.registry import operator

_SELU_ALPHA = 1.6732632423543772848170429916717  # Klambauer et al. 2017, arXiv:1706.02515
_SELU_GAMMA = 1.0507009873554804934193349852946


@operator("Relu")
@in_jax
def relu(x, *, consumed_inputs=None):
    del consumed_inputs
    return jnp.maximum(x, 0)


@operator("LeakyRelu")
@in_jax
def leaky_relu(x, *, alpha=0.01, consumed_inputs=None):
    del consumed_inputs
    return jnp.where(x < 0, alpha * x, x)


@operator("PRelu")
@in_jax
def prelu(x, slope, *, consumed_inputs=None):
    """slope: broadcastable to x; before opset 7 a vector of channels, the second axis of x."""
    del consumed_inputs
    if slope.ndim == 1 and x.ndim > 2 and slope.shape[0] == x.shape[1] and slope.shape[0] != x.shape[-1]:
        slope = slope.reshape(-1, *(1,) * (x.ndim - 2))
    return jnp.where(x < 0, slope * x, x).astype(x.dtype)


@operator("PRelu", since=7)
@in_jax
def prelu_broadcast(x, slope):
    return jnp.where(x < 0, slope * x, x).astype(x.dtype)


@operator("Elu")
@in_jax
def elu(x, *, alpha=1.0, consumed_inputs=None):
    del consumed_inputs
    return jnp.where(x < 0, alpha * _expm1_negative(x), x)


@operator("Celu")
@in_jax
def celu(x, *, alpha=1.0):
    return jnp.maximum(x, 0) + alpha * jnp.expm1(jnp.minimum(x, 0) / alpha)


@operator("Selu")
@in_jax
def selu(x, *, alpha=1.67326, gamma=1.0507, consumed_inputs=None):
    """The defaults are those of opset 1; from 6 on they have all digits."""
    del consumed_inputs
    return gamma * jnp.where(x <= 0, alpha * _expm1_negative(x), x)


@operator("Selu", since=6)
@in_jax
def selu_exact(x, *, alpha=_SELU_ALPHA, gamma=_SELU_GAMMA):
    return selu(x, alpha=alpha, gamma=gamma)


def _expm1_negative(x: Any) -> Any:
    """exp(x) - 1 where x < 0, else 0: large x may not overflow, or the gradient of a `where` is NaN."""
    return jnp.expm1(jnp.minimum(x, 0))


@operator("Softplus")
@in_jax
def softplus(x):
    return jax.nn.softplus(x)


@operator("Softsign")
@in_jax
def softsign(x):
    return x / (1 + jnp.abs(x))


@operator("Sigmoid")
@in_jax
def sigmoid(x, *, consumed_inputs=None):
    del consumed_inputs
    return jax.lax.logistic(x)


@operator("HardSigmoid")
@in_jax
def hard_sigmoid(x, *, alpha=0.2, beta=0.5, consumed_inputs=None):
    del consumed_inputs
    return jnp.clip(alpha * x + beta, 0, 1)


@operator("HardSwish")
@in_jax
def hard_swish(x):
    return x * hard_sigmoid(x, alpha=1 / 6)


@operator("ThresholdedRelu")
@in_jax
def thresholded_relu(x, *, alpha=1.0):
    return jnp.where(x > alpha, x, jnp.zeros_like(x))


@operator("Shrink")
@in_jax
def shrink(x, *, bias=0.0, lambd=0.5):
    shrunk = jnp.where(x < -lambd, x + bias, jnp.where(x > lambd, x - bias, 0))
    return shrunk.astype(x.dtype)  # integers too are allowed


@operator("Gelu", since=20)
@in_jax
def gelu(x, *, approximate="none"):
    return jax.nn.gelu(x, approximate=approximate == "tanh")


@operator("Swish", since=24)
@in_jax
def swish(x, *, alpha=1.0):
    """x * sigmoid(alpha * x)."""
    return x * jax.lax.logistic(x if alpha == 1 else alpha * x)


@operator("SwiGLU", since=28)
@in_jax
def swiglu(a, b, *, alpha=1.0):
    return swish(a, alpha=alpha) * b


@operator("Mish", since=18)
@in_jax
def mish(x):
    return x * jnp.tanh(jax.nn.softplus(x))


# --- along an axis ----------------------------------------------------------------------------------------------------


def _flattened(x: Any, axis: int) -> Any:
    """x as a matrix whose rows hold all axes from `axis` on: the operators of this section before opset 13."""
    axis %= max(x.ndim, 1)
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


def _hardmax(x: Any, axis: int) -> Any:
    """1 at the first maximum along `axis`, else 0."""
    return jax.nn.one_hot(jnp.argmax(x, axis=axis), x.shape[axis], dtype=x.dtype, axis=axis)


def _softmax(x: Any, axis: int) -> Any:
    return jax.nn.softmax(x, axis=axis)


def _log_softmax(x: Any, axis: int) -> Any:
    return jax.nn.log_softmax(x, axis=axis)


@operator("Softmax")
@in_jax
def softmax_flattened(x, *, axis=1):
    return _softmax(_flattened(x, axis), -1).reshape(x.shape)


@operator("Softmax", since=13)
@in_jax
def softmax(x, *, axis=-1):
    return _softmax(x, axis)


@operator("LogSoftmax")
@in_jax
def log_softmax_flattened(x, *, axis=1):
    return _log_softmax(_flattened(x, axis), -1).reshape(x.shape)


@operator("LogSoftmax", since=13)
@in_jax
def log_softmax(x, *, axis=-1):
    return _log_softmax(x, axis)


@operator("Hardmax")
@in_jax
def hardmax_flattened(x, *, axis=1):
    return _hardmax(_flattened(x, axis), -1).reshape(x.shape)


@operator("Hardmax", since=13)
@in_jax
def hardmax(x, *, axis=-1):
    return _hardmax(x, axis)
