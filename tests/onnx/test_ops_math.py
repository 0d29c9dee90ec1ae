"""Operators of arithmetic where the official suite is silent: empty and 0-d arrays, signs, dtypes, static operands.

Expected values are written down, or computed by NumPy in float64 or Python integers.
"""

import fractions
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from onnx_nodes import call, f32

from zenith_jax.frontends.onnx.values import NotStaticError

BOTH = pytest.mark.parametrize("array", [np.asarray, jnp.asarray], ids=["static", "jax"])
RNG = np.random.default_rng(0)


# --- static operands --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, operands",
    [
        ("Add", 2),
        ("Sub", 2),
        ("Mul", 2),
        ("Div", 2),
        ("Mod", 2),
        ("Pow", 2),
        ("Max", 3),
        ("Min", 3),
        ("Equal", 2),
        ("Less", 2),
        ("Abs", 1),
        ("Neg", 1),
        ("Sign", 1),
        ("Clip", 3),
        ("ReduceProd", 1),
        ("ReduceSum", 1),
        ("ReduceMax", 1),
        ("ArgMax", 1),
    ],
)
def test_shape_arithmetic_stays_numpy_in_int64_also_under_jit(name, operands):
    def traced(x):
        result = call(name, *[np.array([7, 2, 5])] * operands)
        assert isinstance(result, np.ndarray | np.generic)
        assert result.dtype in (np.int64, np.bool_)
        return x

    jax.jit(traced)(1.0)


def test_warnings_of_numpy_do_not_reach_the_user():
    zero = f32(0)
    assert call("Log", zero) == -np.inf
    assert np.isnan(call("Sqrt", -np.ones(1, np.float32)))
    assert call("Div", f32(1), zero) == np.inf
    assert call("Mul", np.array([200], np.uint8), np.array([2], np.uint8)) == 144


@BOTH
@pytest.mark.parametrize(
    "name",
    ["Abs", "Exp", "Tanh", "Reciprocal", "Sigmoid", "Elu", "Celu", "Gelu", "Softplus", "HardSigmoid", "Mean"],
)
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_small_floats_keep_their_dtype(name, dtype, array):
    assert call(name, array(np.ones((2, 3), dtype))).dtype == dtype


# --- integers and signs -----------------------------------------------------------------------------------------------

SIGNED = [(a, b) for a in (-128, -7, -1, 0, 1, 6, 127) for b in (-128, -3, -1, 1, 2, 127) if (a, b) != (-128, -1)]


@BOTH
def test_division_of_integers_truncates(array):
    a, b = np.array(SIGNED, np.int8).T
    expected = [math.trunc(fractions.Fraction(int(x), int(y))) for x, y in SIGNED]
    np.testing.assert_array_equal(call("Div", array(a), array(b)), expected)


@BOTH
def test_division_of_large_integers_is_exact(array):
    a = np.array([2**31 - 1, -(2**31) + 1], np.int32)
    np.testing.assert_array_equal(call("Div", array(a), array(np.array([3, 3], np.int32))), [715827882, -715827882])


@BOTH
def test_mod_has_the_sign_of_the_divisor_and_fmod_of_the_dividend(array):
    a, b = np.array(SIGNED, np.int8).T
    floor = [int(x) - int(y) * math.floor(fractions.Fraction(int(x), int(y))) for x, y in SIGNED]
    truncated = [int(x) - int(y) * math.trunc(fractions.Fraction(int(x), int(y))) for x, y in SIGNED]
    np.testing.assert_array_equal(call("Mod", array(a), array(b)), floor)
    np.testing.assert_array_equal(call("Mod", array(a), array(b), fmod=1), truncated)


@BOTH
def test_mod_of_floats_at_zero_and_infinity(array):
    # https://onnx.ai/onnx/operators/onnx__Mod.html, the special cases of version 28
    a, b = array(f32(0.0, -0.0, np.inf, 1, 5, -5, 5)), array(f32(-3, 3, 2, 0, np.inf, np.inf, -np.inf))
    floor = np.asarray(call("Mod", a, b))
    np.testing.assert_array_equal(floor, f32(-0.0, 0.0, np.nan, np.nan, 5, np.inf, -np.inf))
    np.testing.assert_array_equal(np.signbit(floor[:2]), [True, False])
    truncated = np.asarray(call("Mod", a, b, fmod=1))
    np.testing.assert_array_equal(truncated, f32(0, 0, np.nan, np.nan, 5, -5, 5))


@BOTH
def test_shifts_past_the_width_leave_the_sign(array):
    x = array(np.array([-5, -5, -5, 100, 100, 1], np.int8))
    y = array(np.array([1, 8, -1, 8, 2, 7], np.int8))
    np.testing.assert_array_equal(call("BitShift", x, y, direction="RIGHT"), [-3, -1, -1, 0, 25, 0])
    np.testing.assert_array_equal(call("BitShift", x, y, direction="LEFT"), [-10, 0, 0, 0, -112, -128])


@BOTH
def test_power_has_the_dtype_of_the_base(array):
    base = array(np.array([2, -2, 1, -1, 3], np.int32))
    np.testing.assert_array_equal(call("Pow", base, array(np.array([3, 3, -5, -5, -2], np.int32))), [8, -8, 1, -1, 0])
    power = call("Pow", base, array(f32(2, 2, 0.5, 2, 0.5)))
    assert power.dtype == np.int32
    np.testing.assert_array_equal(power, [4, 4, 1, 1, 1])
    assert call("Pow", array(f32(2)), array(np.array([3], np.int32))).dtype == np.float32


@pytest.mark.parametrize("exponent", [1.0, 2.0, 3.0, 0.5, -1.0, 2.5])
def test_power_by_a_static_scalar_is_the_power(exponent):
    x = f32(0.3, 1.7, 2.0)
    y = jax.jit(lambda x: call("Pow", x, np.array(exponent, np.float32)))(x)
    np.testing.assert_allclose(y, x.astype(np.float64) ** exponent, rtol=1e-6)


def test_power_by_a_static_vector_of_one_still_broadcasts():
    assert jax.eval_shape(lambda x: call("Pow", x, np.full((1, 1), 2, np.float32)), f32(1, 2)).shape == (1, 2)


@BOTH
def test_clip_with_crossed_bounds_gives_the_upper_one(array):
    x = array(np.array([1, 5, 9], np.int32))
    np.testing.assert_array_equal(call("Clip", x, np.int32(6), np.int32(4)), [4, 4, 4])


def test_attributes_of_clip_beyond_float16_bound_nothing():
    x = np.array([-60000, 60000], np.float16)
    y = call("Clip", x, opset=6, min=-3.4028234663852886e38, max=3.4028234663852886e38)
    np.testing.assert_array_equal(y, x)


def test_broadcasting_before_opset_7_aligns_at_axis():
    a, b = np.zeros((2, 3, 4), np.float32), f32(1, 2, 3)
    expected = np.broadcast_to(b[:, None], (2, 3, 4))
    np.testing.assert_array_equal(call("Add", a, b, opset=6, axis=1, broadcast=1), expected)
    np.testing.assert_array_equal(call("Sub", a, b, opset=6, axis=-2, broadcast=1), -expected)


@pytest.mark.parametrize(
    "x, to, expected",
    [
        (np.array([True, False]), 2, np.array([1, 0], np.uint8)),
        (np.array([1, 0], np.uint8), 9, np.array([True, False])),
        (f32(1, -2), 12, np.array([0x3F800000, 0xC0000000], np.uint32)),
        (np.array([1 + 2j], np.complex64), 11, np.array([1 + 2j], np.complex64).view(np.float64)),
    ],
)
@BOTH
def test_bits_are_kept(x, to, expected, array):
    with jax.enable_x64(True):
        result = np.asarray(call("BitCast", array(x), to=to))
    assert result.dtype == expected.dtype
    np.testing.assert_array_equal(result, expected)


# --- reductions -------------------------------------------------------------------------------------------------------

NOTHING = {
    "ReduceSum": 0,
    "ReduceProd": 1,
    "ReduceMax": -np.inf,
    "ReduceMin": np.inf,
    "ReduceL1": 0,
    "ReduceL2": 0,
    "ReduceSumSquare": 0,
    "ReduceLogSum": -np.inf,
    "ReduceLogSumExp": -np.inf,
}


@BOTH
@pytest.mark.parametrize("name", NOTHING)
def test_reduction_of_nothing(name, array):
    y = call(name, array(np.zeros((2, 0, 3), np.float32)), np.array([1]), keepdims=0)
    np.testing.assert_array_equal(y, np.full((2, 3), NOTHING[name], np.float32))


@BOTH
@pytest.mark.parametrize("name", NOTHING)
def test_scalars_are_reduced_over_no_axes(name, array):
    x = array(np.array(0.5, np.float32))
    expected = {"ReduceSumSquare": 0.25, "ReduceLogSum": math.log(0.5)}.get(name, 0.5)
    np.testing.assert_allclose(call(name, x), np.float32(expected), rtol=1e-6)


def test_empty_axes_mean_all_or_none():
    x = f32(3, -4)
    assert call("ReduceL2", x, np.array([], np.int64), keepdims=0) == 5
    np.testing.assert_array_equal(call("ReduceL2", x, np.array([], np.int64), noop_with_empty_axes=1), [3, 4])
    np.testing.assert_array_equal(call("ReduceSum", x, None, noop_with_empty_axes=1), x)


@BOTH
def test_reductions_of_integers_stay_in_their_dtype(array):
    x = array(np.array([[100, 100], [-3, 2]], np.int8))
    assert np.asarray(call("ReduceSum", x, np.array([-1]))).tolist() == [[-56], [-1]]
    assert np.asarray(call("ReduceMean", x, np.array([1]), keepdims=0)).tolist() == [100, 0]
    assert call("ReduceL2", x).dtype == np.int8
    assert not call("ReduceMax", array(np.array([False, False])))
    assert call("ReduceMax", array(np.array([-5, -3], np.int32)), keepdims=0) == -3


def test_logsumexp_of_large_and_infinite_values():
    x = f32(1000, 1000)
    np.testing.assert_allclose(call("ReduceLogSumExp", jnp.asarray(x), keepdims=0), 1000 + math.log(2))
    assert call("ReduceLogSumExp", jnp.asarray(f32(-np.inf, -np.inf)), keepdims=0) == -np.inf
    gradient = jax.grad(lambda x: call("ReduceLogSumExp", x, keepdims=0))(x)
    np.testing.assert_allclose(gradient, [0.5, 0.5])


def test_traced_axes_say_that_they_must_be_known():
    with pytest.raises(NotStaticError, match="'axes' must be known while tracing"):
        jax.jit(lambda axes: call("ReduceSum", f32(1, 2), axes))(np.array([0]))


@BOTH
@pytest.mark.parametrize("axis", [0, -1])
def test_arg_of_ties_is_the_first_or_the_last(axis, array):
    x = array(f32(1, 3, 3, 1))
    first, last = (np.asarray(call("ArgMax", x, axis=axis, select_last_index=i)) for i in (0, 1))
    assert (first.tolist(), last.tolist()) == ([1], [2])
    assert np.asarray(call("ArgMin", x, axis=axis, select_last_index=1, keepdims=0)) == 3


@BOTH
@pytest.mark.parametrize("shape, axis", [((0,), 0), ((2, 0), -1), ((2, 1), 1), ((2, 3), -2)])
@pytest.mark.parametrize("exclusive", [0, 1])
@pytest.mark.parametrize("reverse", [0, 1])
def test_cumulative_sums(shape, axis, exclusive, reverse, array):
    x = RNG.integers(-5, 5, shape).astype(np.int32)
    flipped = np.flip(x, axis) if reverse else x
    total = np.cumsum(flipped, axis) - (flipped if exclusive else 0)
    expected = np.flip(total, axis) if reverse else total
    y = call("CumSum", array(x), np.array(axis), exclusive=exclusive, reverse=reverse)
    assert y.dtype == np.int32
    np.testing.assert_array_equal(y, expected)


def test_exclusive_product_of_zeros_is_no_quotient():
    y = call("CumProd", jnp.asarray(f32(2, 0, 3)), np.array(0), exclusive=1)
    np.testing.assert_array_equal(y, [1, 2, 0])


# --- along an axis, and products --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Softmax", "LogSoftmax", "Hardmax"])
def test_softmax_is_over_all_later_axes_before_opset_13(name):
    x = RNG.normal(size=(2, 3, 4)).astype(np.float32)
    old = np.asarray(call(name, jnp.asarray(x), opset=11))
    flat = np.asarray(call(name, jnp.asarray(x.reshape(2, 12))))
    np.testing.assert_allclose(old, flat.reshape(2, 3, 4), rtol=1e-6)
    total = np.exp(old).sum() if name == "LogSoftmax" else old.sum()
    np.testing.assert_allclose(total, 2, rtol=1e-5)


def test_hardmax_marks_the_first_of_equal_maxima():
    np.testing.assert_array_equal(call("Hardmax", jnp.asarray(f32(1, 2, 2))), [0, 1, 0])


@pytest.mark.parametrize("name, alpha", [("Elu", 2.0), ("Celu", 0.5), ("Selu", 1.0)])
def test_exponential_units_have_finite_gradients_far_out(name, alpha):
    gradient = jax.grad(lambda x: call(name, x, alpha=alpha).sum())(f32(-1000, 1000))
    assert np.isfinite(gradient).all()
    assert gradient[0] == 0 and gradient[1] > 0


def test_slope_of_prelu_is_by_channel_before_opset_7():
    x = -np.ones((1, 2, 3), np.float32)
    y = call("PRelu", x, f32(2, 3), opset=6)
    np.testing.assert_array_equal(y, [[[-2, -2, -2], [-3, -3, -3]]])


def test_gemm_of_integers_truncates_alpha_and_skips_an_absent_c():
    a = np.array([[1, 2], [3, 4]], np.int32)
    np.testing.assert_array_equal(call("Gemm", a, a, transB=1), a @ a.T)
    y = call("Gemm", a, a, np.array([1, 1], np.int32), alpha=0.5, beta=3.0)
    assert y.dtype == np.int32
    np.testing.assert_array_equal(y, np.trunc(0.5 * (a @ a)) + 3)


@pytest.mark.parametrize("a_type, b_type", [("u1", "i1"), ("i1", "u1"), ("u1", "u1"), ("i1", "i1")])
@pytest.mark.parametrize("per_row", [False, True])
def test_integer_products_are_exact_at_the_ends_of_the_range(a_type, b_type, per_row):
    low, high = np.iinfo(a_type), np.iinfo(b_type)
    a = RNG.choice([low.min, low.max, 1], (3, 64)).astype(a_type)
    b = RNG.choice([high.min, high.max, 1], (64, 5)).astype(b_type)
    a_zero = RNG.integers(low.min, low.max, 3 if per_row else ()).astype(a_type)
    b_zero = RNG.integers(high.min, high.max, 5 if per_row else ()).astype(b_type)
    wide = (a.astype(np.int64) - a_zero.astype(int).reshape(-1, 1)) @ (b.astype(np.int64) - b_zero.astype(int))
    y = jax.jit(lambda *v: call("MatMulInteger", *v))(a, b, a_zero, b_zero)
    assert y.dtype == np.int32
    np.testing.assert_array_equal(y, wide)
    np.testing.assert_array_equal(call("MatMulInteger", a[0], b, a_zero.reshape(-1)[0], b_zero), wide[0])


def test_quantised_product_is_multiplied_in_integers_and_saturates():
    a, b = np.full((1, 4), 255, np.uint8), np.full((4, 1), 127, np.int8)
    operands = (a, np.float32(1), np.uint8(0), b, np.float32(1), np.int8(0), np.float32(1), np.int8(5))
    jaxpr = str(jax.make_jaxpr(lambda *v: call("QLinearMatMul", *v))(*operands))
    assert "preferred_element_type=int32" in jaxpr
    assert call("QLinearMatMul", *operands).item() == 127


def test_losses_skip_an_ignored_class_that_does_not_exist():
    scores, labels = RNG.normal(size=(3, 4)).astype(np.float32), np.array([1, -100, 3])
    log_p = scores - np.log(np.exp(scores.astype(np.float64)).sum(1, keepdims=True))
    weight = f32(1, 2, 3, 4)
    expected = -(2 * log_p[0, 1] + 4 * log_p[2, 3]) / 6
    loss = lambda s: call("SoftmaxCrossEntropyLoss", s, labels, weight, ignore_index=-100)  # noqa: E731
    np.testing.assert_allclose(loss(scores), expected, rtol=1e-5)
    gradient = np.asarray(jax.grad(loss)(scores))
    assert np.isfinite(gradient).all() and not gradient[1].any()


def test_determinant_of_a_batch_and_of_half_floats():
    x = RNG.normal(size=(2, 3, 3))
    np.testing.assert_allclose(call("Det", jnp.asarray(x, jnp.float32)), np.linalg.det(x), rtol=1e-4)
    assert call("Det", np.eye(2, dtype=np.float16)).dtype == np.float16
