"""Ops at odd, unit and empty sizes, on NaN and infinities, and properties that no size changes."""

from __future__ import annotations

import functools as ft

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from formulas import add_layer_norm, add_rms_norm, gated, gelu, group_norm, layer_norm, rms_norm, silu, softmax
from numerics import in_float64
from op_cases import GRADIENT_ULPS, SEED, VALUE_ULPS, Case, Mask, attention_case, close, gradient_of

from zenith_jax import ops

# --- sizes ------------------------------------------------------------------------------------------------------------

ODD_ROWS = [(1,), (7,), (1, 1), (3, 1), (1, 129), (2, 111), (2, 3, 2, 128), (5, 4097)]
EMPTY_ROWS = [(0, 8), (0, 3, 8), (2, 0, 8)]
ROW_OPS = {
    "layer_norm": (ops.layer_norm, layer_norm, 3),
    "rms_norm": (ops.rms_norm, rms_norm, 2),
    "add_layer_norm": (ops.add_layer_norm, add_layer_norm, -4),
    "add_rms_norm": (ops.add_rms_norm, add_rms_norm, -3),
    "softmax": (ops.softmax, softmax, 1),
    "gelu": (ops.gelu, gelu, 1),
    "silu": (ops.silu, silu, 1),
    "gated_activation": (ops.gated_activation, gated, -2),
}


def row_case(op: str, shape: tuple[int, ...]) -> Case:
    function, formula, arity = ROW_OPS[op]
    rows = 2 if arity < 0 else 1
    return Case(
        op,
        str(shape),
        function,
        formula,
        (shape,) * rows + (shape[-1:],) * (abs(arity) - rows),
        tuple(range(rows, abs(arity))),
    )


@pytest.mark.parametrize("shape", ODD_ROWS, ids=str)
@pytest.mark.parametrize("op", ROW_OPS)
def test_odd_sizes_of_rows(op, shape):
    case = row_case(op, shape)
    args = case.arguments()
    close(lambda f: f, case, args, VALUE_ULPS)
    if shape[-1] > 1:
        close(lambda f: gradient_of(f, args), case, args, GRADIENT_ULPS)
    else:  # dx is 0, as a difference of terms of 1/sqrt(eps) = 316 (1000 for rms_norm) times dy
        for found, expected in zip(
            gradient_of(case.function, args)(*args), in_float64(gradient_of(case.formula, args))(*args), strict=True
        ):
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1000 * 4 * np.finfo(np.float32).eps)


@pytest.mark.parametrize("op", ["add_layer_norm", "add_rms_norm"])
def test_gradient_of_a_sum_that_only_its_norm_uses(op):
    case = row_case(op, (6, 40))
    args = case.arguments()
    close(lambda f: gradient_of(lambda *args: f(*args)[0], args), case, args, GRADIENT_ULPS)


@pytest.mark.parametrize("shape", EMPTY_ROWS, ids=str)
@pytest.mark.parametrize("op", ROW_OPS)
def test_empty_arrays_give_empty_arrays_and_zero_gradients(op, shape):
    case = row_case(op, shape)
    args = case.arguments()
    for value, expected in zip(
        jax.tree.leaves(jax.jit(case.function)(*args)),
        jax.tree.leaves(jax.eval_shape(case.formula, *args)),
        strict=True,
    ):
        assert (value.shape, value.dtype) == (expected.shape, expected.dtype)
    for gradient, arg in zip(jax.jit(gradient_of(case.function, args))(*args), args, strict=True):
        np.testing.assert_array_equal(gradient, np.zeros(arg.shape))


SIZES = [  # b, t, s, h, k, d, e
    (1, 1, 1, 1, 1, 1, 1),
    (1, 17, 1, 2, 1, 3, 5),
    (2, 1, 33, 2, 2, 8, 8),
    (1, 65, 129, 2, 1, 16, 17),
    (1, 130, 67, 1, 1, 64, 64),
    (3, 5, 5, 3, 3, 7, 129),
]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_odd_sizes_of_attention(sizes, causal):
    b, t, s, h, k, d, e = sizes
    case = attention_case(
        str(sizes), Mask((b, 1, t, s)), (1, h, t, s), q=(b, t, h, d), k=(b, s, k, d), v=(b, s, k, e), is_causal=causal
    )
    args = case.arguments()
    close(lambda f: f, case, args, VALUE_ULPS)

    def all_gradients(f):
        # As one array: those by query and key are 0 where there is one key, as a difference of terms of dvalue's size.
        return lambda *a: jnp.concatenate([jnp.ravel(g) for g in gradient_of(f, args)(*a)])

    close(all_gradients, case, args, GRADIENT_ULPS)


@pytest.mark.parametrize("b, t, s, h", [(0, 3, 4, 2), (2, 0, 4, 2), (2, 0, 0, 2)])
def test_empty_attention_gives_empty_results_and_zero_gradients(b, t, s, h):
    case = attention_case("empty", q=(b, t, h, 4), k=(b, s, h, 4), v=(b, s, h, 4))
    args = case.arguments()
    assert jax.jit(case.function)(*args).shape == (b, t, h, 4)
    for gradient, arg in zip(jax.jit(gradient_of(case.function, args))(*args), args, strict=True):
        np.testing.assert_array_equal(gradient, np.zeros(arg.shape))


def test_attention_without_keys_is_nan():
    none = jnp.ones((1, 0, 1, 4))
    assert np.isnan(jax.jit(ops.attention)(jnp.ones((1, 2, 1, 4)), none, none)).all()


def test_attention_without_batch_axis_is_attention_of_one_example():
    args = attention_case("").arguments()
    np.testing.assert_array_equal(ops.attention(*(a[0] for a in args)), ops.attention(*(a[:1] for a in args))[0])


# --- NaN, infinities, masked rows -------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("op", ROW_OPS)
def test_nan_and_infinity_stay_in_their_row(op, bad):
    case = row_case(op, (4, 37))
    args = case.arguments()
    args[0] = args[0].at[1, 5].set(bad)
    value, expected = jax.tree.leaves(case.function(*args))[0], jax.tree.leaves(case.formula(*args))[0]
    np.testing.assert_array_equal(np.isnan(value), np.isnan(expected))
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)


def test_softmax_of_minus_infinities():
    x = jnp.full((3, 8), -jnp.inf).at[1, 2].set(0.0)
    np.testing.assert_array_equal(ops.softmax(x), jax.nn.softmax(x))


def test_large_values_do_not_overflow():
    x = jnp.asarray([[1e4, 1e4 - 1, -1e4, 88.0, 3e38, -3e38]])
    np.testing.assert_allclose(ops.softmax(x), jax.nn.softmax(x), rtol=1e-6)
    for op, formula in (
        (ops.silu, jax.nn.silu),
        (ops.gelu, gelu),
        (ft.partial(ops.gelu, approximate=False), ft.partial(gelu, approximate=False)),
    ):
        np.testing.assert_allclose(op(x), in_float64(formula)(x), rtol=2e-6)


def test_layer_norm_of_a_large_mean_does_not_cancel():
    x = jnp.asarray(np.random.default_rng(SEED).normal(size=(4, 512)) + 1e4, jnp.float32)
    close(lambda f: f, Case("layer_norm", "", ops.layer_norm, layer_norm, ()), [x], 4)


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4)], ids=str)
@pytest.mark.parametrize("channel_axis", [1, -1])
def test_empty_images_give_empty_arrays_and_zero_gradients(shape, channel_axis):
    x = jnp.zeros(shape if channel_axis == -1 else (shape[0], shape[2], shape[1]))
    function = ft.partial(ops.group_norm, groups=2, channel_axis=channel_axis, activation="silu")
    args = x, jnp.ones(4), jnp.zeros(4)
    assert jax.jit(function)(*args).shape == x.shape
    for gradient, arg in zip(jax.jit(gradient_of(function, args))(*args), args, strict=True):
        np.testing.assert_array_equal(gradient, np.zeros(arg.shape))


@pytest.mark.parametrize("channel_axis", [1, -1])
def test_group_norm_keeps_nan_in_its_group_and_a_large_mean_from_cancelling(channel_axis):
    options = dict(groups=3, channel_axis=channel_axis)
    function, formula = (ft.partial(f, **options) for f in (ops.group_norm, group_norm))
    x = jnp.asarray(np.random.default_rng(SEED).normal(size=(2, 6, 37, 6)) + 1e4, jnp.float32)
    close(lambda f: f, Case("group_norm", "", function, formula, ()), [x], 4)
    bad = x.at[1, 3, 4, 3].set(jnp.nan)
    nans = np.isnan(np.moveaxis(function(bad), channel_axis, -1))
    assert nans[1, ..., 2:4].all() and nans.sum() == nans[1, ..., 2:4].size


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_attention_ignores_what_is_masked(bad):
    """A NaN behind the mask reaches neither the result nor any gradient but its own."""
    q, k, v, mask = attention_case("", Mask((2, 1, 1, 7))).arguments()
    mask = mask.at[..., 3].set(False).at[..., 0].set(True)
    bad_bias = jnp.zeros((1, 1, 1, 7)).at[..., 3].set(bad)
    expected = ops.attention(q, k, v, mask=mask)
    np.testing.assert_allclose(ops.attention(q, k, v, mask=mask, bias=bad_bias), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(ops.attention(q, k.at[:, 3].set(bad), v, mask=mask), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="tensor cores add in an order of their own")
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("e", [5, 64, 100])
def test_a_query_with_one_key_has_no_gradient(e, dtype):
    """Its probability is 1 whatever it is; not a rounding of dout * out."""
    rng = np.random.default_rng(SEED)
    query, key = (jnp.asarray(rng.normal(size=(2, 9, 3, 16)), dtype) for _ in range(2))
    value = jnp.asarray(rng.normal(size=(2, 9, 3, e)) * 100, dtype)
    loss = lambda q: jnp.sum(jnp.sin(ops.attention(q, key, value, is_causal=True).astype(jnp.float32)))  # noqa: E731
    gradient = jax.grad(loss)(query)
    assert not gradient[:, 0].any() and gradient[:, 1:].any()


def test_nan_in_one_head_of_attention_stays_there():
    q, k, v = attention_case("").arguments()
    out = ops.attention(q.at[0, 2, 1].set(jnp.nan), k, v)
    assert np.isnan(out[0, 2, 1]).all()
    assert np.isnan(out).sum() == out.shape[-1]


def test_row_without_allowed_keys_is_the_mean_of_values():
    q, k, v = attention_case("").arguments()
    mask = jnp.ones((2, 1, 9, 7), bool).at[0, 0, 4].set(False)
    out = ops.attention(q, k, v, mask=mask)
    np.testing.assert_allclose(out[0, 4], v[0].mean(0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fill", [-1e4, -1e9, -1e30, np.finfo(np.float32).min], ids="{:.0e}".format)
def test_gradients_of_rows_that_a_finite_bias_masks(fill):
    """Their logits are so large that lse lacks the logarithm of their sum, or that they overflow in units of log 2."""
    q, k, v = attention_case("").arguments()
    seen = np.random.default_rng(SEED).random((2, 1, 9, 7)) < 0.5
    seen[0, 0, 2] = seen[1, 0, 8] = False
    bias = jnp.where(seen, 0.0, fill).astype(jnp.float32)
    bias = bias.at[0, 0, 2, 3].multiply(1.5 if fill > -1e30 else 1.0)
    weights = jnp.cos(jnp.arange(q.size, dtype=jnp.float32)).reshape(q.shape)

    def plain(q, k, v):  # in float32, as the kernel: in float64 the logits are not rounded away
        with jax.default_matmul_precision("float32"):  # a GPU's would be TensorFloat-32, which the kernel is not
            logits = jnp.einsum("bthd,bshd->bhts", q, k) * q.shape[-1] ** -0.5 + bias
            return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(logits), v)

    def derivatives(f):
        return jax.jit(jax.value_and_grad(lambda *a: jnp.sum(f(*a) * weights), (0, 1, 2)))(q, k, v)

    # Products of query and key, rounded beside the bias: 1e-3 at 1e4; gone at 1e9, where all are equal.
    tolerance = 2e-3 if fill == -1e4 else 1e-5
    for a, b in zip(
        jax.tree.leaves(derivatives(ft.partial(ops.attention, bias=bias))),
        jax.tree.leaves(derivatives(plain)),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


# --- properties -------------------------------------------------------------------------------------------------------


def test_softmax_rows_sum_to_one_and_do_not_see_a_shift():
    x = jnp.asarray(np.random.default_rng(SEED).normal(size=(6, 1000)) * 5, jnp.float32)
    np.testing.assert_allclose(ops.softmax(x).sum(-1), 1, rtol=1e-5)
    np.testing.assert_allclose(ops.softmax(x + 8), ops.softmax(x), rtol=1e-5)


def test_attention_commutes_with_permutations_of_keys():
    q, k, v = attention_case("").arguments()
    order = np.random.default_rng(SEED).permutation(7)
    np.testing.assert_allclose(ops.attention(q, k[:, order], v[:, order]), ops.attention(q, k, v), rtol=1e-5, atol=1e-6)
