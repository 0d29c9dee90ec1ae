"""Convolutions of few channels a group, in every numbering of dimensions; and those that are left to XLA."""

from __future__ import annotations

import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from numerics import assert_error_ratio, in_float64

import zenith_jax as zenith

GROUPS = 6


def normal(rng, *shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


def conv(x, w, *, strides=(1, 1), padding="SAME", groups=GROUPS, **options):
    return lax.conv_general_dilated(
        x, w, strides, padding, feature_group_count=groups, dimension_numbers=("NHWC", "HWIO", "NHWC"), **options
    )


def check_value(function, *args):
    report = zenith.explain(function)(*args)
    assert report.counts() == {"grouped_conv": 1}, str(report)
    fused, plain = jax.jit(zenith.fuse(function))(*args), function(*args)
    assert_error_ratio(fused, plain, in_float64(function)(*args), floor_ulps=16)


@pytest.mark.parametrize(
    "options",
    [
        dict(strides=(2, 3), padding=((0, 2), (1, 0))),
        dict(rhs_dilation=(2, 1), padding="VALID"),
        dict(padding=((-1, 1), (0, -2)), precision="highest"),
    ],
    ids=str,
)
def test_depthwise(check_fused, rng, options):
    x, w = normal(rng, 2, 7, 8, GROUPS), normal(rng, 3, 2, 1, GROUPS)
    check_fused(lambda x, w: conv(x, w, **options), x, w, counts={"grouped_conv": 1}, floor_ulps=32)


@pytest.mark.parametrize("inputs, outputs", [(1, 2), (2, 1), (2, 3)])
@pytest.mark.parametrize("spec", ["NCHW OIHW NCHW", "NHWC HWIO NHWC", "HWNC IHOW CWNH", "CNWH OHIW WHCN"])
def test_groups_of_several_channels_in_any_layout(rng, inputs, outputs, spec):
    x_spec, w_spec, _ = numbers = tuple(spec.split())
    sizes = dict(N=2, C=inputs * GROUPS, H=5, W=4)
    filters = dict(O=outputs * GROUPS, I=inputs, H=3, W=2)
    x, w = normal(rng, *(sizes[c] for c in x_spec)), normal(rng, *(filters[c] for c in w_spec))

    def function(x, w):
        return lax.conv_general_dilated(x, w, (2, 1), "SAME", dimension_numbers=numbers, feature_group_count=GROUPS)

    check_value(function, x, w)


def test_libraries(rng):
    x = normal(rng, 2, 5, 5, 8)
    graph, state = nnx.split(nnx.Conv(8, 8, (3, 3), feature_group_count=8, rngs=nnx.Rngs(0)))
    check_value(lambda s, x: nnx.merge(graph, s)(x), state, x)

    causal = eqx.nn.Conv1d(4, 8, 3, padding=((2, 0),), groups=4, key=jax.random.key(0))
    params, static = eqx.partition(causal, eqx.is_array)
    mapped = lambda p, x: jax.vmap(eqx.combine(p, static))(x)  # noqa: E731
    check_value(mapped, params, normal(rng, 2, 4, 7))


def test_filters_of_each_example_are_groups(rng):
    """vmap over both makes a group of each example."""
    x, w = normal(rng, 5, 1, 4, 4, 2), normal(rng, 5, 3, 3, 2, 3)
    check_value(jax.vmap(lambda x, w: conv(x, w, groups=1)), x, w)


def test_second_derivatives(rng):
    x, w = normal(rng, 1, 4, 4, 2), normal(rng, 3, 3, 1, 2)
    loss = lambda f: lambda w: jnp.sum(jnp.sin(f(x, w)))  # noqa: E731
    plain = lambda x, w: conv(x, w, groups=2)  # noqa: E731
    hessians = [jax.jit(jax.hessian(loss(f)))(w) for f in (zenith.fuse(plain), plain)]
    np.testing.assert_allclose(*hessians, rtol=1e-5, atol=1e-5)


def test_batch_stays_sharded(rng):
    mesh = jax.make_mesh((2,), ("b",), axis_types=(jax.sharding.AxisType.Auto,))
    over = jax.sharding.NamedSharding(mesh, jax.P("b"))
    x, w = jax.device_put(normal(rng, 4, 5, 5, GROUPS), over), normal(rng, 3, 3, 1, GROUPS)
    compiled = zenith.jit(conv).lower(x, w).compile()
    assert "all-gather" not in compiled.as_text()
    np.testing.assert_allclose(compiled(x, w), conv(x, w), rtol=1e-5, atol=1e-5)


MISSES = {
    "many channels of a group": (
        lambda x, w: conv(x, jnp.tile(w, (1, 1, 9, 1)), groups=1),
        None,
    ),
    "channels last, six a group": (
        lambda x, w: conv(jnp.tile(x, (1, 1, 1, 6)), jnp.tile(w, (1, 1, 6, 1))),
        "groups of 6 channels",
    ),
    "large filters": (lambda x, w: conv(x, jnp.tile(w, (3, 4, 1, 1))), "filters of 108 elements"),
    "transposed": (lambda x, w: conv(x, w, lhs_dilation=(2, 1), padding=((1, 1),) * 2), "transposed"),
    "groups of the batch": (
        lambda x, w: lax.conv_general_dilated(
            x, w, (1, 1), "SAME", batch_group_count=GROUPS, dimension_numbers=("CHWN", "HWIO", "NHWC")
        ),
        None,
    ),
    "bfloat16": (lambda x, w: conv(x.astype(jnp.bfloat16), w.astype(jnp.bfloat16)), "float32"),
    "wider result": (
        lambda x, w: conv(x.astype(jnp.bfloat16), w.astype(jnp.bfloat16), preferred_element_type=jnp.float32),
        "different dtypes",
    ),
    "empty": (lambda x, w: conv(x[:, :1], w, padding="VALID"), "empty"),
}


@pytest.mark.usefixtures("without_conv")  # one group is an image's convolution
@pytest.mark.parametrize("name", MISSES)
def test_left_to_xla(rng, name):
    function, reason = MISSES[name]
    x, w = normal(rng, 6, 4, 4, GROUPS), normal(rng, 3, 3, 1, GROUPS)
    if name == "many channels of a group":
        x = normal(rng, 6, 4, 4, 9)
    if name == "groups of the batch":
        w = normal(rng, 3, 3, 4, GROUPS)
        x = normal(rng, 4, 4, 4, GROUPS)
    report = zenith.explain(function)(x, w)
    assert not report.fused, str(report)
    assert (not report.sites) if reason is None else any(reason in s.reason for s in report.refused), str(report)


def test_a_gpu_keeps_its_convolution(rng):
    from zenith_jax.ir.graph import Graph
    from zenith_jax.passes.choose import declined
    from zenith_jax.passes.match import Match, grouped_conv

    graph = Graph.of(jax.make_jaxpr(conv)(normal(rng, 1, 4, 4, GROUPS), normal(rng, 3, 3, 1, GROUPS)))
    (found,) = itertools.filterfalse(lambda m: m is None, (grouped_conv.match(graph, e) for e in graph.eqns))
    assert isinstance(found, Match)
    assert "cuDNN" in str(declined(found, "cuda", differentiated=False, use_cost=True))
    assert declined(found, "cpu", differentiated=False, use_cost=True) is None
