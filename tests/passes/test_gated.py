"""Gated activations as people write them, in value and gradient; and products that are none."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from near_miss import arguments

import zenith_jax as zenith

HIDDEN = 6


def swiglu(x, gate, up):
    return jax.nn.silu(x @ gate) * (x @ up)


def geglu_with_biases(x, gate, up):
    return (x @ up + 0.5) * jax.nn.gelu(x @ gate - 0.1, approximate=False)


def fused_weights(x, gate, up):
    gate, up = jnp.split(x @ jnp.concatenate([gate, up], axis=1), 2, axis=-1)
    return up * jax.nn.gelu(gate)


def gate_behind(x, gate, up):
    y = x @ jnp.concatenate([up, gate], axis=1)
    return y[..., :HIDDEN] * jax.nn.silu(y[..., HIDDEN:])


def in_float32(x, gate, up):
    gate, up = jnp.split(x @ jnp.concatenate([gate, up], axis=1), 2, axis=-1)
    return jax.nn.silu(gate.astype(jnp.float32)).astype(x.dtype) * up


def value_from_gate(x, gate, up):
    y = x @ gate
    return jax.nn.silu(y) * (y + 1)


SPELLINGS = {
    swiglu: "gated_silu",
    geglu_with_biases: "gated_gelu_erf",
    fused_weights: "gated_gelu_tanh",
    gate_behind: "gated_silu",
    in_float32: "gated_silu",
    value_from_gate: "gated_silu",
}


@pytest.mark.parametrize("function", SPELLINGS, ids=lambda f: f.__name__)
def test_spelling(check_fused, function):
    x, gate, up = (a[0, 0] for a in arguments("xxx"))
    report = check_fused(function, x, gate, up, counts={SPELLINGS[function]: 1}, floor_ulps=32)
    of_halves = function in (fused_weights, gate_behind, in_float32)
    assert ("halves" in report.fused[0].detail) == of_halves, str(report)


def test_halves_are_not_sliced():
    x, gate, up = (a[0, 0] for a in arguments("xxx"))
    primitives = [e.primitive.name for e in jax.make_jaxpr(zenith.fuse(gate_behind))(x, gate, up).eqns]
    assert "slice" not in primitives and "split" not in primitives, primitives


MISSES = {
    "a scalar": lambda y, z: jax.nn.silu(y) * 2.0,
    "a vector for all rows": lambda y, z: jax.nn.silu(y) * z[:1],
    "the activation squared": lambda y, z: (lambda s: s * s)(jax.nn.silu(y)),
    "a value made of the activation": lambda y, z: (lambda s: s * (s + z))(jax.nn.silu(y)),
    "an activation that is returned": lambda y, z: (lambda s: (s, s * z))(jax.nn.silu(y)),
    "a sum": lambda y, z: jax.nn.silu(y) + z,
    "a quotient": lambda y, z: jax.nn.silu(y) / z,
}


@pytest.mark.parametrize("name", MISSES)
def test_no_gate(name):
    y, z = (a[0, 0] for a in arguments("xx"))
    function = MISSES[name]
    report = zenith.explain(function)(y, z)
    assert set(report.counts()) == {"silu"}, str(report)
    for fused, plain in zip(
        *(jax.tree.leaves(jax.jit(f)(y, z)) for f in (zenith.fuse(function), function)), strict=True
    ):
        np.testing.assert_allclose(fused, plain, rtol=2e-6, atol=2e-6)


HALVES = {
    "overlapping": lambda x: jax.nn.silu(x[..., :4]) * x[..., 1:5],
    "the same half": lambda x: jax.nn.silu(x[..., :3]) * x[..., :3],
    "thirds": lambda x: jax.nn.silu(x[..., :2]) * x[..., 2:4],
    "even and odd": lambda x: jax.nn.silu(x[..., ::2]) * x[..., 1::2],
    "another axis": lambda x: jax.nn.silu(x[:3]) * x[3:],
    "some rows": lambda x: jax.nn.silu(x[1:, :3]) * x[1:, 3:],
    "of two arrays": lambda x: jax.nn.silu(x[:, :3]) * (2 * x)[:, 3:],
}


@pytest.mark.parametrize("name", HALVES)
def test_no_halves(name):
    (x,) = (a[0, 0] for a in arguments("x"))
    function = HALVES[name]
    report = zenith.explain(function)(x)
    assert report.counts() == {"gated_silu": 1} and not report.fused[0].detail, str(report)
    np.testing.assert_allclose(zenith.fuse(function)(x), function(x), rtol=2e-6, atol=2e-6)
