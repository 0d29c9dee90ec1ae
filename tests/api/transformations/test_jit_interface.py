"""zenith.jit is a drop-in for jax.jit: arguments, methods, effects, errors, caches, cost."""

from __future__ import annotations

import functools as ft
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numerics import assert_error_ratio, in_float64
from small_model import B, T, calls, layer, loss

import zenith_jax as zenith


def test_static_arguments_are_not_traced(params, x):
    @ft.partial(zenith.jit, static_argnums=(2,), static_argnames=("mode",))
    def function(params, x, n, *, mode="train"):
        assert type(n) is int and mode in ("train", "test")
        return layer(params, x) * n if mode == "train" else x

    np.testing.assert_allclose(function(params, x, 2), 2 * layer(params, x), rtol=2e-5, atol=1e-5)
    np.testing.assert_array_equal(function(params, x, 2, mode="test"), x)


def test_donated_arguments_are_donated(x):
    function = zenith.jit(lambda x: jax.nn.gelu(x), donate_argnums=(0,))
    given = x + 0
    expected = jax.nn.gelu(x)
    np.testing.assert_allclose(function(given), expected, rtol=1e-5, atol=1e-6)
    assert given.is_deleted()


def test_pytrees_with_none_keywords_and_non_arrays_pass_through(x):
    @zenith.fuse
    def function(tree, *, scale=None, name):
        assert tree["none"] is None and name == "n" and type(tree["python"]) is float
        y = jax.nn.gelu(tree["x"]) * (1 if scale is None else scale)
        return {"y": y, "none": None, "name": name, "list": [y.sum(), (tree["python"],)]}

    out = function({"x": x, "none": None, "python": 2.0}, name="n")
    assert out["none"] is None and out["name"] == "n" and out["list"][1] == (2.0,)
    np.testing.assert_allclose(out["y"], jax.nn.gelu(x), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        function({"x": x, "none": None, "python": 2.0}, scale=3.0, name="n")["y"],
        3 * jax.nn.gelu(x),
        rtol=1e-5,
        atol=1e-6,
    )


def test_lower_trace_and_eval_shape_are_those_of_jit(params, x):
    fused, plain = zenith.jit(layer), jax.jit(layer)
    assert type(fused) is type(plain)
    assert fused.eval_shape(params, x) == plain.eval_shape(params, x)
    assert jax.eval_shape(zenith.fuse(layer), params, x) == plain.eval_shape(params, x)
    assert "zenith_call" in str(fused.trace(params, x).jaxpr)
    assert "zenith_attention_fwd" in fused.lower(params, x).as_text()
    compiled = fused.lower(params, x).compile()
    np.testing.assert_array_equal(compiled(params, x), fused(params, x))


def test_numpy_arguments_and_weak_types_keep_their_result_types():
    def function(x, c):
        return jax.nn.gelu(x) * c

    for x, c in (
        (np.ones((4, 8), np.float32), 2.0),
        (np.ones((4, 8), np.float32), np.float32(2)),
        (jnp.ones((4, 8), jnp.bfloat16), 2.0),
        (jnp.ones((4, 8), jnp.bfloat16), 2),
    ):
        fused, plain = zenith.jit(function)(x, c), jax.jit(function)(x, c)
        assert (fused.dtype, fused.shape, fused.weak_type) == (plain.dtype, plain.shape, plain.weak_type)


def test_function_used_outside_stays_unfused(params, x):
    inner = jax.jit(jax.value_and_grad(loss))

    def outside():
        return calls(lambda p, x: inner(p, x), params, x)

    def inside():
        return calls(zenith.jit(lambda p, x: inner(p, x)), params, x)

    assert not outside()
    assert inside()["attention_bwd"] == 1
    assert not outside()
    assert inside()["attention_bwd"] == 1


def test_disabled_zenith_is_plain_jax(params, x, monkeypatch):
    with zenith.configured(enabled=False):
        assert not calls(zenith.jit(jax.grad(loss)), params, x)
        assert not calls(zenith.fuse(loss), params, x)
    monkeypatch.setenv("ZENITH_DISABLE", "1")
    assert zenith.Config.from_environment().enabled is False
    monkeypatch.setenv("ZENITH_DISABLE", "0")
    assert zenith.Config.from_environment().enabled is True


def test_effects_stay_and_keep_their_order(x, capfd):
    seen = []

    def function(x):
        jax.debug.callback(lambda v: seen.append(("a", float(v))), x.sum(), ordered=True)
        y = jax.nn.gelu(x)
        jax.debug.callback(lambda v: seen.append(("b", float(v))), y.sum(), ordered=True)
        jax.debug.print("printed {n}", n=y.size)
        z = jax.nn.softmax(y)
        jax.debug.callback(lambda v: seen.append(("c", float(v))), z.sum(), ordered=True)
        return z

    assert zenith.explain(function)(x).counts() == {"gelu_tanh": 1, "softmax": 1}
    jax.block_until_ready(zenith.jit(function)(x))
    jax.effects_barrier()
    assert [name for name, _ in seen] == ["a", "b", "c"]
    assert seen[2][1] == pytest.approx(B * T, rel=1e-5)
    assert f"printed {x.size}" in capfd.readouterr().out


def test_errors_of_the_function_come_through(x):
    def function(x):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        zenith.jit(function)(x)
    with pytest.raises(TypeError):
        zenith.jit(lambda x: jnp.dot(x, jnp.ones(3)))(x)


def test_closed_over_tracers_and_arrays_work(params, x):
    def function(params, x):
        return zenith.fuse(lambda: layer(params, x))() + zenith.fuse(lambda y: layer(params, y))(x)

    def plain(p, x):
        return 2 * layer(p, x)

    assert_error_ratio(
        jax.jit(function)(params, x), jax.jit(plain)(params, x), in_float64(plain)(params, x), floor_ulps=32
    )
    gradient = jax.jit(jax.grad(lambda p, x: jnp.sum(jnp.sin(function(p, x)))))
    plain_gradient = jax.grad(lambda p, x: jnp.sum(jnp.sin(plain(p, x))))
    assert_error_ratio(
        gradient(params, x), jax.jit(plain_gradient)(params, x), in_float64(plain_gradient)(params, x), floor_ulps=64
    )


def test_cost_of_tracing_grows_linearly_with_depth(params, x):
    def deep(n):
        def function(params, x):
            for _ in range(n):
                x = layer(params, x)
            return jnp.sum(jnp.sin(x))

        return jax.grad(function)

    def seconds(function):
        best = float("inf")
        for _ in range(3):

            def fresh(p, x, f=function):
                return f(p, x)

            start = time.process_time()
            zenith.jit(fresh).trace(params, x)
            best = min(best, time.process_time() - start)
        return best

    seconds(deep(2))
    # Quadratic growth would be 16 times; 8 leaves room for a busy machine.
    assert seconds(deep(24)) < 8 * seconds(deep(6))


@pytest.mark.parametrize("decorate", [zenith.jit, zenith.fuse])
def test_what_is_no_function_is_refused_when_it_is_decorated(decorate):
    with pytest.raises(TypeError, match="take a function, got 3"):
        decorate(3)
