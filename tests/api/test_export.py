"""jax.export and the persistent compilation cache: across processes, with the custom calls of the kernels."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fresh_process import run_script

import zenith_jax as zenith
from zenith_jax import native

native_cpu = pytest.mark.skipif(native.unavailable_reason("cpu") is not None, reason="the CPU module is not built")

MODEL = """
import jax, jax.numpy as jnp
import zenith_jax as zenith

def model(params, x):
    q, k, v = jnp.split((x @ params["w"]).reshape(*x.shape[:2], 2, -1), 3, axis=-1)
    return jax.nn.gelu(jax.nn.dot_product_attention(q, k, v, is_causal=True)).sum((2, 3)) * params["scale"]

def loss(params, x):
    return jnp.sum(jnp.sin(model(params, x)))

def arguments():
    x = jnp.sin(jnp.arange(2 * 128 * 16, dtype=jnp.float32)).reshape(2, 128, 16)
    return {"w": jnp.cos(jnp.arange(16 * 48, dtype=jnp.float32)).reshape(16, 48), "scale": jnp.float32(2)}, x
"""

SAVE = """
import numpy as np
from the_model import *
zenith.configure(use_cost=False)
step = zenith.jit(jax.value_and_grad(loss))
exported = zenith.export(step)(*arguments())
open("step.bin", "wb").write(exported.serialize())
value, gradient = jax.jit(jax.value_and_grad(loss))(*arguments())
np.savez("expected.npz", value=value, w=gradient["w"], scale=gradient["scale"])
"""

LOAD = """
import sys
import numpy as np, jax.numpy as jnp
import zenith_jax as zenith
assert "the_model" not in sys.modules and not __import__("importlib.util").util.find_spec("the_model")
exported = zenith.load_exported("step.bin")
assert "zenith_attention_fwd_v" in exported.mlir_module() and "zenith_attention_bwd_v" in exported.mlir_module()
x = jnp.sin(jnp.arange(2 * 128 * 16, dtype=jnp.float32)).reshape(2, 128, 16)
params = {"w": jnp.cos(jnp.arange(16 * 48, dtype=jnp.float32)).reshape(16, 48), "scale": jnp.float32(2)}
value, gradient = exported.call(params, x)
expected = np.load("expected.npz")
np.testing.assert_allclose(value, expected["value"], rtol=1e-4, atol=1e-4)
for name in ("w", "scale"):
    np.testing.assert_allclose(gradient[name], expected[name], rtol=1e-3, atol=1e-3 * np.abs(expected[name]).max())
print("as expected")
"""

CACHED = """
import collections
import jax
from the_model import *
zenith.configure(use_cost=False)
events = collections.Counter()
jax.monitoring.register_event_listener(lambda name, **rest: events.update([name]))
params, x = arguments()
jax.block_until_ready((params, x))
events.clear()
jax.block_until_ready(zenith.jit(jax.grad(loss))(params, x))
print("hits", events["/jax/compilation_cache/cache_hits"], "misses", events["/jax/compilation_cache/cache_misses"])
"""


@native_cpu
def test_a_step_is_saved_in_one_process_and_runs_in_another_without_its_source(tmp_path):
    pytest.importorskip("flatbuffers", reason="jax.export serialises with flatbuffers")
    (tmp_path / "the_model.py").write_text(MODEL)
    run_script(SAVE, tmp_path)
    (tmp_path / "the_model.py").unlink()
    for cached in tmp_path.glob("__pycache__/*"):
        cached.unlink()
    assert "as expected" in run_script(LOAD, tmp_path)


@native_cpu
def test_the_persistent_cache_is_hit_by_a_second_process(tmp_path):
    (tmp_path / "the_model.py").write_text(MODEL)
    settings = dict(
        JAX_COMPILATION_CACHE_DIR=str(tmp_path / "cache"),
        JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
        JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES="-1",
    )
    assert "hits 0 misses 1" in run_script(CACHED, tmp_path, **settings)
    assert "hits 1 misses 0" in run_script(CACHED, tmp_path, **settings)


@native_cpu
def test_every_target_of_the_library_is_in_the_list():
    named = {str(check) for check in zenith.safety_checks()}
    targets = native.module("cpu").targets()
    assert targets
    for name in targets:
        assert any(name in check for check in named), f"{name} is not in {named}"


def test_without_the_list_jax_refuses_and_with_it_not():
    x = jax.ShapeDtypeStruct((64, 512), jnp.float32)
    with zenith.configured(use_cost=False):
        if native.unavailable_reason("cpu") is None:
            with pytest.raises(ValueError, match="custom call"):
                jax.export.export(zenith.jit(lambda x: jax.nn.softmax(x) * 3))(x)
        exported = zenith.export(lambda x: jax.nn.softmax(x) * 3)(x)
    value = jnp.linspace(-4, 4, 64 * 512).reshape(64, 512)
    np.testing.assert_allclose(exported.call(value), jax.nn.softmax(value) * 3, rtol=1e-5)


def test_another_platform_is_exported_for_without_having_it():
    x = jax.ShapeDtypeStruct((64, 4096), jnp.bfloat16)

    def norm(x):
        return x * jax.lax.rsqrt(jnp.mean(jnp.square(x.astype(jnp.float32)), -1, keepdims=True) + 1e-6)

    with zenith.configured(use_cost=False):
        exported = zenith.export(norm, platforms=("cuda",))(x)
    assert exported.platforms == ("cuda",)
    assert "zenith_rms_norm_fwd_v" in exported.mlir_module()


def test_a_symbolic_batch_is_exported_with_xla_code_for_the_op():
    (b,) = jax.export.symbolic_shape("b")
    with zenith.configured(use_cost=False):
        exported = zenith.export(lambda x: jax.nn.softmax(x) + 1)(jax.ShapeDtypeStruct((b, 64), jnp.float32))
    assert "zenith_softmax_fwd_v" not in exported.mlir_module()
    for n in (1, 5):
        x = jnp.linspace(-3, 3, n * 64).reshape(n, 64)
        np.testing.assert_allclose(exported.call(x), jax.nn.softmax(x) + 1, rtol=1e-6)


def test_a_program_that_only_names_an_op_needs_no_kernels(monkeypatch):
    """Locations in it say zenith.softmax; a machine without the module runs it all the same."""
    (b,) = jax.export.symbolic_shape("b")
    with zenith.configured(use_cost=False):
        exported = zenith.export(lambda x: jax.nn.softmax(x * 2))(jax.ShapeDtypeStruct((b, 64), jnp.float32))
    assert "zenith.softmax" in exported.mlir_module() and "@zenith_" not in exported.mlir_module()
    saved = exported.serialize()
    monkeypatch.setattr(native, "unavailable_reason", lambda platform: "it is not built")
    x = jnp.ones((3, 64))
    np.testing.assert_allclose(zenith.load_exported(saved).call(x), jax.nn.softmax(x * 2), rtol=1e-6)
