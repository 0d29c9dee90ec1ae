"""A model of one layer, attention, residual norm and gelu, whose transformations are tested."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from numerics import assert_error_ratio, in_float64

import zenith_jax as zenith

B, T, H, D = 2, 8, 2, 4
WIDTH = H * D
ALL = {"attention": 1, "add_layer_norm": 1, "gelu_tanh": 1}


def layer(params, x):
    q, k, v = (jnp.einsum("btw,whd->bthd", x, w) for w in params["qkv"])
    y = jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape)
    x = x + y
    mean = x.mean(-1, keepdims=True)
    normed = (x - mean) * lax.rsqrt(x.var(-1, keepdims=True) + 1e-3) * params["scale"]
    return x + jax.nn.gelu(normed @ params["w"])


def loss(params, x):
    return jnp.sum(jnp.sin(layer(params, x)))


def random_params() -> Any:
    rng = np.random.default_rng(20260105)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape) / 4, jnp.float32)

    return {"qkv": tuple(normal(WIDTH, H, D) for _ in range(3)), "scale": normal(WIDTH) + 1, "w": normal(WIDTH, WIDTH)}


def random_input() -> Any:
    return jnp.asarray(np.random.default_rng(20260106).normal(size=(B, T, WIDTH)), jnp.float32)


def calls(function, *args):
    """{kernel: number of custom calls in the traced program}, control flow included."""
    return Counter(re.findall(r"kernel=(\w+)", str(jax.make_jaxpr(function)(*args))))


# Of the scalar loss, a sum of some hundred sines that nearly cancels: 8.8e-7 were seen where LLVM does not optimise, of
# plain JAX 3.1e-7, in a loss whose terms are up to 1.
FLOOR_ULPS = 256


def check(function, *args, counts, floor_ulps=FLOOR_ULPS):
    """`function`, fused, against itself unfused and in float64; `counts`: what explain says is fused."""
    report = zenith.explain(function)(*args)
    assert report.counts() == counts, str(report)
    assert_error_ratio(
        zenith.jit(function)(*args), jax.jit(function)(*args), in_float64(function)(*args), floor_ulps=floor_ulps
    )
    return report


def times(n):
    return {name: n * count for name, count in ALL.items()}


def tangent(tree):
    return jax.tree.map(lambda a: jnp.cos(jnp.arange(a.size, dtype=a.dtype)).reshape(a.shape), tree)


def stacked(params, n=3):
    return jax.tree.map(lambda a: jnp.stack([a * (1 + 0.1 * i) for i in range(n)]), params)
