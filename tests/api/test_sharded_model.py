"""Rewritten programs on 8 CPU devices, batch over 4 and heads over 2: nothing that may be sharded is gathered.

What must be whole is, and is reported. In processes of their own, which have eight devices; parameters and activations
differ along every dimension.
"""

from __future__ import annotations

import pytest
from fresh_process import run_script

from zenith_jax import native

BEGIN = """
import re, sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import zenith_jax as zenith
zenith.configure(use_cost=False)
B, T, H, D = 8, 16, 4, 8
rng = np.random.default_rng(20260401)
normal = lambda *s: jnp.asarray(rng.normal(size=s) / 4, jnp.float32)

def loss(params, x):
    mean = x.mean(-1, keepdims=True)
    y = (x - mean) * jax.lax.rsqrt(x.var(-1, keepdims=True) + 1e-5) * params["scale"] + params["bias"]
    q, k, v = (jnp.einsum("btf,fhd->bthd", y, w) for w in params["qkv"])
    attended = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    z = x + jnp.einsum("bthd,hdf->btf", attended, params["out"])
    return jnp.sum(jax.nn.gelu(z) * jnp.cos(jnp.arange(H * D)))

def collectives(compiled):
    names = "all-gather all-to-all collective-permute reduce-scatter all-reduce".split()
    return {n: len(re.findall(rf" {n}(?:-start)?\\(", compiled.as_text())) for n in names}

def no_gather(compiled):
    found = collectives(compiled)
    assert not any(n for c, n in found.items() if c != "all-reduce"), found

def same(found, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4), found, expected)

params = {"scale": normal(H * D) + 1, "bias": normal(H * D), "qkv": [normal(H * D, H, D) for _ in range(3)],
          "out": normal(H, D, H * D)}
x = normal(B, T, H * D)
specs = {"scale": P(), "bias": P(), "qkv": [P(None, "model")] * 3, "out": P("model")}
mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
assert jax.device_count() == 8
place = lambda tree, specs: jax.tree.map(lambda a, s: jax.device_put(a, NamedSharding(mesh, s)), tree, specs)
placed, x_placed = place(params, specs), jax.device_put(x, NamedSharding(mesh, P("data")))
"""

STEP = """
for name, function in (("forward", loss), ("backward", jax.value_and_grad(loss))):
    report = zenith.explain(function)(params, x)
    assert report.counts() == {"layer_norm": 1, "attention": 1, "gelu_tanh": 1}, report
    fused = zenith.jit(function).lower(placed, x_placed).compile()
    plain = jax.jit(function).lower(placed, x_placed).compile()
    found, expected = collectives(fused), collectives(plain)
    print(name, found, expected)
    assert "zenith_attention_fwd" in fused.as_text()
    no_gather(fused)
    assert found["all-reduce"] <= expected["all-reduce"] + 1, (found, expected)
    same(fused(placed, x_placed), jax.jit(function)(params, x))

# The feature axis sharded: rows must be whole for the norm, are gathered, and the values are right.
x_features = jax.device_put(x, NamedSharding(mesh, P("data", None, "model")))
norm = lambda x: jax.nn.softmax(x * 3)
compiled = zenith.jit(norm).lower(x_features).compile()
assert collectives(compiled)["all-gather"] >= 1
np.testing.assert_allclose(compiled(x_features), norm(x), rtol=1e-5, atol=1e-6)

# Explicit axes.
explicit = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
with jax.set_mesh(explicit):
    given = jax.device_put(x, NamedSharding(explicit, P("data")))
    out = zenith.jit(lambda x: jax.nn.gelu(jax.nn.softmax(x * 3)))(given)
    assert "data" in str(out.sharding.spec[0]), out.sharding
np.testing.assert_allclose(out, jax.nn.gelu(norm(x)), rtol=1e-5, atol=1e-6)
print("done")
"""

WHOLE = """
# Keys must be whole: those sharded over eight devices are gathered, and it is said.
qkv = [normal(B, T, H, D) for _ in range(3)]
attend = lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=True)
loss = lambda *a: jnp.sum(attend(*a) ** 2)
both = jax.value_and_grad(loss, (0, 1, 2))
keys = [jax.device_put(a, NamedSharding(mesh, P(None, ("data", "model")))) for a in qkv]
line = f"dimension 1 of float32[{B},{T},{H},{D}] is sharded over ('data', 'model') and must be whole"
assert line in str(zenith.explain(attend)(*keys)), zenith.explain(attend)(*keys)
compiled = zenith.jit(both).lower(*keys).compile()
assert sum(n for c, n in collectives(compiled).items() if c != "all-reduce") > 0
assert "zenith_attention_bwd" in compiled.as_text()
same(compiled(*keys), jax.jit(both)(*qkv))

# Rows may be sharded over all eight, two a device, in whichever dimension they lie.
def rows(params, x):
    mean = x.mean(-1, keepdims=True)
    y = (x - mean) * jax.lax.rsqrt(x.var(-1, keepdims=True) + 1e-5) * params["scale"] + params["bias"]
    return jnp.sum((jax.nn.softmax(y * 3) + jax.nn.gelu(y)) * jnp.cos(jnp.arange(H * D)))

both = jax.value_and_grad(rows)
assert zenith.explain(both)(params, x).counts() == {"layer_norm": 1, "softmax": 1, "gelu_tanh": 1}
for shape, spec in (((T, H * D), P(("data", "model"))), ((B, T, H * D), P(None, ("model", "data")))):
    value = normal(*shape)
    compiled = zenith.jit(both).lower(params, jax.device_put(value, NamedSharding(mesh, spec))).compile()
    no_gather(compiled)
    assert "zenith_layer_norm_bwd" in compiled.as_text()
    same(compiled(params, value), jax.jit(both)(params, value))

# Inside of shard_map, manual axes checked: over both axes, and with heads left to the partitioner.
for names in ({"data", "model"}, {"data"}):
    spec = P(None, tuple(sorted(names)))
    def mapped(params, x):
        inner = lambda params, x: jax.lax.psum(rows(params, x), tuple(sorted(names)))
        return jax.shard_map(inner, mesh=mesh, in_specs=(P(), spec), out_specs=P(), axis_names=names)(params, x)
    both = jax.value_and_grad(mapped)
    compiled = zenith.jit(both).lower(params, x).compile()
    assert "zenith_layer_norm_bwd" in compiled.as_text()
    same(compiled(params, x), jax.jit(jax.value_and_grad(rows))(params, x))
print("done")
"""


@pytest.mark.skipif(native.unavailable_reason("cpu") is not None, reason="the CPU module is not built")
def test_a_training_step_on_eight_devices_gathers_nothing(tmp_path):
    assert "done" in run_script(BEGIN + STEP, tmp_path, XLA_FLAGS="--xla_force_host_platform_device_count=8")


@pytest.mark.skipif(native.unavailable_reason("cpu") is not None, reason="the CPU module is not built")
def test_on_eight_devices_keys_are_gathered_and_reported_and_rows_are_not(tmp_path):
    assert "done" in run_script(BEGIN + WHOLE, tmp_path, XLA_FLAGS="--xla_force_host_platform_device_count=8")
