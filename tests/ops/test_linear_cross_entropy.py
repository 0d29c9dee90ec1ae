"""linear_cross_entropy where it differs from the ops of one kernel: chunks, reductions, sharding, memory."""

from __future__ import annotations

import functools as ft
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from formulas import cross_entropy
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from numerics import assert_error_ratio, in_float64

from zenith_jax.errors import DTypeError, ShapeError
from zenith_jax.ops import linear_cross_entropy

B, T, D, V = 4, 7, 6, 19


def inputs(dtype=jnp.float32, w_dtype=None, shape=(B, T)):
    rng = np.random.default_rng(20260109)
    x, w, bias = (jnp.asarray(rng.normal(size=s), dtype) for s in ((*shape, D), (D, V), (V,)))
    weights = jnp.asarray(rng.random(shape), jnp.float32)
    return x, w.astype(w_dtype or dtype), bias, jnp.asarray(rng.integers(V, size=shape), jnp.int32), weights


def formula(x, w, bias, labels, weights, *, reduction="mean", ignore=None, **options):
    w = w.astype(x.dtype)
    loss = cross_entropy(
        x @ w + bias, jnp.where(labels == ignore, 0, labels) if ignore is not None else labels, **options
    )
    kept = weights * (labels != ignore) if ignore is not None else weights
    if reduction == "none":
        return loss * kept
    return (loss * kept).sum() / (kept.sum() if reduction == "mean" else 1)


def ours(x, w, bias, labels, weights, *, ignore=None, **options):
    return linear_cross_entropy(x, w, labels, bias=bias, weights=weights, ignore_index=ignore, **options)


def both(function):
    """Value and gradients of a nonlinear function of it."""

    def loss(x, w, bias, labels, weights):
        out = function(x, w, bias, labels, weights)
        return jnp.sum(out * jnp.cos(jnp.arange(out.size, dtype=out.dtype)).reshape(out.shape)) ** 2

    return jax.value_and_grad(loss, (0, 1, 2, 4))


OPTIONS = {
    "mean of 3 chunks": dict(chunks=3),
    "sum, smoothing, z-loss, ignored": dict(reduction="sum", label_smoothing=0.1, z_loss=1e-2, ignore=3, chunks=2),
    "none, padded chunks": dict(reduction="none", chunks=4, z_loss=1e-2),
    "by default": {},
}


@pytest.mark.parametrize(
    ("options", "dtypes"),
    [
        ("mean of 3 chunks", (jnp.float32, jnp.float32)),
        ("mean of 3 chunks", (jnp.bfloat16, None)),
        ("mean of 3 chunks", (jnp.bfloat16, jnp.float32)),
        ("sum, smoothing, z-loss, ignored", (jnp.float32, None)),
        ("none, padded chunks", (jnp.float32, None)),
        ("by default", (jnp.bfloat16, None)),
    ],
    ids=str,
)
def test_value_and_gradients(options, dtypes, monkeypatch):
    if dtypes[1] is None:
        monkeypatch.setattr(jax, "device_count", lambda: 1)  # chunks follow each other then
    options, args = OPTIONS[options], inputs(*dtypes)
    fused, plain = (
        both(ft.partial(ours, **options)),
        both(ft.partial(formula, **{k: v for k, v in options.items() if k != "chunks"})),
    )
    assert_error_ratio(jax.jit(fused)(*args), jax.jit(plain)(*args), in_float64(plain)(*args), floor_ulps=64.0)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_transformations(reduction):
    """Forward over reverse, second order, a batch of inputs and of weights, remat."""
    args = inputs(shape=(3, 4))
    x, w = args[:2]
    options = dict(reduction=reduction, z_loss=1e-2)
    fused, plain = ft.partial(ours, **options, chunks=2), ft.partial(formula, **options)

    def summed(f):
        return lambda x, w: jnp.sum(f(x, w, *args[2:]) ** 2)

    transforms = {
        "jvp": lambda f: jax.jvp(summed(f), (x, w), (x + 1, w))[1],
        "hvp": lambda f: jax.grad(lambda x, w: jnp.vdot(jax.grad(summed(f), 1)(x, w), jnp.cos(w)), (0, 1))(x, w),
        "vmap": lambda f: jax.vmap(jax.grad(summed(f), (0, 1)), (0, None))(jnp.stack([x, 2 * x]), w),
        "vmap of weights": lambda f: jax.vmap(jax.grad(summed(f)), (None, 0))(x, jnp.stack([w, 2 * w])),
        "remat": lambda f: jax.grad(jax.checkpoint(summed(f)), (0, 1))(x, w),
    }
    every = lambda f: jax.jit(lambda: {name: t(f) for name, t in transforms.items()})()  # noqa: E731
    with jax.default_matmul_precision("highest"):
        found, expected = every(fused), every(plain)
    for name in transforms:
        for a, b in zip(jax.tree.leaves(found[name]), jax.tree.leaves(expected[name]), strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5 * float(jnp.abs(b).max()), err_msg=name)


def test_only_what_is_differentiated_is_computed():
    x, w, bias, labels, weights = inputs()
    count = lambda f, *a: len(re.findall("= dot_general", str(jax.make_jaxpr(f)(*a))))  # noqa: E731
    loss = lambda x, w: ours(x, w, bias, labels, weights, chunks=2)  # noqa: E731
    assert [count(f, x, w) for f in (loss, jax.grad(loss), jax.grad(loss, 1), jax.grad(loss, (0, 1)))] == [1, 2, 2, 3]


def test_memory_is_a_chunk_of_logits():
    x, w = jax.ShapeDtypeStruct((4096, 16), jnp.float32), jax.ShapeDtypeStruct((16, 4096), jnp.float32)
    labels = jax.ShapeDtypeStruct((4096,), jnp.int32)

    def extra(function):
        return jax.jit(function).lower(x, w, labels).compile().memory_analysis().temp_size_in_bytes

    logits = 4 * 4096 * 4096
    assert extra(linear_cross_entropy) < logits / 7
    assert extra(jax.grad(ft.partial(linear_cross_entropy, chunks=32), (0, 1))) < logits / 10


two_devices = pytest.mark.skipif(jax.device_count() < 2, reason=f"needs 2 devices, there is {jax.device_count()}")


@two_devices
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("shape", [(4, T), (16,)], ids=str)
def test_sharded_tokens_stay_sharded(kind, shape):
    mesh = jax.make_mesh((2,), ("x",), axis_types=(kind,), devices=jax.devices()[:2])
    args = inputs(shape=shape)
    function = both(ft.partial(ours, chunks=2))
    expected = jax.jit(function)(*args)
    with jax.set_mesh(mesh):
        placed = [jax.device_put(a, NamedSharding(mesh, P("x") if a.shape[0] == shape[0] else P())) for a in args]
        compiled = jax.jit(function).lower(*placed).compile()
        found = compiled(*placed)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    assert not re.search("all-gather|all-to-all|collective-permute", compiled.as_text())


@two_devices
def test_inside_shard_map():
    """Each device's part of the gradient of shared weights is summed by the transposition, once."""
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    x, w, bias, labels, weights = inputs()

    def local(x, labels, weights, w, bias):
        return jax.lax.psum(ours(x, w, bias, labels, weights, reduction="sum", chunks=2), "x")

    mapped = jax.shard_map(local, mesh=mesh, in_specs=(P("x"), P("x"), P("x"), P(), P()), out_specs=P())
    found = jax.jit(jax.grad(lambda w, bias: mapped(x, labels, weights, w, bias), (0, 1)))(w, bias)
    expected = jax.grad(lambda w, bias: ours(x, w, bias, labels, weights, reduction="sum"), (0, 1))(w, bias)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_errors_say_what_to_do():
    x, w, bias, labels, _ = inputs()
    with pytest.raises(ShapeError, match=r"of an embedding table of shape \(v, d\) pass its transpose"):
        linear_cross_entropy(x, w.T, labels)
    with pytest.raises(ShapeError, match=r"bias must have shape \(19,\)"):
        linear_cross_entropy(x, w, labels, bias=bias[:3])
    with pytest.raises(DTypeError, match="labels must be integers, got float32"):
        linear_cross_entropy(x, w, labels.astype(jnp.float32))
    with pytest.raises(ValueError, match="must be 'mean', 'sum' or 'none', got 'max'"):
        linear_cross_entropy(x, w, labels, reduction="max")
