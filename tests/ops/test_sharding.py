"""Ops on arrays sharded over 2 and 4 CPU devices: right values, and no gathering of what is sharded by batch.

Operands differ along every dimension, parameters too: a device that reads another one's part, or only the first part
of a replicated parameter, cannot give right values. The HLO after partitioning holds no collective but the all-reduce
that sums gradients of parameters shared by devices.
"""

from __future__ import annotations

import functools as ft
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from formulas import (
    add_layer_norm,
    add_rms_norm,
    attention,
    cross_entropy,
    gated,
    gated_by_the_second_half,
    gelu,
    group_norm,
    layer_norm,
    linear,
    rms_norm,
    silu,
    softmax,
)
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from numerics import assert_error_ratio, in_float64

from zenith_jax import ops

B, T, S, H, D, E = 4, 6, 10, 4, 8, 12
SEED = 20260108
MESHES = {"2 devices": (2, 1), "4 devices": (4, 1), "2 x 2 devices": (2, 2)}

each_mesh = pytest.mark.parametrize("shape", MESHES.values(), ids=MESHES)


def mesh_of(shape: tuple[int, int], kind: AxisType = AxisType.Auto) -> Any:
    if jax.device_count() < shape[0] * shape[1]:
        pytest.skip(f"needs {shape[0] * shape[1]} devices, {jax.default_backend()} has {jax.device_count()}")
    return jax.make_mesh(shape, ("x", "y"), axis_types=(kind, kind), devices=jax.devices()[: shape[0] * shape[1]])


def normal(*shape: int) -> jax.Array:
    rng = np.random.default_rng([SEED, *shape])
    return jnp.asarray(rng.normal(size=shape) + np.arange(shape[-1]) / shape[-1], jnp.float32)


def mask(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng([SEED, *shape]).random(shape) < 0.7)


def collectives(compiled: Any) -> set[str]:
    names = "all-gather all-to-all collective-permute collective-broadcast reduce-scatter all-reduce".split()
    text = compiled.as_text()
    return {name for name in names if re.search(rf"= \S+ {name}(-start)?\(|\) {name}(-start)?\(", text)}


def value_and_gradients(function: Callable, args: Sequence[Any]) -> Callable:
    floats = tuple(i for i, a in enumerate(args) if jnp.issubdtype(a.dtype, jnp.floating))

    def both(*args: Any) -> Any:
        def loss(*values: Any) -> tuple[Any, Any]:
            full = list(args)
            for i, value in zip(floats, values, strict=True):
                full[i] = value
            results = function(*full)
            # Weights that differ everywhere, made from an iota so that they are sharded like the results.
            weighted = [
                r * jnp.cos(sum((0.3 + d) * lax.broadcasted_iota(r.dtype, r.shape, d) for d in range(r.ndim)))
                for r in jax.tree.leaves(results)
            ]
            return sum(jnp.sum(w) for w in weighted), results

        (_, results), gradients = jax.value_and_grad(loss, tuple(range(len(floats))), has_aux=True)(
            *(args[i] for i in floats)
        )
        return results, gradients

    return both


def check(function, formula, args, specs, mesh, *, reduces: bool):
    """Forward: no collective at all. Backward: none but all-reduce, and that only where `reduces`."""
    if AxisType.Explicit in mesh.axis_types:
        with jax.set_mesh(mesh):
            return _check(function, formula, args, specs, mesh, reduces=reduces)
    return _check(function, formula, args, specs, mesh, reduces=reduces)


def _check(function, formula, args, specs, mesh, *, reduces: bool):
    placed = [jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip(args, specs, strict=True)]
    forward = jax.jit(function).lower(*placed).compile()
    assert not collectives(forward), collectives(forward)
    assert "zenith_" in forward.as_text(), "the native kernel did not run"
    for result in jax.tree.leaves(forward(*placed)):
        assert not result.sharding.is_fully_replicated
    both = value_and_gradients(function, args)

    def gradients_only(*args):
        return both(*args)[1]

    backward = jax.jit(gradients_only).lower(*placed).compile()
    assert collectives(backward) <= ({"all-reduce"} if reduces else set()), collectives(backward)
    plain = value_and_gradients(formula, args)
    assert_error_ratio(jax.jit(both)(*placed), jax.jit(plain)(*args), in_float64(plain)(*args), floor_ulps=16)


# --- norms, softmax, activations --------------------------------------------------------------------------------------

ROWS = {
    "layer_norm": (ops.layer_norm, layer_norm, 1, 2),
    "rms_norm": (ops.rms_norm, rms_norm, 1, 1),
    "add_layer_norm": (ops.add_layer_norm, add_layer_norm, 2, 2),
    "add_rms_norm": (ops.add_rms_norm, add_rms_norm, 2, 1),
    "softmax": (ops.softmax, softmax, 1, 0),
    "gelu": (ops.gelu, gelu, 1, 0),
    "silu": (ops.silu, silu, 1, 0),
    "gated_activation": (ops.gated_activation, gated, 2, 0),
    "gated_activation_of_halves": (
        ft.partial(ops.gated_activation_of_halves, activation="gelu_erf", gate_half=1),
        gated_by_the_second_half,
        1,
        0,
    ),
}
ROW_SPECS = {"batch": P("x"), "sequence": P(None, "x"), "batch and sequence": P("x", "y")}


@each_mesh
@pytest.mark.parametrize("spec", ROW_SPECS.values(), ids=ROW_SPECS)
@pytest.mark.parametrize("op", ROWS)
def test_rows_stay_on_their_device(op, spec, shape):
    function, formula, arrays, parameters = ROWS[op]
    args = [normal(8, 16, 24) * (i + 1) for i in range(arrays)] + [normal(24) + i for i in range(parameters)]
    check(function, formula, args, [spec] * arrays + [P()] * parameters, mesh_of(shape), reduces=parameters > 0)


# Few rows a device: sums over groups of rows, as the cotangents of parameters are made, must not cross devices.
FEW = {"rows": ((12, 24), P("x")), "sequence": ((2, 12, 24), P(None, "x"))}


@pytest.mark.parametrize("shape, spec", FEW.values(), ids=FEW)
@pytest.mark.parametrize("op", [op for op in ROWS if op.endswith("norm")])
def test_few_rows_stay_on_their_device(op, shape, spec):
    function, formula, arrays, parameters = ROWS[op]
    args = [normal(*shape) * (i + 1) for i in range(arrays)] + [normal(24) + i for i in range(parameters)]
    check(function, formula, args, [spec] * arrays + [P()] * parameters, mesh_of((4, 1)), reduces=True)


@pytest.mark.parametrize("op", ROWS)
def test_rows_of_explicit_axes_stay_on_their_device(op):
    function, formula, arrays, parameters = ROWS[op]
    args = [normal(2, 12, 24) * (i + 1) for i in range(arrays)] + [normal(24) + i for i in range(parameters)]
    specs = [P(None, ("x", "y"))] * arrays + [P()] * parameters
    check(function, formula, args, specs, mesh_of((2, 2), AxisType.Explicit), reduces=parameters > 0)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_rows_of_a_cross_entropy_stay_on_their_device(kind):
    labels = jnp.asarray(np.random.default_rng(SEED).integers(24, size=(2, 12)), jnp.int32)
    args, specs = [normal(2, 12, 24), labels], [P(None, "x")] * 2
    check(ops.cross_entropy, cross_entropy, args, specs, mesh_of((4, 1), kind), reduces=False)


@pytest.mark.parametrize("op", ROWS)
def test_sharded_features_are_right(op):
    """A kernel needs whole rows: these are gathered, at a cost, and the result is right."""
    function, formula, arrays, parameters = ROWS[op]
    args = [normal(4, 6, 24) * (i + 1) for i in range(arrays)] + [normal(24) + i for i in range(parameters)]
    mesh = mesh_of((2, 2))
    specs = [P("x", None, "y")] * arrays + [P("y")] * parameters
    placed = [jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip(args, specs, strict=True)]
    both, plain = value_and_gradients(function, args), value_and_gradients(formula, args)
    assert_error_ratio(jax.jit(both)(*placed), jax.jit(plain)(*args), in_float64(plain)(*args), floor_ulps=16)


@pytest.mark.parametrize("channel_axis", [1, -1])
def test_images_stay_on_their_device(channel_axis):
    options = dict(groups=3, channel_axis=channel_axis, activation="silu")
    args = [normal(4, 6, 5, 7) if channel_axis == 1 else normal(4, 5, 7, 6), normal(6), normal(6) + 1]
    functions = (ft.partial(f, **options) for f in (ops.group_norm, group_norm))
    check(*functions, args, [P("x"), P(), P()], mesh_of((4, 1)), reduces=True)


# --- attention --------------------------------------------------------------------------------------------------------

ATTENTION_SPECS = {"batch": ("x", None), "heads": (None, "x"), "batch and heads": ("x", "y")}
SCORES = [(B, H, T, S), (1, H, T, S), (B, 1, T, S), (1, 1, T, S), (B, 1, 1, S)]


def qkv(kv_heads: int = H) -> list[jax.Array]:
    return [normal(B, T, H, D), normal(B, S, kv_heads, D), normal(B, S, kv_heads, E)]


def scores_spec(shape: Sequence[int], axes: tuple[Any, Any]) -> P:
    return P(*(axis if n != 1 else None for n, axis in zip(shape, (*axes, None, None), strict=True)))


@each_mesh
@pytest.mark.parametrize("axes", ATTENTION_SPECS.values(), ids=ATTENTION_SPECS)
@pytest.mark.parametrize("is_causal", [False, True])
def test_attention_stays_on_its_device(axes, is_causal, shape):
    options = dict(is_causal=is_causal)
    check(
        ft.partial(ops.attention, **options),
        ft.partial(attention, **options),
        qkv(),
        [P(axes[0], None, axes[1])] * 3,
        mesh_of(shape),
        reduces=False,
    )


@pytest.mark.parametrize("axes", ATTENTION_SPECS.values(), ids=ATTENTION_SPECS)
def test_grouped_attention_stays_on_its_device(axes):
    check(ops.attention, attention, qkv(kv_heads=2), [P(axes[0], None, axes[1])] * 3, mesh_of((2, 2)), reduces=False)


@each_mesh
@pytest.mark.parametrize("axes", ATTENTION_SPECS.values(), ids=ATTENTION_SPECS)
@pytest.mark.parametrize("scores", SCORES, ids=str)
def test_masked_attention_stays_on_its_device(scores, axes, shape):
    check(
        lambda q, k, v, m: ops.attention(q, k, v, mask=m),
        lambda q, k, v, m: attention(q, k, v, mask=m),
        [*qkv(), mask(*scores)],
        [P(axes[0], None, axes[1])] * 3 + [scores_spec(scores, axes)],
        mesh_of(shape),
        reduces=False,
    )


@each_mesh
@pytest.mark.parametrize("axes", ATTENTION_SPECS.values(), ids=ATTENTION_SPECS)
@pytest.mark.parametrize("scores", SCORES, ids=str)
def test_biased_attention_stays_on_its_device_and_its_bias_has_a_gradient(scores, axes, shape):
    reduces = any(n == 1 and axis is not None for n, axis in zip(scores, axes, strict=False))
    check(
        lambda q, k, v, b: ops.attention(q, k, v, bias=b),
        lambda q, k, v, b: attention(q, k, v, bias=b),
        [*qkv(), normal(*scores)],
        [P(axes[0], None, axes[1])] * 3 + [scores_spec(scores, axes)],
        mesh_of(shape),
        reduces=reduces,
    )


def test_replicated_mask_and_bias_are_right():
    """Not sharded as query is: the partitioner slices them itself."""
    args = [*qkv(), mask(B, H, T, S), normal(B, H, T, S)]
    check(
        lambda q, k, v, m, b: ops.attention(q, k, v, mask=m, bias=b),
        lambda q, k, v, m, b: attention(q, k, v, mask=m, bias=b),
        args,
        [P("x", None, "y")] * 3 + [P(), P()],
        mesh_of((2, 2)),
        reduces=False,
    )


def test_vmapped_ops_stay_on_their_device():
    args = [normal(8, 3, 5, 24), normal(24)]
    check(
        jax.vmap(ops.rms_norm, (0, None)),
        jax.vmap(rms_norm, (0, None)),
        args,
        [P("x"), P()],
        mesh_of((4, 1)),
        reduces=True,
    )


# --- Explicit axes and shard_map --------------------------------------------------------------------------------------

SOME = {
    "layer_norm": (
        ops.layer_norm,
        layer_norm,
        lambda: [normal(8, 16, 24), normal(24), normal(24) + 1],
        [P("x", "y"), P(), P()],
        [P("x"), P(), P()],
    ),
    "softmax": (ops.softmax, softmax, lambda: [normal(8, 16, 24)], [P("x", "y")], [P("x")]),
    "gelu": (ops.gelu, gelu, lambda: [normal(8, 16, 24)], [P("x", "y")], [P("x")]),
    "attention": (
        lambda q, k, v, m, b: ops.attention(q, k, v, mask=m, bias=b),
        lambda q, k, v, m, b: attention(q, k, v, mask=m, bias=b),
        lambda: [*qkv(), mask(B, 1, T, S), normal(1, H, T, S)],
        [P("x", None, "y")] * 3 + [P("x"), P(None, "y")],
        [P("x")] * 3 + [P("x"), P()],
    ),
}


@pytest.mark.parametrize("op", SOME)
def test_explicit_axes_are_right_or_refused_clearly(op):
    function, formula, make, specs, _ = SOME[op]
    args = make()
    mesh = mesh_of((2, 2), AxisType.Explicit)
    plain = value_and_gradients(formula, args)
    with jax.set_mesh(mesh):
        placed = [jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip(args, specs, strict=True)]
        found = jax.jit(function)(*placed)
        gradients = jax.jit(jax.grad(lambda x, *rest: jnp.sum(jnp.sin(function(x, *rest)))))(*placed)
    expected = in_float64(plain)(*args)[0]
    assert_error_ratio(found, jax.jit(formula)(*args), expected, floor_ulps=16)
    plain_gradient = jax.grad(lambda x, *rest: jnp.sum(jnp.sin(formula(x, *rest))))
    assert_error_ratio(gradients, plain_gradient(*args), in_float64(plain_gradient)(*args), floor_ulps=16)


LAYER_SPECS = {"rows": (P("x"), P(), P()), "features": (P("x"), P(None, "y"), P("y"))}


@pytest.mark.parametrize("specs", LAYER_SPECS.values(), ids=LAYER_SPECS)
@pytest.mark.parametrize("transposed", [False, True])
def test_a_linear_layer_of_explicit_axes_is_split_as_written(specs, transposed):
    options = dict(activation="silu", transposed=transposed)
    args = [normal(4, 6, 16), normal(24, 16) if transposed else normal(16, 24), normal(24)]
    specs = (specs[0], P(*reversed(specs[1])) if transposed else specs[1], specs[2])
    plain = value_and_gradients(ft.partial(linear, **options), args)
    mesh = mesh_of((2, 2), AxisType.Explicit)
    with jax.set_mesh(mesh):
        placed = [jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip(args, specs, strict=True)]
        compiled = jax.jit(value_and_gradients(ft.partial(ops.linear, **options), args)).lower(*placed).compile()
        found = compiled(*placed)
    assert collectives(compiled) <= {"all-reduce"}, collectives(compiled)
    assert_error_ratio(found, jax.jit(plain)(*args), in_float64(plain)(*args), floor_ulps=16)


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("op", SOME)
def test_ops_in_shard_map(op, check_vma):
    function, formula, make, _, specs = SOME[op]
    args = make()
    mesh = mesh_of((4, 1))
    mapped = jax.shard_map(function, mesh=mesh, in_specs=tuple(specs), out_specs=P("x"), check_vma=check_vma)
    both, plain = value_and_gradients(mapped, args), value_and_gradients(formula, args)
    assert_error_ratio(jax.jit(both)(*args), jax.jit(plain)(*args), in_float64(plain)(*args), floor_ulps=16)


def test_ops_in_a_partly_manual_shard_map():
    """The mesh axis "x" is manual, "y" is the partitioner's."""
    args = [normal(8, 16, 24), normal(24), normal(24) + 1]
    mesh = mesh_of((2, 2))
    mapped = jax.shard_map(ops.layer_norm, mesh=mesh, in_specs=(P("x"), P(), P()), out_specs=P("x"), axis_names={"x"})
    placed = [jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip(args, (P("x", "y"), P(), P()), strict=True)]
    both, plain = value_and_gradients(mapped, args), value_and_gradients(layer_norm, args)
    assert_error_ratio(jax.jit(both)(*placed), jax.jit(plain)(*args), in_float64(plain)(*args), floor_ulps=16)
