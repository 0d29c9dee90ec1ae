"""Every op x case x transformation, against float64.

The bar: at most twice the error of the same formula in the op's own dtype, which is what a user without Zenith has,
with a floor of a few ulps. Cases and the comparison: op_cases.py.
"""

from __future__ import annotations

import functools as ft
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from op_cases import (
    GRADIENT_ULPS,
    MAIN,
    SECOND_ULPS,
    VALUE_ULPS,
    Case,
    close,
    each_case,
    each_dtype,
    float_indices,
    gradient_of,
    loss_of,
    main_case,
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


@pytest.mark.optimised
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
        floats = jnp.issubdtype(a.dtype, jnp.floating)
        copies = [(a * (1 + 0.25 * i)).astype(a.dtype) if floats else a for i in range(size)]
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
