"""Derivatives of every kind and order, inside and outside of the decorated function.

Oracle: the undecorated function in float64.
"""

from __future__ import annotations

import functools as ft

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numerics import assert_error_ratio, in_float64
from small_model import ALL, FLOOR_ULPS, calls, check, layer, loss, tangent, times

import zenith_jax as zenith

# --- reverse mode -----------------------------------------------------------------------------------------------------


def test_grad_inside_is_fused_forward_and_backward(params, x):
    step = jax.value_and_grad(loss)
    report = check(step, params, x, counts=ALL)
    assert all(s.differentiated for s in report.fused)
    found = calls(zenith.jit(step), params, x)
    for name in ("attention", "add_layer_norm", "gelu_tanh"):
        assert found[f"{name}_fwd"] == found[f"{name}_bwd"] == 1, found


def test_grad_outside_is_fused_forward_and_backward(params, x):
    fused = jax.jit(jax.value_and_grad(zenith.jit(loss)))
    plain = jax.value_and_grad(loss)
    assert_error_ratio(fused(params, x), jax.jit(plain)(params, x), in_float64(plain)(params, x), floor_ulps=FLOOR_ULPS)
    found = calls(fused, params, x)
    assert found["attention_fwd"] == found["attention_bwd"] == 1, found


def test_vjp_inside_is_fused(params, x):
    def function(params, x):
        y, pullback = jax.vjp(layer, params, x)
        return pullback(jnp.cos(y))

    check(function, params, x, counts=ALL)


def test_grad_with_auxiliary_output_that_is_no_array(params, x):
    def with_aux(params, x):
        return loss(params, x), {"text": "kept", "y": layer(params, x)[0], "n": 3, "none": None}

    def function(params, x):
        (value, aux), gradient = jax.value_and_grad(with_aux, has_aux=True)(params, x)
        assert (aux["text"], aux["n"], aux["none"]) == ("kept", 3, None)
        return value, gradient, aux["y"]

    check(function, params, x, counts=times(2))
    # The layer is written twice, for the loss and for aux, and computed once.
    found = calls(zenith.jit(function), params, x)
    assert found["attention_fwd"] == found["attention_bwd"] == 1, found


@pytest.mark.parametrize("of", [jax.jacrev, jax.jacfwd, jax.hessian], ids=lambda f: f.__name__)
def test_jacobians_inside_are_right(x, of):
    def function(x):
        return of(lambda row: jnp.sin(jax.nn.gelu(row) / jnp.sqrt(jnp.mean(row * row) + 0.1)))(x)

    assert_error_ratio(
        zenith.jit(function)(x[0, 0]), jax.jit(function)(x[0, 0]), in_float64(function)(x[0, 0]), floor_ulps=32
    )


@pytest.mark.parametrize("of", [jax.jacrev, jax.jacfwd, jax.hessian], ids=lambda f: f.__name__)
def test_jacobians_outside_are_right(x, of):
    def row_loss(row):
        return jnp.sin(jax.nn.gelu(row) / jnp.sqrt(jnp.mean(row * row) + 0.1))

    fused, plain = of(zenith.jit(row_loss)), of(row_loss)
    assert_error_ratio(fused(x[0, 0]), plain(x[0, 0]), in_float64(plain)(x[0, 0]), floor_ulps=32)


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize(
    "name",
    [
        "jvp",
        "linearize",
        "hvp forward over reverse",
        "hvp reverse over forward",
        "hvp reverse over reverse",
        "grad of grad",
    ],
)
def test_forward_mode_and_higher_orders_are_right(params, x, name, inside):
    def transformed(f):
        def grad_dot(p, x):
            return jnp.vdot(jax.grad(f, 1)(p, x), tangent(x))

        return {
            "jvp": lambda p, x: jax.jvp(ft.partial(f, p), (x,), (tangent(x),)),
            "linearize": lambda p, x: jax.linearize(ft.partial(f, p), x)[1](tangent(x)),
            "hvp forward over reverse": lambda p, x: jax.jvp(jax.grad(ft.partial(f, p)), (x,), (tangent(x),))[1],
            "hvp reverse over forward": lambda p, x: jax.grad(
                lambda x: jax.jvp(ft.partial(f, p), (x,), (tangent(x),))[1]
            )(x),
            "hvp reverse over reverse": jax.grad(grad_dot, 1),
            "grad of grad": jax.grad(grad_dot, 0),
        }[name]

    plain = transformed(loss)
    fused = zenith.jit(plain) if inside else jax.jit(transformed(zenith.jit(loss)))
    # Second derivatives cancel among their terms: 256 ulps of the largest.
    assert_error_ratio(fused(params, x), jax.jit(plain)(params, x), in_float64(plain)(params, x), floor_ulps=256)


def test_vmap_of_grad_gives_gradients_of_each_example(params, x):
    check(lambda p, x: jax.vmap(jax.grad(loss), in_axes=(None, 0))(p, x[:, None]), params, x, counts=ALL)


def test_vmap_of_grad_with_parameters_of_each_example(params, x):
    many = jax.tree.map(lambda a: jnp.stack([a, a * 0.5]), params)
    # No kernel takes one scale per example: that norm becomes its reference, in which one without scale is found.
    check(lambda p, x: jax.vmap(jax.grad(loss))(p, x[:, None]), many, x, counts={**ALL, "add_layer_norm": 2})


def test_vmap_outside_is_right(params, x):
    fused, plain = jax.vmap(zenith.jit(loss), (None, 0)), jax.vmap(loss, (None, 0))
    assert_error_ratio(
        fused(params, x[:, None]), plain(params, x[:, None]), in_float64(plain)(params, x[:, None]), floor_ulps=32
    )


# --- cross entropy ----------------------------------------------------------------------------------------------------

LABELS = jnp.asarray([3, 0, 4])


def label_loss(x):
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(x, LABELS[: x.shape[0]]))


def every_derivative(f):
    def all_of(x):
        dx = tangent(x)
        row = lambda r: f(r[None])  # noqa: E731
        return {
            "grad": jax.grad(f)(x),
            "jvp": jax.jvp(f, (x,), (dx,)),
            "linearize": jax.linearize(f, x)[1](dx),
            "vjp": jax.vjp(f, x)[1](2.0),
            "jacfwd": jax.jacfwd(f)(x),
            "jacrev": jax.jacrev(f)(x),
            "hessian": jax.hessian(f)(x),
            "hvp": jax.jvp(jax.grad(f), (x,), (dx,))[1],
            "vmap(grad)": jax.vmap(jax.grad(row))(x),
            "grad(vmap)": jax.grad(lambda x: jax.vmap(row)(x).sum())(x),
            "remat": jax.grad(jax.checkpoint(f))(x),
        }

    return all_of


@pytest.mark.parametrize("inside", [True, False])
def test_every_derivative_of_cross_entropy_is_right(inside):
    x = jnp.asarray(np.random.default_rng(20260107).normal(size=(3, 5)) * 2, jnp.float32)
    assert zenith.explain(label_loss)(x).counts() == {"cross_entropy": 1}
    plain = every_derivative(label_loss)
    fused = zenith.fuse(plain) if inside else every_derivative(zenith.fuse(label_loss))
    assert_error_ratio(jax.jit(fused)(x), jax.jit(plain)(x), in_float64(plain)(x), floor_ulps=16)


# --- user-defined derivatives -----------------------------------------------------------------------------------------


@jax.custom_vjp
def doubled_gradient(x):
    return jax.nn.gelu(x)


doubled_gradient.defvjp(lambda x: (doubled_gradient(x), x), lambda x, g: (2 * g * jax.nn.softmax(x),))


@jax.custom_jvp
def own_tangent(x):
    return jax.nn.gelu(x)


@own_tangent.defjvp
def _(primals, tangents):
    return own_tangent(*primals), 3 * tangents[0] * jnp.cos(primals[0])


@pytest.mark.parametrize(
    "function, counts",
    [
        # What the rule computes is fused, once: the primal is not run.
        (doubled_gradient, {"gelu_tanh": 1, "softmax": 1}),
        (own_tangent, {"gelu_tanh": 1}),
    ],
    ids=["custom_vjp", "custom_jvp"],
)
def test_user_rules_for_derivatives_are_kept(x, function, counts):
    check(jax.value_and_grad(lambda x: jnp.sum(jnp.sin(function(x)))), x, counts=counts)
    inside = zenith.jit(jax.grad(lambda x: function(x).sum()))
    outside = jax.grad(lambda x: zenith.jit(function)(x).sum())
    np.testing.assert_allclose(inside(x), outside(x), rtol=1e-6)
