"""jax.checkpoint: each policy means in a fused program what it means in the plain one, alone and in scan, grad and jit.

What is saved is read off the residuals that go from forward to backward, values are compared in float64.
"""

from __future__ import annotations

import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from numerics import assert_error_ratio, in_float64

import zenith_jax as zenith

B, T, H, D = 2, 8, 2, 4
WIDTH = H * D
POLICIES = jax.checkpoint_policies


@pytest.fixture(autouse=True)
def without_cost():
    with zenith.configured(use_cost=False):
        yield


@pytest.fixture
def params():
    rng = np.random.default_rng(20260301)  # small weights: three layers of large ones amplify rounding
    return {
        "qkv": jnp.asarray(rng.normal(size=(3, WIDTH, WIDTH)) / 8, jnp.float32),
        "up": jnp.asarray(rng.normal(size=(WIDTH, 3 * WIDTH)) / 8, jnp.float32),
        "down": jnp.asarray(rng.normal(size=(3 * WIDTH, WIDTH)) / 8, jnp.float32),
    }


@pytest.fixture
def x():
    return jnp.asarray(np.random.default_rng(20260302).normal(size=(B, T, WIDTH)), jnp.float32)


def layer(params, x):
    q, k, v = ((x @ w).reshape(B, T, H, D) for w in params["qkv"])
    y = checkpoint_name(jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape), "attended")
    hidden = checkpoint_name((x + y) @ params["up"], "hidden")
    return x + jax.nn.gelu(hidden) @ params["down"]


NAMED = {
    "none": None,
    "everything_saveable": POLICIES.everything_saveable,
    "nothing_saveable": POLICIES.nothing_saveable,
    "dots_saveable": POLICIES.dots_saveable,
    "dots_with_no_batch_dims_saveable": POLICIES.dots_with_no_batch_dims_saveable,
    "save_any_names_but_these": POLICIES.save_any_names_but_these("hidden"),
    "save_anything_except_these_names": POLICIES.save_anything_except_these_names("hidden"),
    "save_only_these_names": POLICIES.save_only_these_names("attended"),
    "save_from_both_policies": POLICIES.save_from_both_policies(
        POLICIES.dots_saveable, POLICIES.save_only_these_names("attended")
    ),
    "offload_dot_with_no_batch_dims": POLICIES.offload_dot_with_no_batch_dims("device", "pinned_host"),
    "save_and_offload_only_these_names": POLICIES.save_and_offload_only_these_names(
        names_which_can_be_saved=["attended"],
        names_which_can_be_offloaded=[],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}
OFFLOADING = {"offload_dot_with_no_batch_dims"}


def scanned(policy):
    wrapped = jax.checkpoint(layer, policy=policy)

    def loss(params, x):
        y, _ = lax.scan(lambda x, p: (wrapped(p, x), None), x, params)
        return jnp.sum(jnp.sin(y))

    return loss


def stacked(params, n=3):
    return jax.tree.map(lambda a: jnp.stack([a * (1 + 0.1 * i) for i in range(n)]), params)


@pytest.mark.parametrize("name", NAMED)
def test_every_policy_in_scan_in_grad_in_jit(params, x, name):
    step = jax.value_and_grad(scanned(NAMED[name]))
    report = zenith.explain(step)(stacked(params), x)
    assert report.counts() == {"attention": 1, "gelu_tanh": 1}, report
    assert all(s.where in ("scan/remat", "remat/scan") for s in report.fused)
    if name in OFFLOADING:  # the CPU backend cannot run it; that the program is made is all that is seen here
        jax.jit(zenith.fuse(step)).trace(stacked(params), x)
        return
    fused, plain = zenith.jit(step), jax.jit(step)
    assert_error_ratio(
        fused(stacked(params), x), plain(stacked(params), x), in_float64(step)(stacked(params), x), floor_ulps=64
    )


def saved_shapes(function, *args):
    """Shapes of the residuals of the layer: what its forward pass hands to its backward pass, without arguments."""
    _, pullback = jax.vjp(function, *args)
    leaves = [leaf for leaf in jax.tree.leaves(pullback) if hasattr(leaf, "shape")]
    given = {id(a) for a in jax.tree.leaves(args)}
    return Counter(leaf.shape for leaf in leaves if id(leaf) not in given and leaf.ndim)


@pytest.mark.parametrize("names", [("attended",), ("hidden",), ("attended", "hidden"), ()])
def test_named_values_and_no_others_are_saved(params, x, names):
    policy = POLICIES.save_only_these_names(*names)
    fused = saved_shapes(jax.checkpoint(zenith.fuse(layer), policy=policy), params, x)
    plain = saved_shapes(jax.checkpoint(layer, policy=policy), params, x)
    assert fused == plain
    assert ((B, T, 3 * WIDTH) in fused) == ("hidden" in names), fused


def test_a_name_on_the_logits_is_kept_and_costs_the_fusion(params, x):
    """The user asked for the logits: a kernel that never has them must not take this site."""

    def named(q, k, v):
        logits = checkpoint_name(jnp.einsum("bthd,bshd->bhts", q, k), "logits")
        return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(logits), v)

    q = x.reshape(B, T, H, D)
    assert "attention" not in zenith.explain(named)(q, q, q).counts()
    text = str(jax.make_jaxpr(zenith.fuse(named))(q, q, q))
    assert "name=logits" in text


@pytest.mark.parametrize("name, forwards", [("everything_saveable", 1), ("nothing_saveable", 2)])
def test_a_policy_decides_how_often_the_kernel_runs(params, x, name, forwards):
    step = jax.grad(lambda p, x: jnp.sum(jnp.sin(jax.checkpoint(layer, policy=NAMED[name])(p, x))))
    found = Counter(re.findall(r"kernel=(\w+)", str(jax.make_jaxpr(zenith.jit(step))(params, x))))
    assert (found["attention_fwd"], found["attention_bwd"]) == (forwards, 1), found


def test_second_order_through_remat(params, x):
    def directional(params, x):
        loss = scanned(POLICIES.dots_saveable)
        return jnp.vdot(jax.grad(loss, 1)(params, x), jnp.cos(x))

    step = jax.grad(directional, 1)
    assert_error_ratio(
        zenith.jit(step)(stacked(params), x),
        jax.jit(step)(stacked(params), x),
        in_float64(step)(stacked(params), x),
        floor_ulps=512,  # second derivatives cancel among their terms
    )


def test_forward_mode_through_remat(params, x):
    function = scanned(POLICIES.nothing_saveable)
    step = jax.jacfwd(lambda s, p, x: function(jax.tree.map(lambda a: a * s, p), x))
    args = (jnp.float32(1), stacked(params), x)
    assert_error_ratio(zenith.jit(step)(*args), jax.jit(step)(*args), in_float64(step)(*args), floor_ulps=512)
