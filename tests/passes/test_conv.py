"""What is said of a convolution with what XLA computes along with it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax import lax

import zenith_jax as zenith

X, W, B = jnp.ones((2, 8, 8, 16)), jnp.ones((3, 3, 16, 16)), jnp.ones(16)
NUMBERS = ("NHWC", "HWIO", "NHWC")


def conv(x, w, **options):
    return lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=NUMBERS, **options)


def reasons(function, *args):
    return [s.reason for s in zenith.explain(function)(*args).refused if s.op == "conv"]


@pytest.mark.parametrize(
    "function, what",
    [
        (lambda x: jax.nn.relu(conv(x, W) + B + x), "bias, residual and relu"),
        (lambda x: jnp.maximum(conv(x, W) + B, 0), "bias or residual, and relu"),
        (lambda x: jax.nn.relu(nnx.Conv(16, 16, (3, 3), rngs=nnx.Rngs(0))(x)), "bias or residual, and relu"),
        (lambda x: jax.nn.relu(conv(x, W)), "computes relu with"),
    ],
    ids=["bias, residual and relu", "maximum", "nnx", "relu alone"],
)
def test_a_convolution_with_its_epilogue_is_told_of(function, what):
    (reason,) = reasons(function, X)
    assert what in reason


@pytest.mark.parametrize(
    "function",
    [
        lambda x: conv(x, W) + B,
        lambda x: jax.nn.silu(conv(x, W) + B),
        lambda x: (y := conv(x, W)) + jax.nn.relu(y),
        lambda x: jax.nn.relu(conv(x, W) * B + B),  # a batch norm, which is a site of its own
        lambda x: jax.nn.relu(conv(x, W[:, :, :2], feature_group_count=8)),
        lambda x: jnp.maximum(conv(x, W), 1),
    ],
    ids=["bias", "silu", "used twice", "batch norm", "groups", "another maximum"],
)
def test_what_is_no_such_convolution(function):
    assert reasons(function, X) == []
