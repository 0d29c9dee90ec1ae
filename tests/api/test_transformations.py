"""zenith.jit and zenith.fuse under every JAX transformation, inside and outside of the decorated function.

One small model: attention, residual norm, gelu. Oracle: the undecorated function in float64.
"""

from __future__ import annotations

import functools as ft
import re
import time
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec as P
from numerics import assert_error_ratio, in_float64

import zenith_jax as zenith

B, T, H, D = 2, 8, 2, 4
WIDTH = H * D
ALL = {"attention": 1, "add_layer_norm": 1, "gelu_tanh": 1}


@pytest.fixture(autouse=True)
def without_cost():
    with zenith.configured(use_cost=False):
        yield


def layer(params, x):
    q, k, v = (jnp.einsum("btw,whd->bthd", x, w) for w in params["qkv"])
    y = jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape)
    x = x + y
    mean = x.mean(-1, keepdims=True)
    normed = (x - mean) * lax.rsqrt(x.var(-1, keepdims=True) + 1e-3) * params["scale"]
    return x + jax.nn.gelu(normed @ params["w"])


def loss(params, x):
    return jnp.sum(jnp.sin(layer(params, x)))


@pytest.fixture
def params():
    rng = np.random.default_rng(20260105)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape) / 4, jnp.float32)

    return {"qkv": tuple(normal(WIDTH, H, D) for _ in range(3)), "scale": normal(WIDTH) + 1, "w": normal(WIDTH, WIDTH)}


@pytest.fixture
def x():
    return jnp.asarray(np.random.default_rng(20260106).normal(size=(B, T, WIDTH)), jnp.float32)


def calls(function, *args):
    """{kernel: number of custom calls in the traced program}, control flow included."""
    return Counter(re.findall(r"kernel=(\w+)", str(jax.make_jaxpr(function)(*args))))


def check(function, *args, counts, floor_ulps=32):
    """`function`, fused, against itself unfused and in float64; `counts`: what explain says is fused."""
    report = zenith.explain(function)(*args)
    assert report.counts() == counts, str(report)
    assert_error_ratio(
        zenith.jit(function)(*args), jax.jit(function)(*args), in_float64(function)(*args), floor_ulps=floor_ulps
    )
    return report


def times(n):
    return {name: n * count for name, count in ALL.items()}


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
    assert_error_ratio(fused(params, x), jax.jit(plain)(params, x), in_float64(plain)(params, x), floor_ulps=32)
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


def tangent(tree):
    return jax.tree.map(lambda a: jnp.cos(jnp.arange(a.size, dtype=a.dtype)).reshape(a.shape), tree)


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


# --- control flow -----------------------------------------------------------------------------------------------------


def stacked(params, n=3):
    return jax.tree.map(lambda a: jnp.stack([a * (1 + 0.1 * i) for i in range(n)]), params)


@pytest.mark.parametrize("policy", [None, "none", "dots_saveable", "everything_saveable", "nothing_saveable"])
def test_scan_over_layers_with_remat_is_fused(params, x, policy):
    policies = jax.checkpoint_policies
    wrapped = (
        layer
        if policy is None
        else jax.checkpoint(layer, policy=None if policy == "none" else getattr(policies, policy))
    )

    def function(params, x):
        y, _ = lax.scan(lambda x, p: (wrapped(p, x), None), x, params)
        return jnp.sum(jnp.sin(y))

    report = check(jax.value_and_grad(function), stacked(params), x, counts=ALL, floor_ulps=64)
    assert all("scan" in s.where and ("remat" in s.where) == (policy is not None) for s in report.fused)


def test_saved_names_spare_the_recomputation(params, x):
    names = ["zenith_attention_fwd"]
    saving = jax.checkpoint(layer, policy=jax.checkpoint_policies.save_only_these_names(*names))
    recomputing = jax.checkpoint(layer)
    count = {}
    for name, wrapped in (("saving", saving), ("recomputing", recomputing)):
        step = zenith.jit(jax.grad(lambda p, x, wrapped=wrapped: jnp.sum(jnp.sin(wrapped(p, x)))))
        count[name] = calls(step, params, x)["attention_fwd"]
    assert count == {"saving": 1, "recomputing": 2}


def test_cond_is_fused_in_both_branches(params, x):
    def function(params, x, flag):
        return lax.cond(flag, lambda: loss(params, x), lambda: 2 * loss(params, x * x))

    check(jax.value_and_grad(function), params, x, jnp.array(True), counts=times(2))


def test_while_loop_is_fused(params, x):
    def function(params, x):
        return lax.fori_loop(0, 3, lambda i, x: layer(params, x), x)

    check(function, params, x, counts=ALL, floor_ulps=128)


def test_while_loop_with_dynamic_end_is_fused(params, x):
    def function(params, x, n):
        return lax.while_loop(lambda c: c[0] < n, lambda c: (c[0] + 1, layer(params, c[1])), (0, x))[1]

    check(function, params, x, jnp.int32(2), counts=ALL, floor_ulps=128)


def test_inner_jit_is_fused(params, x):
    check(jax.value_and_grad(lambda p, x: jax.jit(loss)(p, x)), params, x, counts=ALL)
    check(lambda p, x: jax.jit(jax.value_and_grad(loss))(p, x), params, x, counts=ALL)


def test_scan_over_microbatches_that_calls_grad_is_fused(params, x):
    def function(params, x):
        def one(total, x):
            value, gradient = jax.value_and_grad(loss)(params, x[None])
            return jax.tree.map(jnp.add, total, gradient), value

        return lax.scan(one, jax.tree.map(jnp.zeros_like, params), x)

    check(function, params, x, counts=ALL)


def test_nested_decorated_function_is_fused_once(params, x):
    inner = zenith.jit(layer)

    def function(p, x):
        return jnp.sum(jnp.sin(inner(p, x)))

    found = calls(zenith.jit(jax.grad(function)), params, x)
    assert found["attention_fwd"] == found["attention_bwd"] == 1, found
    assert_error_ratio(
        zenith.jit(jax.grad(function))(params, x),
        jax.jit(jax.grad(loss))(params, x),
        in_float64(jax.grad(loss))(params, x),
        floor_ulps=32,
    )


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


# --- many devices -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("where", ["forward", "grad inside", "grad of"])
def test_shard_map_is_fused(params, x, where, check_vma):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    sharded = ft.partial(jax.shard_map, mesh=mesh, check_vma=check_vma)

    def mean_loss(params, x):
        return lax.pmean(loss(params, x), "data")

    def grad_inside(params, x):
        value, gradient = jax.value_and_grad(loss)(params, x)
        if not check_vma:  # with it, the transpose of params' cast to varying sums the gradients
            gradient = jax.tree.map(lambda g: lax.psum(g, "data"), gradient)
        return value[None], gradient

    function = {
        "forward": sharded(layer, in_specs=(P(), P("data")), out_specs=P("data")),
        "grad inside": sharded(grad_inside, in_specs=(P(), P("data")), out_specs=(P("data"), P())),
        "grad of": jax.value_and_grad(sharded(mean_loss, in_specs=(P(), P("data")), out_specs=P())),
    }[where]
    check(function, params, x, counts=ALL)


# --- libraries' own transformations -----------------------------------------------------------------------------------


class Block(nnx.Module):
    def __init__(self, rngs):
        self.attention = nnx.MultiHeadAttention(H, WIDTH, decode=False, rngs=rngs)
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.linear = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        return x + self.linear(nnx.gelu(self.norm(x + self.attention(x))))


def test_nnx_training_step_with_optimizer_is_fused(x):
    import optax

    graph, state = nnx.split((model := Block(nnx.Rngs(0)), nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)))

    def step(state, x):
        model, optimizer = nnx.merge(graph, state)
        value, gradients = nnx.value_and_grad(lambda m: jnp.mean(jnp.sin(m(x))))(model)
        optimizer.update(model, gradients)
        return value, nnx.state((model, optimizer), nnx.Param)

    report = zenith.explain(step)(state, x)
    assert report.counts() == ALL, str(report)
    fused, plain = zenith.jit(step)(state, x), jax.jit(step)(state, x)
    for a, b in zip(jax.tree.leaves(fused), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)  # one SGD step of 0.1: float32 noise times 0.1


# --- jit's own interface ----------------------------------------------------------------------------------------------


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

            start = time.perf_counter()
            zenith.jit(fresh).trace(params, x)
            best = min(best, time.perf_counter() - start)
        return best

    seconds(deep(2))
    # Quadratic growth would be 16 times; 8 leaves room for a busy machine.
    assert seconds(deep(24)) < 8 * seconds(deep(6))
