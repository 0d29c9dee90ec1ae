"""Random numbers: https://onnx.ai/onnx/operators/

ONNX's are of unspecified algorithm. Ours are a function of the model: of the attribute `seed`, or of the node's name
where it is left out, so that two calls give the same and two nodes do not.
"""

from __future__ import annotations

import struct
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import dtypes

from zenith_jax.frontends.onnx.dtypes import from_onnx
from zenith_jax.frontends.onnx.limits import check_size
from zenith_jax.frontends.onnx.registry import Node, operator


def key_of(seed: float | None, node: Node) -> Any:
    """The random key of a node."""
    return jax.random.key(zlib.crc32(str(node).encode() if seed is None else struct.pack("<d", seed)))


def _dtype(code: int | None, default: Any) -> Any:
    return dtypes.canonicalize_dtype(default if code is None else from_onnx(code))


def _normal(shape: tuple[int, ...], dtype: Any, mean: float, scale: float, key: Any) -> Any:
    check_size(shape, dtype)
    return mean + scale * jax.random.normal(key, shape, dtype)


def _uniform(shape: tuple[int, ...], dtype: Any, low: float, high: float, key: Any) -> Any:
    check_size(shape, dtype)
    return jax.random.uniform(key, shape, dtype, low, high)


@operator("RandomNormal")
def random_normal(*, shape, dtype=1, mean=0.0, scale=1.0, seed=None, node):
    return _normal(tuple(shape), _dtype(dtype, None), mean, scale, key_of(seed, node))


@operator("RandomNormalLike")
def random_normal_like(x, *, dtype=None, mean=0.0, scale=1.0, seed=None, node):
    return _normal(x.shape, _dtype(dtype, x.dtype), mean, scale, key_of(seed, node))


@operator("RandomUniform")
def random_uniform(*, shape, dtype=1, high=1.0, low=0.0, seed=None, node):
    return _uniform(tuple(shape), _dtype(dtype, None), low, high, key_of(seed, node))


@operator("RandomUniformLike")
def random_uniform_like(x, *, dtype=None, high=1.0, low=0.0, seed=None, node):
    return _uniform(x.shape, _dtype(dtype, x.dtype), low, high, key_of(seed, node))


@operator("Bernoulli", since=15)
def bernoulli(p, *, dtype=None, seed=None, node):
    """1 with probability p, else 0."""
    return jax.random.bernoulli(key_of(seed, node), jnp.asarray(p)).astype(_dtype(dtype, p.dtype))


@operator("Multinomial", since=7)
def multinomial(logits, *, dtype=6, sample_size=1, seed=None, node):
    """Classes drawn from each row of unnormalised log-probabilities (batch, classes): (batch, sample_size)."""
    logits = jnp.asarray(logits)
    shape = (sample_size, logits.shape[0])
    check_size((*shape, logits.shape[1]), logits.dtype)  # a random number for each class
    return jax.random.categorical(key_of(seed, node), logits, shape=shape).T.astype(_dtype(dtype, np.int32))
