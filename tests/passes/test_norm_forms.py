"""Layer norms in one pass of x, which XLA's compiler for GPUs splits, become XLA's in two passes where no kernel is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen

import zenith_jax as zenith
from zenith_jax.passes.choose import Choices

RNG = np.random.default_rng(0)
NAME = "layer_norm_in_two_passes"


def array(*shape, dtype=jnp.float32):
    return jnp.asarray(RNG.normal(size=shape), dtype)


def one_pass(x, scale, bias):
    mean = x.mean(-1, keepdims=True)
    variance = jnp.square(x).mean(-1, keepdims=True) - jnp.square(mean)
    return (x - mean) * jax.lax.rsqrt(variance + 1e-6) * scale + bias


def two_passes(x, scale, bias):
    mean = x.mean(-1, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(jnp.square(x - mean).mean(-1, keepdims=True) + 1e-6) * scale + bias


def distributed(x, scale, bias):
    """As Keras writes it."""
    mean = x.mean(-1, keepdims=True)
    factor = scale * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) - jnp.square(mean) + 1e-6)
    return x * factor + (bias - mean * factor)


def of_flax(x, scale, bias):
    return linen.LayerNorm().apply({"params": {"scale": scale, "bias": bias}}, x)


def behind_a_sum(x, scale, bias):
    return one_pass(x + jnp.sin(x), scale, bias)


def norms(function, *args, platform="cuda"):
    with zenith.configured(platform=platform, use_cost=True):
        report = zenith.explain(function)(*args)
    return [site for site in report.fused if "norm" in site.op], report


X, SCALE, BIAS = array(2, 16, 64), array(64), array(64)


@pytest.mark.parametrize("function", [one_pass, distributed, of_flax, behind_a_sum])
def test_small_ones_of_a_gpu_are_written_in_two_passes(function):
    (site,), _ = norms(function, X, SCALE, BIAS)
    assert site.op == NAME and "XLA's loop is as fast" in site.detail
    with zenith.configured(platform="cuda", use_cost=True):
        jaxpr = zenith.jit(function).trace(X, SCALE, BIAS).jaxpr  # no kernel in it: it runs anywhere
    (result,) = jax.core.eval_jaxpr(jaxpr.jaxpr, jaxpr.consts, X, SCALE, BIAS)
    want = two_passes(*(np.float64(a) for a in (X + jnp.sin(X) if function is behind_a_sum else X, SCALE, BIAS)))
    np.testing.assert_allclose(result, want, rtol=1e-5, atol=1e-5)  # a few roundings of values of size 3


def test_the_deviations_are_not_lost_in_the_mean():
    """What the program computes loses all digits of the variance here."""
    x = 1e4 + X
    with zenith.configured(platform="cuda", use_cost=True):
        jaxpr = zenith.jit(one_pass).trace(x, SCALE, BIAS).jaxpr
    (result,) = jax.core.eval_jaxpr(jaxpr.jaxpr, jaxpr.consts, x, SCALE, BIAS)
    want = two_passes(*(np.float64(a) for a in (x, SCALE, BIAS)))
    np.testing.assert_allclose(result, want, atol=2e-2)  # x itself has steps of 1e-3


@pytest.mark.parametrize(
    "function, x",
    [
        (two_passes, X),  # as it is already
        (one_pass, X.astype(jnp.bfloat16)),
        (jax.grad(lambda *args: jnp.sin(one_pass(*args)).sum(), argnums=(0, 1, 2)), X),
    ],
)
def test_others_stay_xlas(function, x):
    assert not norms(function, x, SCALE, BIAS)[0]


def test_large_ones_are_kernels_and_cpus_have_them_for_small_ones_too():
    large = jax.ShapeDtypeStruct((8, 256, 768), jnp.float32)
    scale = jax.ShapeDtypeStruct((768,), jnp.float32)
    assert [site.op for site in norms(one_pass, large, scale, scale)[0]] == ["layer_norm"]
    assert NAME not in str(norms(one_pass, X, SCALE, BIAS, platform="cpu")[1])


def test_measured_choices_take_the_form_too():
    """Where XLA was faster than the kernel, it was so in the form that the program has."""
    with zenith.configured(platform="cuda", use_cost=False):
        (site,) = zenith.explain(one_pass)(X, SCALE, BIAS).fused
    assert site.op == "layer_norm"
    with zenith.configured(platform="cuda", choices=Choices({site.key: (5.0, 1.0)})):
        (found,) = zenith.explain(one_pass)(X, SCALE, BIAS).fused
    assert found.op == NAME and "XLA was faster here" in found.detail
    assert found.choice == "XLA's operations, in the form that it compiles best"
