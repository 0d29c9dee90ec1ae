"""Batch norm with stored statistics, folded into the convolution or product before it; and what is none."""

from __future__ import annotations

import dataclasses

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import zenith_jax as zenith
from zenith_jax.ir.graph import Graph
from zenith_jax.passes.choose import declined
from zenith_jax.passes.match import Match, batch_norm

C, M = 3, 5

pytestmark = pytest.mark.usefixtures("without_conv")  # which takes batch norms along


def normal(rng, *shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


def arguments(rng):
    """An image, a filter, mean, variance, scale and bias."""
    vectors = [normal(rng, M) for _ in range(4)]
    vectors[1] = jnp.abs(vectors[1])
    return [normal(rng, 2, 4, 6, C), normal(rng, 3, 3, C, M), *vectors]


def conv(x, w, **options):
    return jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), **options)


def by_hand(x, w, mean, variance, scale, bias):
    return jax.nn.relu((conv(x, w) - mean) * jax.lax.rsqrt(variance + 1e-3) * scale + bias)


def conv_bias_first(x, w, mean, variance, scale, bias):
    return bias - (mean - (conv(x, w) + bias)) / jnp.sqrt(variance + 1e-3) * scale


def channels_first(x, w, mean, variance, scale, bias):
    y = jax.lax.conv_general_dilated(
        x, w, (2, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NCHW"), rhs_dilation=(1, 2)
    )
    mean, variance, scale, bias = (v[:, None, None] for v in (mean, variance, scale, bias))
    return scale * ((y - mean) / jnp.sqrt(variance + 1e-3)) + bias


def dense(x, w, mean, variance, scale, bias):
    y = x.reshape(-1, C) @ w[0, 0] + bias
    return jax.nn.relu(scale * ((y - mean) / jnp.sqrt(variance + 1e-3)) + bias)


def dense_of_rows(x, w, mean, variance, scale, bias):
    y = jnp.einsum("bhwc,mc->bhwm", x, w[0, 0].T)
    return bias + (y - mean) * (scale * jax.lax.rsqrt(variance + 1e-3))


FUNCTIONS = [by_hand, conv_bias_first, channels_first, dense, dense_of_rows]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_spelling(check_fused, rng, function):
    check_fused(function, *arguments(rng), counts={"batch_norm": 1}, floor_ulps=64)


def test_libraries(rng):
    x = normal(rng, 2, 4, 4, C)

    class Linen(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.relu(nn.BatchNorm(use_running_average=True)(nn.Conv(M, (3, 3))(x)))

    class Nnx(nnx.Module):
        def __init__(self):
            self.conv = nnx.Conv(C, M, (3, 3), use_bias=False, rngs=nnx.Rngs(0))
            self.norm = nnx.BatchNorm(M, use_running_average=True, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.norm(self.conv(x))

    linen = Linen()
    variables = linen.init(jax.random.key(0), x)
    graph, state = nnx.split(Nnx())
    for function, first in ((linen.apply, variables), (lambda s, x: nnx.merge(graph, s)(x), state)):
        moved = jax.tree.map(lambda a: a + 0.3 * jnp.cos(jnp.arange(a.size, dtype=a.dtype)).reshape(a.shape), first)
        assert zenith.explain(function)(moved, x).counts() == {"batch_norm": 1}
        np.testing.assert_allclose(zenith.fuse(function)(moved, x), function(moved, x), rtol=1e-5, atol=1e-5)


def test_equinox(rng):
    norm, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(M, "batch", mode="batch")
    norm = eqx.nn.inference_mode(norm)
    kernel = eqx.nn.Conv2d(C, M, 3, key=jax.random.key(0))
    function = jax.vmap(lambda x: norm(kernel(x), state)[0], axis_name="batch")
    x = normal(rng, 2, C, 4, 4)
    assert zenith.explain(function)(x).counts() == {"batch_norm": 1}
    np.testing.assert_allclose(zenith.fuse(function)(x), function(x), rtol=1e-5, atol=1e-5)


MISSES = {
    "a bias alone": lambda x, w, m, v, s, b: conv(x, w) + b - m,
    "a scalar": lambda x, w, m, v, s, b: conv(x, w) * 2.0 + b,
    "statistics of the batch": lambda x, w, m, v, s, b: (lambda y: (y - y.mean((0, 1, 2))) * s)(conv(x, w)),
    "along another axis": lambda x, w, m, v, s, b: conv(x, w)[:, :, :M] * s[:, None],
    "of each example": lambda x, w, m, v, s, b: conv(x, w) * (x.mean((1, 2))[:, :1] * s)[:, None, None],
    "an inverse": lambda x, w, m, v, s, b: s / conv(x, w),
    "squared": lambda x, w, m, v, s, b: (lambda y: y * y * s)(conv(x, w)),
    "the convolution returned": lambda x, w, m, v, s, b: (lambda y: (y, y * s))(conv(x, w)),
    "a product scaled alone": lambda x, w, m, v, s, b: (x @ w[0, 0]) * s,
    "a product shifted alone": lambda x, w, m, v, s, b: x @ w[0, 0] + b - m,
    "a product along its rows": lambda x, w, m, v, s, b: (
        (x[0, 0] @ w[0, 0] - x[1, 0].sum(-1)[:, None]) * x[0, 1].sum(-1)[:, None]
    ),
    "a product of batches": lambda x, w, m, v, s, b: (jnp.einsum("bhwc,bcm->bhwm", x, w[:2, 0]) - m) * s,
    "of two of a weight's dimensions": lambda x, w, m, v, s, b: (jnp.einsum("bhwc,icm->bhwim", x, w[0]) - m) * s,
    "a product returned": lambda x, w, m, v, s, b: (lambda y: (y, (y - m) * s))(x @ w[0, 0]),
    "float16": lambda x, w, m, v, s, b: conv(x.astype(jnp.float16), w.astype(jnp.float16)) * s,
}


@pytest.mark.parametrize("name", MISSES)
def test_is_none(rng, name):
    report = zenith.explain(MISSES[name])(*arguments(rng))
    assert not report.fused, str(report)


def test_inner_value_returned_is_not_folded(rng):
    """Only what stands before it is."""
    args = arguments(rng)

    def function(x, w, mean, variance, scale, bias):
        y = (conv(x, w) - mean) * scale
        return y, y * variance

    for fused, plain in zip(zenith.fuse(function)(*args), function(*args), strict=True):
        np.testing.assert_allclose(fused, plain, rtol=1e-5, atol=1e-5)


def test_what_is_refused_is_left_to_other_patterns(rng):
    """On a CPU a depthwise convolution is a loop, whatever comes after it."""
    args = arguments(rng)
    x, w = normal(rng, 2, 4, 4, M), normal(rng, 3, 3, 1, M)

    def function(x, w, mean, scale):
        return (conv(x, w, feature_group_count=M) - mean) * scale

    with zenith.configured(use_cost=True):
        report = zenith.explain(function)(x, w, args[2], args[4])
    assert report.counts() == {"grouped_conv": 1}, str(report)
    (refused,) = report.refused
    assert refused.op == "batch_norm" and "1.18 ms with" in refused.reason


def test_after_a_dense_layer_it_is_folded_on_request(rng):
    """And where it is not, the layer is a site without it."""
    batch_size, features = 64, 512
    x, w = normal(rng, batch_size, features), normal(rng, features, features)
    mean, scale, bias = (normal(rng, features) for _ in range(3))

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.relu(nn.BatchNorm(use_running_average=True)(nn.Dense(features)(x)))

    variables = Layer().init(jax.random.key(0), x)
    assert zenith.explain(Layer().apply)(variables, x).counts() == {"batch_norm": 1}
    for platform in ("cpu", "cuda"):
        with zenith.configured(use_cost=True, platform=platform):
            report = zenith.explain(lambda x, w, m, s, b: ((x @ w + b) - m) * s)(x, w, mean, scale, bias)
        (refused,) = [s for s in report.refused if s.op == "batch_norm"]
        assert "product" in refused.reason, str(report)
        assert report.counts() == ({"linear": 1} if platform == "cpu" else {}), str(report)


def test_is_folded_on_a_gpu(rng):
    graph = Graph.of(jax.make_jaxpr(by_hand)(*arguments(rng)))
    (found,) = (m for m in (batch_norm.match(graph, e) for e in graph.eqns) if m is not None)
    assert isinstance(found, Match)
    assert declined(found, "cuda", differentiated=False, use_cost=True) is None
    half = dataclasses.replace(found, case=(("dtype", "float64"), ("size", 1)))
    assert declined(half, "cuda", differentiated=False, use_cost=True) is not None
