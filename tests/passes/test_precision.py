"""A result that the program computes in a wider dtype than its input is not rounded to the input's on the way."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zenith_jax as zenith


def wide(x):
    return x.astype(jnp.float32)


def attention(x):
    logits = wide(x) @ wide(x).swapaxes(-1, -2)
    return jax.nn.softmax(logits) @ wide(x)


def rms_norm(x):
    return wide(x) * jax.lax.rsqrt(jnp.mean(jnp.square(wide(x)), -1, keepdims=True) + 1e-5)


def layer_norm(x):
    return jax.nn.standardize(wide(x), axis=-1, epsilon=1e-5)


def add_layer_norm(x):
    total = x + jnp.flip(x, 0)
    return layer_norm(total), total


FUNCTIONS = {
    "silu": lambda x: jax.nn.silu(wide(x)),
    "gelu_tanh": lambda x: jax.nn.gelu(wide(x)),
    "softmax": lambda x: jax.nn.softmax(wide(x)),
    "rms_norm": rms_norm,
    "layer_norm": layer_norm,
    "add_layer_norm": add_layer_norm,
    "attention": attention,
}


@pytest.mark.usefixtures("without_cost")
@pytest.mark.parametrize("op", FUNCTIONS)
def test_float32_results_of_bfloat16_inputs_are_float32s(op, rng):
    function, x = FUNCTIONS[op], jnp.asarray(rng.normal(size=(2, 3, 8)), jnp.bfloat16)
    assert zenith.explain(function)(x).counts() == {op: 1}
    fused, plain = jax.jit(zenith.fuse(function))(x), jax.jit(function)(x)
    for a, b in zip(jax.tree.leaves(fused), jax.tree.leaves(plain), strict=True):
        assert a.dtype == b.dtype
        # 8 ulps of float32: sums in another order. In bfloat16 it would be 4e-3.
        np.testing.assert_allclose(wide(a), wide(b), rtol=8e-7, atol=1e-6)


@pytest.mark.usefixtures("without_cost")
@pytest.mark.parametrize("op", FUNCTIONS)
def test_results_that_are_cast_back_need_no_wide_copy(op, rng):
    """The kernel reads and writes bfloat16: nothing in the rewritten program is float32."""
    function, x = FUNCTIONS[op], jnp.asarray(rng.normal(size=(2, 3, 8)), jnp.bfloat16)
    jaxpr = jax.make_jaxpr(zenith.fuse(lambda x: jax.tree.map(lambda y: y.astype(x.dtype), function(x))))(x)
    calls = [e for e in jaxpr.jaxpr.eqns if e.primitive.name == "zenith_call"]
    assert len(calls) == 1
    assert all(e.primitive.name != "convert_element_type" for e in jaxpr.jaxpr.eqns), jaxpr
