"""Control flow, remat, devices and libraries' training steps around and inside of what is fused.

Oracle: the undecorated function in float64.
"""

from __future__ import annotations

import functools as ft

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec as P
from numerics import assert_error_ratio, in_float64
from small_model import ALL, WIDTH, H, calls, check, layer, loss, stacked, times

import zenith_jax as zenith

# --- control flow -----------------------------------------------------------------------------------------------------


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


@pytest.mark.skipif(jax.device_count() < 2, reason="needs two devices")
@pytest.mark.filterwarnings("ignore:.*pmap:DeprecationWarning")
def test_pmap_style_code_is_fused(params, x):
    """One example a device, gradients averaged by a collective; any number of devices from two on."""

    def step(fuse):
        def one(params, x):
            return jax.lax.pmean(jax.grad(fuse(loss))(params, x[None]), "devices")

        return jax.pmap(one, axis_name="devices", in_axes=(None, 0), devices=jax.devices()[:2])

    fused, plain = (step(fuse)(params, x[:2]) for fuse in (zenith.fuse, lambda f: f))
    mean = lambda p, x: jax.lax.pmean(jax.grad(loss)(p, x[None]), "devices")  # noqa: E731
    expected = in_float64(jax.vmap(mean, (None, 0), axis_name="devices"))
    assert_error_ratio(fused, plain, expected(params, x[:2]), floor_ulps=32)


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
