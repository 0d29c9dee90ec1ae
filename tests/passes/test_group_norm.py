"""Group norm as libraries and people write it, and what only looks like it."""

from __future__ import annotations

import functools as ft

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

import zenith_jax as zenith

N, H, W, C, G = 2, 3, 5, 8, 2  # all different: a swapped axis cannot go unnoticed; groups of 4


def image(rng, *, first=False, dtype=np.float32):
    x = rng.normal(size=(N, C, H, W) if first else (N, H, W, C)) + 0.5
    return jnp.asarray(x, dtype)


def vectors(rng, count=2):
    return [jnp.asarray(rng.normal(size=C) + 1, jnp.float32) for _ in range(count)]


def detail(report):
    (site,) = report.fused
    return site.detail


# --- libraries --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, expected",
    [
        (dict(num_groups=G), "2 groups of 4 channels, 15 positions, channels last"),
        (dict(num_groups=G, use_fast_variance=False, use_scale=False), "2 groups of 4 channels"),
        (dict(num_groups=None, group_size=C, use_bias=False), "1 groups of 8 channels"),
        (dict(num_groups=C, use_scale=False, use_bias=False), "8 groups of 1 channels"),
    ],
    ids=["fast variance", "two passes, bias only", "one group, scale only", "no parameters"],
)
def test_nnx_group_norm_is_fused(rng, check_fused, options, expected):
    graph, state = nnx.split(nnx.GroupNorm(C, rngs=nnx.Rngs(0), **options))
    report = check_fused(lambda s, x: nnx.merge(graph, s)(x), state, image(rng), counts={"group_norm": 1})
    assert detail(report).startswith(expected)


def test_linen_group_norm_and_silu_in_bfloat16_are_one_kernel(rng, check_fused):
    model = nn.GroupNorm(G, dtype=jnp.bfloat16)
    x = image(rng, dtype=jnp.bfloat16)
    params = model.init(jax.random.key(0), x)
    function = lambda params, x, model=model: nn.silu(model.apply(params, x))  # noqa: E731
    wide = ft.partial(function, model=nn.GroupNorm(G))
    report = check_fused(function, params, x, counts={"group_norm": 1}, oracle=wide)
    assert detail(report).endswith("channels last, silu")
    assert "bfloat16[2,3,5,8]" in report.fused[0].shapes


@pytest.mark.parametrize("affine", [True, False])
def test_equinox_group_norm_under_vmap_is_fused(rng, check_fused, affine):
    norm = jax.vmap(eqx.nn.GroupNorm(G, C if affine else None, channelwise_affine=affine))
    report = check_fused(lambda x: jax.nn.silu(norm(x)), image(rng, first=True), counts={"group_norm": 1})
    assert detail(report).endswith("channels first, silu")


def test_instance_norm_is_group_norm_of_one_channel_each(rng, check_fused):
    def function(x, scale, bias):
        mean, variance = (f(x, (2, 3), keepdims=True) for f in (jnp.mean, jnp.var))
        return (x - mean) / jnp.sqrt(variance + 1e-5) * scale[:, None, None] + bias[:, None, None]

    report = check_fused(function, image(rng, first=True), *vectors(rng), counts={"group_norm": 1})
    assert detail(report) == "8 groups of 1 channels, 15 positions, channels first"


def in_groups(x, scale, bias):
    """As Haiku writes it: moments of (N, H, W, G, C / G)."""
    grouped = x.reshape(N, H, W, G, -1)
    mean, variance = (f(grouped, (1, 2, 4), keepdims=True) for f in (jnp.mean, jnp.var))
    return ((grouped - mean) * lax.rsqrt(variance + 1e-5)).reshape(x.shape) * scale + bias


def as_pytorch_exports_it(x, scale, bias):
    """An instance norm of (N, G, all the rest) with parameters of ones and zeros, then the affine part."""
    rows = x.reshape(N, G, -1)
    centred = rows - rows.mean(-1, keepdims=True)
    normal = centred / jnp.sqrt(jnp.square(centred).mean(-1, keepdims=True) + 1e-5)
    normal = normal * jnp.ones((G, 1)) + jnp.zeros((G, 1))
    return normal.reshape(x.shape) * scale[:, None, None] + bias[:, None, None]


def repeated(moment):
    return jnp.repeat(moment, C // G, axis=-1)


def by_repeated_moments(x, scale, bias, *, spread=repeated, ddof=0):
    """Flax's form, by hand."""
    grouped = x.reshape(N, H, W, G, -1)
    mean, variance = (spread(f(grouped, (1, 2, 4))) for f in (jnp.mean, ft.partial(jnp.var, ddof=ddof)))
    mul = lax.rsqrt(variance + 1e-5)[:, None, None] * scale
    return (x - mean[:, None, None]) * mul + bias


@pytest.mark.parametrize("function", [in_groups, as_pytorch_exports_it, by_repeated_moments], ids=lambda f: f.__name__)
def test_forms_by_hand_are_fused(rng, check_fused, function):
    first = function is as_pytorch_exports_it
    report = check_fused(function, image(rng, first=first), *vectors(rng), counts={"group_norm": 1})
    assert detail(report) == f"2 groups of 4 channels, 15 positions, channels {'first' if first else 'last'}"


def test_scale_of_each_sample_stays_beside_the_norm(rng, check_fused):
    """As diffusion models condition on time."""

    def function(x, scale, bias, time):
        return in_groups(x, scale, bias) * (1 + time[:, None, None]) + time[:, None, None]

    time = jnp.asarray(rng.normal(size=(N, C)), jnp.float32)
    check_fused(function, image(rng), *vectors(rng), time, counts={"group_norm": 1})


@pytest.mark.parametrize("function", [in_groups, as_pytorch_exports_it, by_repeated_moments], ids=lambda f: f.__name__)
def test_a_batch_of_one_is_a_batch(rng, function, monkeypatch):
    monkeypatch.setattr(f"{__name__}.N", 1)
    args = image(rng, first=function is as_pytorch_exports_it), *vectors(rng)
    report = zenith.explain(function)(*args)
    assert report.counts() == {"group_norm": 1}, report
    np.testing.assert_allclose(zenith.jit(function)(*args), function(*args), rtol=1e-4, atol=1e-5)


def test_silu_of_a_norm_that_is_returned_too_is_apart(rng, check_fused):
    def function(x, scale, bias):
        y = in_groups(x, scale, bias)
        return jax.nn.silu(y), y

    report = check_fused(function, image(rng), *vectors(rng), counts={"group_norm": 1, "silu": 1})
    assert all("silu" not in site.detail for site in report.fused)


def test_strided_groups_are_positions_to_the_kernel(rng, check_fused):
    """Channel c belongs to group c % G: a norm of G channels, whose scale and bias stay beside it."""

    def function(x, scale, bias):
        grouped = x.reshape(N, H, W, -1, G)
        mean, variance = (f(grouped, (1, 2, 3), keepdims=True) for f in (jnp.mean, jnp.var))
        return ((grouped - mean) * lax.rsqrt(variance + 1e-5)).reshape(x.shape) * scale + bias

    report = check_fused(function, image(rng), *vectors(rng), counts={"group_norm": 1})
    assert detail(report) == "2 groups of 1 channels, 60 positions, channels last"


def test_layer_norm_stays_a_layer_norm(rng):
    norm = nnx.LayerNorm(C, rngs=nnx.Rngs(0))
    assert zenith.explain(lambda x: norm(x))(image(rng)).counts() == {"layer_norm": 1}


@pytest.mark.parametrize("operator", ["GroupNormalization", "InstanceNormalization", "of PyTorch"])
def test_onnx_models_norms_are_fused(rng, check_fused, operator):
    onnx = pytest.importorskip("onnx", reason="builds the model")
    helper, numpy_helper = onnx.helper, onnx.numpy_helper
    arrays = dict(s=np.linspace(1, 2, C), b=np.linspace(0, 1, C), ones=np.ones(G), zeros=np.zeros(G))
    arrays |= dict(s3=arrays["s"][:, None, None], b3=arrays["b"][:, None, None])
    constants = [numpy_helper.from_array(v.astype(np.float32), k) for k, v in arrays.items()]
    constants += [
        numpy_helper.from_array(np.array(v, np.int64), k) for k, v in dict(rows=[0, G, -1], image=[N, C, H, W]).items()
    ]
    nodes = {
        "GroupNormalization": [helper.make_node("GroupNormalization", ["x", "s", "b"], ["y"], num_groups=G)],
        "InstanceNormalization": [helper.make_node("InstanceNormalization", ["x", "s", "b"], ["y"])],
        "of PyTorch": [
            helper.make_node("Reshape", ["x", "rows"], ["r"]),
            helper.make_node("InstanceNormalization", ["r", "ones", "zeros"], ["n"]),
            helper.make_node("Reshape", ["n", "image"], ["i"]),
            helper.make_node("Mul", ["i", "s3"], ["m"]),
            helper.make_node("Add", ["m", "b3"], ["y"]),
        ],
    }[operator]
    x, y = (helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, (N, C, H, W)) for name in "xy")
    graph = helper.make_graph(nodes, "norm", [x], [y], constants)
    model = zenith.onnx.load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)]))
    report = check_fused(lambda x: model.apply(model.params, x), image(rng, first=True), counts={"group_norm": 1})
    groups = C if operator == "InstanceNormalization" else G
    assert detail(report).startswith(f"{groups} groups of {C // groups} channels, 15 positions, channels first")


# --- near misses ------------------------------------------------------------------------------------------------------


def another_mean(x, scale, bias):
    grouped = x.reshape(N, H, W, G, -1)
    mean, variance = grouped.mean((1, 2), keepdims=True), grouped.var((1, 2, 4), keepdims=True)
    return ((grouped - mean) * lax.rsqrt(variance + 1e-5)).reshape(x.shape) * scale + bias


def eps_outside(x, scale, bias):
    grouped = x.reshape(N, H, W, G, -1)
    mean, variance = (f(grouped, (1, 2, 4), keepdims=True) for f in (jnp.mean, jnp.var))
    return ((grouped - mean) / (jnp.sqrt(variance) + 1e-5)).reshape(x.shape) * scale + bias


def of_a_permutation(x, scale, bias):
    order = np.random.default_rng(0).permutation(C)
    grouped = x[..., order].reshape(N, H, W, G, -1)
    mean, variance = (f(grouped, (1, 2, 4), keepdims=True) for f in (jnp.mean, jnp.var))
    return ((x.reshape(grouped.shape) - mean) * lax.rsqrt(variance + 1e-5)).reshape(x.shape) * scale + bias


def without_mean(x, scale, bias):
    grouped = x.reshape(N, H, W, G, -1)
    square = jnp.square(grouped).mean((1, 2, 4), keepdims=True)
    return (grouped * lax.rsqrt(square + 1e-5)).reshape(x.shape) * scale + bias


def with_moments(x, scale, bias):
    y = x.reshape(N, H, W, G, -1)
    rstd = lax.rsqrt(y.var((1, 2, 4), keepdims=True) + 1e-5)
    return ((y - y.mean((1, 2, 4), keepdims=True)) * rstd).reshape(x.shape) * scale + bias, rstd


def doubled(x, scale, bias):
    y = x.reshape(N, H, W, G, -1)
    variance = y.var((1, 2, 4), keepdims=True)
    return ((y - y.mean((1, 2, 4), keepdims=True)) * (2 * lax.rsqrt(variance + 1e-5))).reshape(x.shape) * scale + bias


def masked(x, scale, bias):
    mask = jnp.arange(W)[:, None] < 3
    return nnx.GroupNorm(C, num_groups=G, rngs=nnx.Rngs(0))(x, mask=jnp.broadcast_to(mask, x.shape)) * scale + bias


def tiled(moment, times):
    """jnp.tile along the last axis, written out."""
    return jnp.broadcast_to(moment[:, None], (N, times, moment.shape[1])).reshape(N, -1)


interleaved = ft.partial(by_repeated_moments, spread=lambda m: tiled(m, C // G))
sample_variance = ft.partial(by_repeated_moments, ddof=1)


def batch_norm_in_training(x, scale, bias):
    mean, variance = (f(x, (0, 1, 2)) for f in (jnp.mean, jnp.var))
    return (x - mean) * lax.rsqrt(variance + 1e-5) * scale + bias


NEAR_MISSES = {
    "variance of N - 1": (sample_variance, by_repeated_moments, "the sum over 60 elements is divided by 59"),
    "groups mixed up": (interleaved, by_repeated_moments, "not its mean over a group"),
    "mean over other axes": (another_mean, in_groups, "mean and variance run over different axes"),
    "eps outside of the root": (eps_outside, in_groups, None),
    "moments of permuted channels": (of_a_permutation, in_groups, "not its mean over a group"),
    "batch norm in training": (batch_norm_in_training, in_groups, "as those of a batch norm in training"),
    "no mean": (without_mean, in_groups, None),
    "moments returned": (with_moments, in_groups, "1/sqrt(variance + eps) is used 2 times"),
    "doubled": (doubled, in_groups, "the norm is scaled by the constant 2.0"),
    "masked": (masked, in_groups, None),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_miss_is_refused_and_its_twin_is_not(rng, check_refused, name):
    miss, twin, reason = NEAR_MISSES[name]
    args = image(rng), *vectors(rng)
    check_refused(miss, *args, op="group_norm", reason=reason)
    assert zenith.explain(twin)(*args).counts() == {"group_norm": 1}


def test_groups_as_many_as_their_channels_are_told_apart(rng, check_refused):
    """C = G * G: the sizes of both halves of the axis agree, and only which half is meant differs."""

    def function(x, spread):
        grouped = x.reshape(N, W, 3, 3)
        mean, variance = (spread(f(grouped, (1, 3)))[:, None] for f in (jnp.mean, jnp.var))
        return (x - mean) * lax.rsqrt(variance + 1e-5)

    x = jnp.asarray(rng.normal(size=(N, W, 9)), jnp.float32)
    miss, twin = (ft.partial(function, spread=f) for f in (lambda m: tiled(m, 3), lambda m: jnp.repeat(m, 3, 1)))
    check_refused(miss, x, op="group_norm", reason="not its mean over a group")
    assert zenith.explain(twin)(x).counts() == {"group_norm": 1}


@pytest.mark.parametrize("silu", [False, True])
def test_a_gpu_takes_large_images_and_their_gradients_with_silu(silu):
    def function(x):
        grouped = x.astype(jnp.float32).reshape(8, 64, 64, 32, -1)
        mean, variance = (f(grouped, (1, 2, 4), keepdims=True) for f in (jnp.mean, jnp.var))
        y = ((grouped - mean) * lax.rsqrt(variance + 1e-5)).reshape(x.shape).astype(x.dtype)
        return jax.nn.silu(y) if silu else y

    x = jax.ShapeDtypeStruct((8, 64, 64, 320), jnp.bfloat16)
    with zenith.configured(platform="cuda", use_cost=True):
        assert zenith.explain(function)(x).counts()["group_norm"] == 1
        report = zenith.explain(jax.value_and_grad(lambda x: function(x).sum().astype(jnp.float32)))(x)
    assert report.counts().get("group_norm", 0) == silu
    assert silu or any("153 us" in s.reason for s in report.refused)


@pytest.mark.parametrize(
    "shape, dtype, first, reason",
    [
        ((8, 32, 32, 640), jnp.bfloat16, False, "are not measured on a GPU without the host's part"),
        ((8, 320, 64, 64), jnp.bfloat16, True, "on a GPU group norm has a kernel for channels last only"),
        ((1, 64, 4, 6000), jnp.bfloat16, False, "a group of 3000 channels is wider than a block of threads"),
    ],
    ids=["channels last", "channels first", "wide groups"],
)
def test_what_a_gpu_leaves_to_xla(shape, dtype, first, reason):
    def function(x):
        grouped = x.astype(jnp.float32).reshape((shape[0], 2, -1, *shape[2:]) if first else (*shape[:-1], 2, -1))
        axes = (2, 3, 4) if first else (1, 2, 4)
        mean, variance = (f(grouped, axes, keepdims=True) for f in (jnp.mean, jnp.var))
        scale = jnp.arange(float(shape[1 if first else -1])).reshape((-1, 1, 1) if first else -1)
        return (((grouped - mean) * lax.rsqrt(variance + 1e-5)).reshape(shape) * scale).astype(dtype)

    with zenith.configured(platform="cuda", use_cost=True):
        report = zenith.explain(function)(jnp.zeros(shape, dtype))
    (site,) = report.sites
    assert site.op == "group_norm" and not site.fused and reason in site.reason
