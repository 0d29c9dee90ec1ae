"""Dimensions that must be whole: said in the report, gathered by the partitioner where they are sharded, and nothing
gathered where batch and heads are."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import zenith_jax as zenith

B, T, H, D = 8, 6, 2, 4
each_kind = pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])


def mesh_of(kind):
    n = min(jax.device_count() // 2, 4)
    if n < 2:
        pytest.skip(f"needs 4 devices, {jax.default_backend()} has {jax.device_count()}")
    return jax.make_mesh((n, 2), ("x", "y"), axis_types=(kind, kind), devices=jax.devices()[: 2 * n])


def attend(q, k, v):
    return jax.nn.dot_product_attention(q, k, v, is_causal=True)


def placed(rng, mesh, *specs):
    shape = (B, T, H, D)
    return [jax.device_put(jnp.asarray(rng.normal(size=shape), jnp.float32), NamedSharding(mesh, s)) for s in specs]


def check(function, args, mesh):
    """Values and gradients as on one device; returns the report and whether anything is gathered, each way."""
    gradient = jax.grad(lambda *a: jnp.sum(function(*a) ** 2), (0, 1, 2))
    alone = [jax.device_put(np.asarray(a), jax.devices()[0]) for a in args]
    both = lambda *a: (function(*a), gradient(*a))  # noqa: E731
    expected = jax.jit(both)(*alone)
    with jax.set_mesh(mesh):
        report = zenith.explain(function)(*args)
        gathers = []
        for f in (function, both):
            compiled = zenith.jit(f).lower(*args).compile()
            gathers.append(bool(re.search("all-gather|all-to-all|collective-permute", compiled.as_text())))
        found = compiled(*args)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    assert report.counts() == {"attention": 1}
    return report, gathers


@each_kind
def test_batch_and_heads_stay_sharded(rng, kind):
    mesh = mesh_of(kind)
    report, gathers = check(attend, placed(rng, mesh, *(P("x", None, "y"),) * 3), mesh)
    assert gathers == [False, False]
    (site,) = report.sites
    assert site.whole == ", ".join([f"float32[.,{T},.,{D}]"] * 3)
    assert site.gathered == ""
    assert "gathers" not in str(report)


def test_a_sharded_dimension_that_must_be_whole_is_gathered_and_reported(rng):
    mesh = mesh_of(AxisType.Auto)
    report, gathers = check(attend, placed(rng, mesh, P("x"), P("x", "y"), P("x")), mesh)
    assert gathers == [True, True]
    line = f"dimension 1 of float32[{B},{T},{H},{D}] is sharded over 'y' and must be whole: the partitioner gathers it"
    assert report.sites[0].gathered == line
    assert f"but {line}" in str(report)
    assert line.replace("'", "&#x27;") in report.html()
    assert zenith.explain(attend)(*placed(rng, mesh, *(P("x"),) * 3)).sites[0].gathered == ""


def test_structs_and_views_show_their_sharding(rng):
    mesh = mesh_of(AxisType.Auto)
    struct = jax.ShapeDtypeStruct((T, 64), jnp.float32, sharding=NamedSharding(mesh, P(None, ("x", "y"))))
    report = zenith.explain(lambda x: jax.nn.softmax(x.reshape(1, T, 64)))(struct)
    assert report.sites[0].gathered.startswith(f"dimension 1 of float32[{T},64] is sharded over ('x', 'y')")
    # What is computed may be sharded in any way.
    assert zenith.explain(lambda x: jax.nn.softmax(x * 2))(struct).sites[0].gathered == ""


def test_explicit_axes_are_known_inside_of_a_gradient(rng):
    mesh = mesh_of(AxisType.Explicit)

    def function(x):
        return jnp.sum(jax.nn.softmax(jnp.sin(x)) ** 2 * x)

    value = jnp.asarray(rng.normal(size=(8, T, 64)), jnp.float32)
    expected = jax.jit(jax.grad(function))(value)
    with jax.set_mesh(mesh):
        x = jax.device_put(value, NamedSharding(mesh, P("x", None, "y")))
        report = zenith.explain(jax.grad(function))(x)
        # A kernel's results and cotangents get the sharding back that the program gives them.
        found = zenith.jit(jax.grad(function))(x)
    assert found.sharding.spec == x.sharding.spec
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert report.counts() == {"softmax": 1}
    assert report.sites[0].gathered.startswith(f"dimension 2 of float32[8,{T},64] is sharded over 'y'")


def test_a_product_of_explicit_axes_is_xlas_and_its_activation_a_site(rng):
    mesh = mesh_of(AxisType.Explicit)
    x, w, bias = (jnp.asarray(rng.normal(size=s) / 16, jnp.float32) for s in ((8, 4, 256), (256, 256), (256,)))

    def function(x, w, bias):
        return jnp.sum(jax.nn.gelu(x @ w + bias) ** 2)

    gradient = jax.grad(function, (0, 1, 2))
    assert zenith.explain(function)(x, w, bias).counts() == {"linear": 1}
    with jax.set_mesh(mesh):
        args = [jax.device_put(a, NamedSharding(mesh, s)) for a, s in ((x, P("x")), (w, P(None, "y")), (bias, P("y")))]
        assert zenith.explain(gradient)(*args).counts() == {"gelu_tanh": 1}
        found = zenith.jit(gradient)(*args)
    for a, b in zip(found, jax.jit(gradient)(x, w, bias), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_an_op_that_cannot_be_written_for_a_sharding_loses_its_site_alone(rng, monkeypatch):
    from zenith_jax.passes.match import softmax

    def emit(*_, **__):
        raise ValueError("This reshape is not supported.\nMore of it.")

    mesh = mesh_of(AxisType.Explicit)
    monkeypatch.setattr(softmax, "emit", emit)
    with jax.set_mesh(mesh):
        x = jax.device_put(jnp.asarray(rng.normal(size=(8, T, 64)), jnp.float32), NamedSharding(mesh, P("x")))
        report = zenith.explain(lambda x: jax.nn.gelu(jax.nn.softmax(x)))(x)
    assert report.counts() == {"gelu_tanh": 1}
    (refused,) = report.refused
    assert refused.reason == "the op cannot be written for these operands: This reshape is not supported."
