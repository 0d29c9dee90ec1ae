"""Linear layers of int8 and int4 weights against NumPy in float64, which shares no code with them.

The conformance suite has their transformations; here are the sizes, layouts and values that a kernel may get wrong.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zenith_jax import ops

# XLA's code for float32, where it runs on a GPU, would round the operands to TensorFloat-32.
pytestmark = pytest.mark.usefixtures("exact_products")
ROUNDOFF = {jnp.float32: 2**-24, jnp.bfloat16: 2**-8, jnp.float16: 2**-11}


@pytest.fixture
def exact_products():
    with jax.default_matmul_precision("highest"):
        yield


def weights(k, n, dtype, transposed, seed=0):
    """All values of the dtype, the lowest too, which has no opposite."""
    low = -128 if dtype == jnp.int8 else -8
    w = np.random.default_rng(seed).integers(low, -low, size=(k, n))
    w.reshape(-1)[:2] = low
    return w, jnp.asarray(w.T if transposed else w, dtype)


def check(rows, k, n, groups, dtype, w_dtype, transposed, scale_dtype=None, edit=lambda x: x):
    rng = np.random.default_rng(k + n)
    w, stored = weights(k, n, w_dtype, transposed)
    x = jnp.asarray(edit(rng.normal(size=(*rows, k))), dtype)
    scale = jnp.asarray(rng.normal(size=(groups, n) if groups > 1 else n), scale_dtype or dtype)
    bias = jnp.asarray(rng.normal(size=n), scale_dtype or dtype)
    function = jax.jit(lambda *a: ops.quantized_linear(*a, transposed=transposed))
    found = np.asarray(function(x, stored, scale, bias)).astype(np.float64)
    wide = w * np.repeat(np.asarray(scale, np.float64).reshape(-1, n), k // groups, axis=0)
    with np.errstate(invalid="ignore"):
        expected = np.asarray(x, np.float64) @ wide + np.asarray(bias, np.float64)
        terms = np.abs(np.asarray(x, np.float64)) @ np.abs(wide) + np.abs(np.asarray(bias, np.float64))
    # The result is rounded once; float32 sums of k terms in some order err by less than k / 4 of their roundings.
    tolerance = ROUNDOFF[dtype] * np.abs(expected) + 2**-24 * (4 + k / 4) * terms
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(np.isfinite(found), finite)
    np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))
    assert np.all(np.abs(found[finite] - expected[finite]) <= tolerance[finite])
    return function.lower(x, stored, scale, bias).as_text()


on_cpu = pytest.mark.skipif(jax.default_backend() != "cpu", reason="JAX's default is a GPU, which takes other sizes")


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU: what XLA hands to the kernel there")
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("w_dtype", [jnp.int8, jnp.int4])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("rows", "groups", "scale_dtype"), [((1,), 1, None), ((2, 5), 4, jnp.float32)], ids=str)
def test_on_a_gpu_the_kernel_reads_weights_as_they_are_stored(rows, groups, scale_dtype, transposed, w_dtype, dtype):
    """int4 two in a byte, the first in the lower half."""
    text = check(rows, 512, 288, groups, dtype, w_dtype, transposed, scale_dtype)
    assert "zenith_quantized_linear_fwd" in text


@on_cpu
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("w_dtype", [jnp.int8, jnp.int4])
@pytest.mark.parametrize(
    ("rows", "k", "n", "groups"),
    [((1,), 2, 2, 1), ((3,), 34, 70, 1), ((7,), 96, 130, 3), ((2, 1, 2), 258, 18, 129)],
    ids=str,
)
def test_odd_sizes_run_in_the_kernel_and_are_right(rows, k, n, groups, w_dtype, transposed):
    assert "zenith_quantized_linear_fwd" in check(rows, k, n, groups, jnp.float32, w_dtype, transposed)


@on_cpu
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("w_dtype", [jnp.int8, jnp.int4])
@pytest.mark.parametrize("scale_dtype", [None, jnp.float32])
def test_narrow_inputs_are_rounded_once(dtype, w_dtype, scale_dtype):
    assert "zenith_quantized_linear_fwd" in check((5,), 66, 34, 3, dtype, w_dtype, False, scale_dtype)


@pytest.mark.parametrize(("k", "n"), [(3, 5), (5, 4)], ids=str)
def test_rows_of_int4_that_begin_within_a_byte_run_as_xla_code(k, n):
    transposed = n % 2 == 0
    assert "custom_call @zenith" not in check((2,), k, n, 1, jnp.float32, jnp.int4, transposed)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_nan_and_an_infinity_reach_their_row_and_no_other(transposed):
    def edit(x):
        x[1, 3], x[2, 0] = np.nan, np.inf
        return x

    check((5,), 64, 32, 2, jnp.float32, jnp.int8, transposed, edit=edit)


@pytest.mark.parametrize(("shape", "n"), [((0, 8), 4), ((2, 0, 8), 4), ((3, 8), 0), ((3, 0), 4)], ids=str)
def test_empty_arrays_give_what_the_formula_gives(shape, n):
    x, w, scale = jnp.ones(shape), jnp.ones((shape[-1], n), jnp.int8), jnp.ones(n)
    found = jax.jit(ops.quantized_linear)(x, w, scale)
    assert found.shape == (*shape[:-1], n) and not np.any(found)  # a sum of nothing is 0


@on_cpu  # float32 is XLA's code elsewhere, whose sums depend on the number of rows
def test_a_row_does_not_depend_on_the_others():
    _, w = weights(96, 64, jnp.int8, False)
    x, scale = jnp.asarray(np.random.default_rng(1).normal(size=(7, 96)), jnp.float32), jnp.ones(64)
    whole = ops.quantized_linear(x, w, scale)
    for row in (0, 3, 6):
        np.testing.assert_array_equal(whole[row], ops.quantized_linear(x[row], w, scale))


def test_gradients_inside_jit_are_those_of_the_widened_weights():
    w, stored = weights(32, 16, jnp.int4, False)
    rng = np.random.default_rng(2)
    x, scale, bias = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((4, 32), (2, 16), (16,)))
    dy = rng.normal(size=(4, 16))

    def loss(x, scale, bias):
        return jnp.vdot(ops.quantized_linear(x, stored, scale, bias), jnp.asarray(dy, jnp.float32))

    dx, dscale, dbias = jax.jit(jax.grad(loss, (0, 1, 2)))(x, scale, bias)
    wide = w * np.repeat(np.asarray(scale, np.float64), 16, axis=0)
    dw = np.asarray(x, np.float64).T @ dy
    # Sums of 16 to 64 products of size 1 to 20.
    np.testing.assert_allclose(dx, dy @ wide.T, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(dscale, (dw * w).reshape(2, 16, 16).sum(1), rtol=1e-5, atol=1e-3)
    np.testing.assert_allclose(dbias, dy.sum(0), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(len(jax.devices()) < 2, reason="needs two devices")
def test_in_a_program_for_several_devices_xla_splits_the_product():
    """The kernel would have all of x and w on every device."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), "d")
    w, stored = weights(16, 32, jnp.int8, False)
    x = jnp.asarray(np.random.default_rng(3).normal(size=(4, 16)), jnp.float32)
    spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "d"))
    compiled = jax.jit(ops.quantized_linear).lower(x, jax.device_put(stored, spec), jnp.ones(32)).compile()
    text = compiled.as_text()
    assert "all-gather" not in text and "zenith_quantized" not in text
    found = compiled(x, jax.device_put(stored, spec), jnp.ones(32))
    # Sums of 16 products of up to 128 * 3.
    np.testing.assert_allclose(found, np.asarray(x, np.float64) @ w, rtol=1e-5, atol=1e-2)
