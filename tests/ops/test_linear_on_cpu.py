"""The linear layer in float32, which the CPU's kernel computes, and where the rewriter takes it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numerics import assert_error_ratio, in_float64

import zenith_jax as zenith
from zenith_jax import ops
from zenith_jax.ops.linear import LEAST_WEIGHTS, in_panels, linear_fwd
from zenith_jax.passes.choose.cpu import LINEAR_ROWS

pytestmark = pytest.mark.skipif(jax.default_backend() != "cpu", reason="JAX's default is a GPU")


def array(*shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(sum(shape)).normal(size=shape) * shape[-1] ** -0.25, dtype)


def layer(x, w, b):
    return jax.nn.gelu(x @ w + b, approximate=False)


# The kernel sums 300 terms one after the other, each sum rounded by half an ulp of its size: 300 ** 0.5 of them.
ULPS = 17.0

X, W, B = array(2, 8, 256), array(256, 320), array(320)


@pytest.mark.parametrize("transposed", [False, True])
def test_the_kernel_is_called_and_right(transposed):
    x, w, b, r = array(3, 5, 300), array(300, 250), array(250), array(3, 5, 250)

    def kernel(x, w, b, r):
        return ops.linear(x, w, b, r, activation="silu", transposed=transposed)

    def plain(x, w, b, r):
        return jax.nn.silu(x @ (w.T if transposed else w) + b) + r

    args = (x, w.T if transposed else w, b, r)
    assert "zenith_linear_fwd" in jax.jit(kernel).lower(*args).as_text()
    assert_error_ratio(jax.jit(kernel)(*args), jax.jit(plain)(*args), in_float64(plain)(*args), floor_ulps=ULPS)

    def slopes(f):
        return jax.jit(jax.grad(lambda *a: jnp.sin(f(*a)).sum(), argnums=(0, 1, 2, 3)))

    oracle = in_float64(slopes(plain))(*args)
    assert_error_ratio(slopes(kernel)(*args), slopes(plain)(*args), oracle, floor_ulps=2 * ULPS)


@pytest.mark.parametrize("rows", [1, 2, 5, 33, 450])
def test_weights_in_panels(rows):
    x, w, b, r = array(1, rows, 500), array(500, 192), array(192), array(1, rows, 192)

    def kernel(x, w, b, r):
        w = in_panels(w.reshape(-1), 500, "rows")
        return linear_fwd(x, w, b, r, activation="silu", layout="panels")[0]

    def plain(x, w, b, r):
        return jax.nn.silu(x @ w + b) + r

    args = (x, w, b, r)
    assert "layout = 2" in jax.jit(kernel).lower(*args).as_text()
    ulps = 500**0.5  # as above
    assert_error_ratio(jax.jit(kernel)(*args), jax.jit(plain)(*args), in_float64(plain)(*args), floor_ulps=ulps)

    def slopes(f):
        return jax.jit(jax.grad(lambda *a: jnp.sin(f(*a)).sum(), argnums=(0, 1, 2, 3)))

    oracle = in_float64(slopes(plain))(*args)
    assert_error_ratio(slopes(kernel)(*args), slopes(plain)(*args), oracle, floor_ulps=2 * ulps)


def test_panels_must_be_whole():
    x, w, b, absent = array(1, 2, 300), array(300 * 250), array(250), jnp.zeros(0)
    call = jax.jit(lambda *a: linear_fwd(*a, activation="none", layout="panels"))
    with pytest.raises(Exception, match="linear_fwd: panels must be whole, got 250"):
        jax.block_until_ready(call(x, w, b, absent))


def test_a_layer_of_few_rows_is_fused():
    report = zenith.explain(layer)(X, W, B)
    assert [s.op for s in report.fused] == ["linear"] and report.fused[0].detail == "gelu_erf, bias"
    expected = in_float64(layer)(X, W, B)
    assert_error_ratio(zenith.jit(layer)(X, W, B), jax.jit(layer)(X, W, B), expected, floor_ulps=ULPS)


@pytest.mark.parametrize(
    ("case", "args"),
    [
        ("few weights", (X, W[:, : LEAST_WEIGHTS // 256 - 1], B[: LEAST_WEIGHTS // 256 - 1])),
        ("one row", (X[:1, :1], W, B)),
        ("many rows", (jnp.zeros((LINEAR_ROWS + 1, 256)), W, B)),
    ],
)
def test_a_layer_as_good_in_xla_is_no_site_and_its_activation_is_one(case, args):
    del case
    report = zenith.explain(layer)(*args)
    assert {s.op for s in (*report.fused, *report.refused)} == {"gelu_erf"}


def test_a_layer_that_is_differentiated_keeps_its_activation_apart():
    """Whose backward kernel wants the sum before it."""

    def loss(x, w, b):
        return layer(x, w, b).sum()

    report = zenith.explain(jax.value_and_grad(loss))(X, W, B)
    assert "gelu_erf" in [s.op for s in report.fused]
    assert {s.detail for s in report.fused if s.op == "linear"} <= {"bias"}
