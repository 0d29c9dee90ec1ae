"""Every op x case x transformation, against float64.

Oracle: formulas.py, plain jnp, evaluated in float64. The bar: at most twice the error of the same formula
in the op's own dtype, which is what a user without Zenith has, with a floor of a few ulps (see `close`).
A new op is one more `Op` in OPS.
"""

from __future__ import annotations

import dataclasses
import functools as ft
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from formulas import add_layer_norm, add_rms_norm, attention, gelu, layer_norm, rms_norm, silu, softmax
from jax import lax
from numerics import assert_error_ratio, in_float64

from zenith_jax import ops
from zenith_jax.errors import DTypeError, ShapeError

SEED = 20260107
DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]


def zenith_attention(q, k, v, *scores, **options):
    for x in scores:
        options["mask" if x.dtype == bool else "bias"] = x
    return ops.attention(q, k, v, **options)


# --- cases ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    """shapes: of the operands, floats; a mask where the shape is wrapped in `Mask`. shared: operands that all examples
    of a batch have in common."""

    op: str
    name: str
    function: Callable[..., Any]
    formula: Callable[..., Any]
    shapes: tuple[Any, ...]
    shared: tuple[int, ...] = ()

    def __str__(self) -> str:
        return f"{self.op} {self.name}"

    def arguments(self, dtype: Any = jnp.float32, seed: int = SEED) -> list[Any]:
        rng = np.random.default_rng(seed)
        return [
            jnp.asarray(rng.random(s.shape) < 0.7)
            if isinstance(s, Mask)
            else jnp.asarray(rng.normal(size=s) + (i in self.shared), dtype)
            for i, s in enumerate(self.shapes)
        ]


@dataclasses.dataclass(frozen=True)
class Mask:
    shape: tuple[int, ...]


X, W = (3, 5, 37), (37,)  # no size a multiple of a vector's
Q, K, V = (2, 9, 4, 6), (2, 7, 4, 6), (2, 7, 4, 6)


def _attention(name, *more, q=Q, k=K, v=V, **options):
    return Case(
        "attention", name, ft.partial(zenith_attention, **options), ft.partial(attention, **options), (q, k, v, *more)
    )


CASES = [
    Case("layer_norm", "", ops.layer_norm, layer_norm, (X,)),
    Case("layer_norm", "scale bias", ops.layer_norm, layer_norm, (X, W, W), (1, 2)),
    Case("layer_norm", "large eps", ft.partial(ops.layer_norm, eps=0.5), ft.partial(layer_norm, eps=0.5), (X, W), (1,)),
    Case("rms_norm", "", ops.rms_norm, rms_norm, (X,)),
    Case("rms_norm", "scale", ops.rms_norm, rms_norm, (X, W), (1,)),
    Case("add_layer_norm", "scale bias", ops.add_layer_norm, add_layer_norm, (X, X, W, W), (2, 3)),
    Case("add_rms_norm", "scale", ops.add_rms_norm, add_rms_norm, (X, X, W), (2,)),
    Case("softmax", "", ops.softmax, softmax, (X,)),
    Case("softmax", "axis 1", ft.partial(ops.softmax, axis=1), ft.partial(softmax, axis=1), (X,)),
    Case("gelu", "tanh", ops.gelu, gelu, (X,)),
    Case("gelu", "erf", ft.partial(ops.gelu, approximate=False), ft.partial(gelu, approximate=False), (X,)),
    Case("silu", "", ops.silu, silu, (X,)),
    _attention(""),
    _attention("causal", is_causal=True),
    _attention("window", local_window_size=(2, 1)),
    _attention("causal window, some rows empty", is_causal=True, local_window_size=(1, 0)),
    _attention("mask", Mask((2, 4, 9, 7))),
    _attention("mask of keys", Mask((2, 1, 1, 7))),
    _attention("bias", (2, 4, 9, 7)),
    _attention("bias of heads", (1, 4, 1, 7)),
    _attention("mask and bias, causal", Mask((2, 1, 9, 7)), (1, 1, 9, 7), is_causal=True),
    _attention("grouped", k=(2, 7, 2, 6), v=(2, 7, 2, 6)),
    _attention("multi-query, mask, bias", Mask((2, 4, 9, 7)), (1, 4, 9, 7), k=(2, 7, 1, 6), v=(2, 7, 1, 6)),
    _attention("value size", v=(2, 7, 4, 11)),
    _attention("scale", scale=0.7),
    _attention("one query", q=(2, 1, 4, 6)),
]
# One case of each op with parameters, and the hard ones of attention, for the dearer transformations.
MAIN_NAMES = ("scale bias", "scale", "axis 1", "tanh", "erf", "mask and bias, causal", "grouped")
MAIN = [c for c in CASES if c.name in MAIN_NAMES or c.op in ("silu", "softmax")]

each_case = pytest.mark.parametrize("case", CASES, ids=str)
main_case = pytest.mark.parametrize("case", MAIN, ids=str)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.__name__)

# Ulps at the largest value that are let pass where the plain formula happens to be exact: sums in another order.
VALUE_ULPS, GRADIENT_ULPS, SECOND_ULPS = 4.0, 16.0, 64.0


def float_indices(args: Sequence[Any]) -> tuple[int, ...]:
    return tuple(i for i, a in enumerate(args) if jnp.issubdtype(a.dtype, jnp.floating))


def loss_of(function: Callable) -> Callable:
    """A scalar with unequal weights on all results; in the widened dtype, as training losses are."""

    def loss(*args: Any) -> Any:
        return sum(
            jnp.vdot(
                r.astype(wide := jnp.promote_types(r.dtype, jnp.float32)).ravel(),
                jnp.cos(0.7 * jnp.arange(r.size, dtype=wide)),
            )
            for r in jax.tree.leaves(function(*args))
        )

    return loss


def gradient_of(function: Callable, args: Sequence[Any]) -> Callable:
    return jax.grad(loss_of(function), float_indices(args))


def close(transform: Callable[[Callable], Callable], case: Case, args: Sequence[Any], floor_ulps: float) -> None:
    """transform(op)(*args) against transform(formula): error ratio with float64."""
    fused, plain = transform(case.function), transform(case.formula)
    with np.errstate(all="ignore"):
        assert_error_ratio(
            jax.jit(fused)(*args), jax.jit(plain)(*args), in_float64(plain)(*args), floor_ulps=floor_ulps
        )


# --- values and first derivatives -------------------------------------------------------------------------------------


@each_case
@each_dtype
def test_value_and_gradient_are_as_exact_as_the_formula(case, dtype):
    args = case.arguments(dtype)
    close(lambda f: f, case, args, VALUE_ULPS)
    close(lambda f: gradient_of(f, args), case, args, GRADIENT_ULPS)


@each_case
def test_result_is_bit_reproducible(case):
    args = case.arguments()
    function = jax.jit(lambda *a: (case.function(*a), gradient_of(case.function, args)(*a)))
    first = jax.tree.map(np.asarray, function(*args))
    for _ in range(3):
        jax.tree.map(np.testing.assert_array_equal, first, jax.tree.map(np.asarray, function(*args)))


@main_case
def test_eager_call_equals_jitted_call(case):
    args = case.arguments()
    jax.tree.map(np.testing.assert_array_equal, case.function(*args), jax.jit(case.function)(*args))


@main_case
def test_float64_runs_as_the_reference(case):
    with jax.enable_x64(True):
        args = [jnp.asarray(np.asarray(a), np.float64) if a.dtype == np.float32 else a for a in case.arguments()]
        for value, expected in zip(
            jax.tree.leaves(case.function(*args)), jax.tree.leaves(case.formula(*args)), strict=True
        ):
            assert value.dtype == np.float64
            np.testing.assert_allclose(value, expected, rtol=1e-12, atol=1e-12)


# --- vmap -------------------------------------------------------------------------------------------------------------


def mapped_axes(case: Case) -> list[tuple[Any, ...]]:
    """in_axes: each axis of all operands in turn, shared ones shared; each operand mapped alone."""
    n = len(case.shapes)
    together = [tuple(None if i in case.shared else axis for i in range(n)) for axis in (0, 1, -1)]
    alone = [tuple(0 if i == j else None for i in range(n)) for j in range(n)] if n > 1 else []
    return [*dict.fromkeys([*together, *alone, (0,) * n])]


def with_mapped(args: Sequence[Any], axes: Sequence[Any], size: int = 3) -> list[Any]:
    def mapped(a: Any, axis: int | None) -> Any:
        if axis is None:
            return a
        copies = [a if a.dtype == bool else (a * (1 + 0.25 * i)).astype(a.dtype) for i in range(size)]
        copies = [jnp.roll(c, i, -1) for i, c in enumerate(copies)]
        return jnp.stack(copies, axis)

    return [mapped(a, axis) for a, axis in zip(args, axes, strict=True)]


@main_case
def test_vmap_over_any_axis_of_any_operand(case):
    for axes in mapped_axes(case):
        args = with_mapped(case.arguments(), axes)
        close(lambda f, axes=axes: jax.vmap(f, axes), case, args, VALUE_ULPS)


@main_case
def test_gradients_through_vmap(case):
    """vmap(grad) with parameters shared and mapped; grad(vmap), which sums over the shared ones."""
    args = case.arguments()
    shared = tuple(None if i in case.shared else 0 for i in range(len(args)))
    for axes in dict.fromkeys([shared, (0,) * len(args)]):
        batched = with_mapped(args, axes)
        close(lambda f, axes=axes: jax.vmap(gradient_of(f, args), axes), case, batched, GRADIENT_ULPS)
        close(lambda f, axes=axes: gradient_of(jax.vmap(f, axes), args), case, batched, GRADIENT_ULPS)


@pytest.mark.parametrize("case", [c for c in MAIN if str(c) in ("layer_norm scale bias", "attention grouped")], ids=str)
def test_nested_vmap(case):
    axes = tuple(None if i in case.shared else 0 for i in range(len(case.shapes)))
    args = with_mapped(with_mapped(case.arguments(), axes, 2), axes, 3)
    close(lambda f: jax.vmap(jax.vmap(gradient_of(f, case.arguments()), axes), axes), case, args, GRADIENT_ULPS)


# --- forward mode and higher orders -----------------------------------------------------------------------------------


def directions(args: Sequence[Any]) -> list[Any]:
    return [
        jnp.sin(1.3 * jnp.arange(args[i].size, dtype=args[i].dtype)).reshape(args[i].shape) for i in float_indices(args)
    ]


def at_floats(function: Callable, args: Sequence[Any]) -> tuple[Callable, list[Any]]:
    """The function of its float arguments only, and these."""
    floats = float_indices(args)

    def of_floats(*values: Any) -> Any:
        full = list(args)
        for i, value in zip(floats, values, strict=True):
            full[i] = value
        return function(*full)

    return of_floats, [args[i] for i in floats]


def jvp(f, *args):
    function, values = at_floats(f, args)
    return jax.jvp(function, values, directions(args))[1]


def hvp_forward_over_reverse(f, *args):
    function, values = at_floats(loss_of(f), args)
    return jax.jvp(jax.grad(function, tuple(range(len(values)))), values, directions(args))[1]


def hvp_reverse_over_forward(f, *args):
    function, values = at_floats(loss_of(f), args)
    return jax.grad(lambda *v: jax.jvp(function, v, tuple(directions(args)))[1], tuple(range(len(values))))(*values)


def grad_of_grad(f, *args):
    function, values = at_floats(loss_of(f), args)
    every = tuple(range(len(values)))

    def along(*v):
        return sum(jnp.vdot(g, d) for g, d in zip(jax.grad(function, every)(*v), directions(args), strict=True))

    return jax.grad(along, every)(*values)


@main_case
@pytest.mark.parametrize(
    "transform, floor",
    [
        (jvp, GRADIENT_ULPS),
        (hvp_forward_over_reverse, SECOND_ULPS),
        (hvp_reverse_over_forward, SECOND_ULPS),
        (grad_of_grad, SECOND_ULPS),
    ],
    ids=["jvp", "hvp fwd over rev", "hvp rev over fwd", "grad of grad"],
)
def test_higher_derivatives(case, transform, floor):
    close(lambda f: ft.partial(transform, f), case, case.arguments(), floor)


# --- remat and control flow -------------------------------------------------------------------------------------------


@main_case
def test_remat_scan_and_cond(case):
    """A scan of rematerialised conditionals, with its gradient: values pass through residuals of all three."""
    args = case.arguments()

    def transformed(f):
        def total(*args):
            def body(carry, factor):
                one = jax.checkpoint(lambda *a: loss_of(f)(*a))
                scaled = [a * factor.astype(a.dtype) if i == 0 else a for i, a in enumerate(args)]
                return carry + lax.cond(factor > 1, lambda: one(*scaled), lambda: 2 * one(*scaled)), None

            # In float64 under the oracle, float32 else.
            factors = jnp.array([0.5, 1.5, 1.0], jnp.promote_types(args[0].dtype, jnp.float32))
            return lax.scan(body, jnp.zeros((), factors.dtype), factors)[0]

        return jax.value_and_grad(total, float_indices(args))

    close(transformed, case, args, GRADIENT_ULPS)


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
    case = _attention(
        str(sizes), Mask((b, 1, t, s)), (1, h, t, s), q=(b, t, h, d), k=(b, s, k, d), v=(b, s, k, e), is_causal=causal
    )
    args = case.arguments()
    close(lambda f: f, case, args, VALUE_ULPS)
    close(lambda f: gradient_of(f, args), case, args, GRADIENT_ULPS)


@pytest.mark.parametrize("b, t, s, h", [(0, 3, 4, 2), (2, 0, 4, 2), (2, 0, 0, 2)])
def test_empty_attention_gives_empty_results_and_zero_gradients(b, t, s, h):
    case = _attention("empty", q=(b, t, h, 4), k=(b, s, h, 4), v=(b, s, h, 4))
    args = case.arguments()
    assert jax.jit(case.function)(*args).shape == (b, t, h, 4)
    for gradient, arg in zip(jax.jit(gradient_of(case.function, args))(*args), args, strict=True):
        np.testing.assert_array_equal(gradient, np.zeros(arg.shape))


def test_attention_without_keys_is_nan():
    none = jnp.ones((1, 0, 1, 4))
    assert np.isnan(jax.jit(ops.attention)(jnp.ones((1, 2, 1, 4)), none, none)).all()


def test_attention_without_batch_axis_is_attention_of_one_example():
    args = _attention("").arguments()
    np.testing.assert_array_equal(ops.attention(*(a[0] for a in args)), ops.attention(*(a[:1] for a in args))[0])


# --- NaN, infinities, masked rows -------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("op", ROW_OPS)
def test_nan_and_infinity_stay_in_their_row(op, bad):
    case = row_case(op, (4, 37))
    args = case.arguments()
    args[0] = args[0].at[1, 5].set(bad)
    value, expected = jax.tree.leaves(case.function(*args))[0], jax.tree.leaves(case.formula(*args))[0]
    if op in ("gelu", "silu") and bad == -np.inf:  # the formula says -inf * 0, the kernel its limit
        assert value[1, 5] == 0
        value, expected = value.at[1, 5].set(0), expected.at[1, 5].set(0)
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


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_attention_ignores_what_is_masked(bad):
    """A NaN behind the mask reaches neither the result nor any gradient but its own."""
    q, k, v, mask = _attention("", Mask((2, 1, 1, 7))).arguments()
    mask = mask.at[..., 3].set(False).at[..., 0].set(True)
    bad_bias = jnp.zeros((1, 1, 1, 7)).at[..., 3].set(bad)
    expected = ops.attention(q, k, v, mask=mask)
    np.testing.assert_allclose(ops.attention(q, k, v, mask=mask, bias=bad_bias), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(ops.attention(q, k.at[:, 3].set(bad), v, mask=mask), expected, rtol=1e-5, atol=1e-6)


def test_nan_in_one_head_of_attention_stays_there():
    q, k, v = _attention("").arguments()
    out = ops.attention(q.at[0, 2, 1].set(jnp.nan), k, v)
    assert np.isnan(out[0, 2, 1]).all()
    assert np.isnan(out).sum() == out.shape[-1]


def test_row_without_allowed_keys_is_the_mean_of_values():
    q, k, v = _attention("").arguments()
    mask = jnp.ones((2, 1, 9, 7), bool).at[0, 0, 4].set(False)
    out = ops.attention(q, k, v, mask=mask)
    np.testing.assert_allclose(out[0, 4], v[0].mean(0), rtol=1e-5, atol=1e-6)


# --- properties -------------------------------------------------------------------------------------------------------


def test_softmax_rows_sum_to_one_and_do_not_see_a_shift():
    x = jnp.asarray(np.random.default_rng(SEED).normal(size=(6, 1000)) * 5, jnp.float32)
    np.testing.assert_allclose(ops.softmax(x).sum(-1), 1, rtol=1e-5)
    np.testing.assert_allclose(ops.softmax(x + 8), ops.softmax(x), rtol=1e-5)


def test_attention_commutes_with_permutations_of_keys():
    q, k, v = _attention("").arguments()
    order = np.random.default_rng(SEED).permutation(7)
    np.testing.assert_allclose(ops.attention(q, k[:, order], v[:, order]), ops.attention(q, k, v), rtol=1e-5, atol=1e-6)


# --- wrong calls ------------------------------------------------------------------------------------------------------

f32 = ft.partial(jnp.zeros, dtype=jnp.float32)
WRONG = {
    "layer_norm: scale": (
        ShapeError,
        lambda: ops.layer_norm(f32((2, 5, 8)), f32(7)),
        "layer_norm: scale must have shape (8,) to match x of shape (2, 5, 8), got (7,)",
    ),
    "layer_norm: bias": (
        ShapeError,
        lambda: ops.layer_norm(f32((2, 8)), f32(8), f32((1, 8))),
        "layer_norm: bias must have shape (8,) to match x of shape (2, 8), got (1, 8)",
    ),
    "layer_norm: rank": (ShapeError, lambda: ops.layer_norm(f32(())), "layer_norm: x must have at least one axis"),
    "layer_norm: dtype": (
        DTypeError,
        lambda: ops.layer_norm(jnp.zeros((2, 8), jnp.int32)),
        "layer_norm: x must have a real floating dtype, got int32; convert it first",
    ),
    "rms_norm: complex": (
        DTypeError,
        lambda: ops.rms_norm(jnp.zeros((2, 8), jnp.complex64)),
        "rms_norm: x must have a real floating dtype, got complex64",
    ),
    "add_layer_norm: residual": (
        ShapeError,
        lambda: ops.add_layer_norm(f32((2, 8)), f32((8,))),
        "residual must have the shape and dtype of x, (2, 8) float32, got (8,) float32",
    ),
    "add_rms_norm: dtype": (
        ShapeError,
        lambda: ops.add_rms_norm(f32((2, 8)), jnp.zeros((2, 8), jnp.bfloat16)),
        "got (2, 8) bfloat16",
    ),
    "softmax: axis": (
        ShapeError,
        lambda: ops.softmax(f32((2, 8)), axis=2),
        "softmax: axis must be in [-2, 2) for x of shape (2, 8), got 2",
    ),
    "softmax: dtype": (DTypeError, lambda: ops.softmax(jnp.zeros((2, 8), bool)), "softmax: x must have a real"),
    "gelu: dtype": (DTypeError, lambda: ops.gelu(jnp.zeros(3, jnp.int8)), "gelu_tanh: x must have a real floating"),
    "silu: dtype": (DTypeError, lambda: ops.silu(jnp.zeros(3, jnp.uint8)), "silu: x must have a real floating"),
    "attention: rank": (
        ShapeError,
        lambda: ops.attention(f32((2, 4)), f32((2, 4)), f32((2, 4))),
        "attention: query, key and value must have rank 4 (or all rank 3), got shapes (2, 4)",
    ),
    "attention: features": (
        ShapeError,
        lambda: ops.attention(f32((1, 3, 2, 4)), f32((1, 3, 2, 5)), f32((1, 3, 2, 4))),
        "must have the same number of features, got query (1, 3, 2, 4) and key (1, 3, 2, 5)",
    ),
    "attention: lengths": (
        ShapeError,
        lambda: ops.attention(f32((1, 3, 2, 4)), f32((1, 5, 2, 4)), f32((1, 6, 2, 4))),
        "key and value must agree in batch, length and heads",
    ),
    "attention: batch": (
        ShapeError,
        lambda: ops.attention(f32((1, 3, 2, 4)), f32((2, 5, 2, 4)), f32((2, 5, 2, 4))),
        "query and key must agree in batch",
    ),
    "attention: heads": (
        ShapeError,
        lambda: ops.attention(f32((1, 3, 3, 4)), f32((1, 5, 2, 4)), f32((1, 5, 2, 4))),
        "must be a multiple of the key/value heads",
    ),
    "attention: mask": (
        ShapeError,
        lambda: ops.attention(*[f32((1, 3, 2, 4))] * 3, mask=jnp.ones((1, 2, 3, 4), bool)),
        "mask must be broadcastable to (batch, heads, query length, key length) = (1, 2, 3, 3), got",
    ),
    "attention: mask dtype": (
        DTypeError,
        lambda: ops.attention(*[f32((1, 3, 2, 4))] * 3, mask=f32((1, 2, 3, 3))),
        "mask must be bool (True = attend), got float32; an additive mask is a bias",
    ),
    "attention: bias": (
        DTypeError,
        lambda: ops.attention(*[f32((1, 3, 2, 4))] * 3, bias=jnp.ones((3, 3), bool)),
        "bias must have a real floating dtype, got bool",
    ),
    "attention: dtypes": (
        DTypeError,
        lambda: ops.attention(f32((1, 3, 2, 4)), *[jnp.zeros((1, 3, 2, 4), jnp.bfloat16)] * 2),
        "must have one real floating dtype, got float32, bfloat16, bfloat16; convert them first",
    ),
    "attention: window": (
        ShapeError,
        lambda: ops.attention(*[f32((1, 3, 2, 4))] * 3, local_window_size=(-1, 0)),
        "local_window_size must not be negative, got (-1, 0)",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_call_names_op_invariant_and_what_came(name):
    error, call, text = WRONG[name]
    with pytest.raises(error) as caught:
        call()
    assert text in str(caught.value)
    with pytest.raises(error):
        jax.jit(call)()
