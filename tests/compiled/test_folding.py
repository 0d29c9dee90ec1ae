"""What depends on parameters alone is computed once, when a model is compiled."""

from __future__ import annotations

import functools as ft
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import zenith_jax as zenith

# On a GPU other things are worth it: tests/passes/test_products.py.
pytestmark = pytest.mark.skipif(jax.default_backend() != "cpu", reason="what is folded for a CPU's kernels")
rng = np.random.default_rng(0)
normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
X = np.float32(rng.normal(size=(2, 3, 6, 6)))
PARAMS = {"conv": {"w": normal(8, 3, 3, 3), "b": normal(8)}, "head": normal(8, 4), "unread": jnp.ones(3)}


def convolved(params, x):
    y = lax.conv(x, params["conv"]["w"], (1, 1), "SAME") + params["conv"]["b"][:, None, None]
    return jax.nn.relu(y).mean((2, 3)) @ params["head"]


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_filters_are_brought_into_order_once(mode, tmp_path):
    model = zenith.compile((convolved, PARAMS), X, mode=mode)
    assert {n: x.shape for n, x in model.folded.items()} == {"folded.conv.w": (3, 3, 3, 8)}
    assert jax.tree.all(jax.tree.map(lambda a, b: a is b, model.params, PARAMS)), "the model's own arrays"
    np.testing.assert_allclose(model(X), convolved(PARAMS, X), rtol=1e-4, atol=1e-5)

    path = model.save(tmp_path / "m.zenith", platforms=("cpu", "cuda"))
    loaded = zenith.load(path)
    np.testing.assert_allclose(loaded(X), model(X), rtol=1e-6, atol=1e-6)
    # A GPU's program reads the filter as it is, so that the file has it too.
    assert set(loaded.parameters) == {"conv.w", "conv.b", "head", "unread"} and set(loaded.folded) == set(model.folded)
    again = zenith.load(loaded.save(tmp_path / "again.zenith"))
    np.testing.assert_array_equal(again(X), loaded(X))


def test_a_file_holds_a_filter_once(tmp_path):
    path = zenith.compile((convolved, PARAMS), X).save(tmp_path / "m.zenith")
    loaded = zenith.load(path)
    assert set(loaded.parameters) == {"conv.b", "head", "unread"} == set(loaded.params)
    size = sum(p.nbytes for p in jax.tree.leaves(PARAMS))
    assert size <= zipfile.ZipFile(path).getinfo("parameters.bin").file_size < size + 64 * 4
    np.testing.assert_allclose(loaded(X), convolved(PARAMS, X), rtol=1e-4, atol=1e-5)


def test_programs_of_several_sizes_share_what_is_the_same():
    model = zenith.compile((convolved, PARAMS), X, dynamic={"batch": (1, 2, 4)})
    assert list(model.folded) == ["folded.conv.w"]
    np.testing.assert_allclose(model(X[:1]), convolved(PARAMS, X[:1]), rtol=1e-4, atol=1e-5)


def folded(function, params, *inputs):
    model = zenith.compile((function, params), *inputs)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), model(*inputs), function(params, *inputs)
    )
    return {n.removeprefix("folded."): (x.shape, x.dtype.name) for n, x in model.folded.items()}


def test_casts_to_narrower_types_and_what_is_computed_of_weights():
    x = normal(256, 8)
    w, scale = normal(8, 4), normal(4)
    assert folded(lambda p, x: x.astype(jnp.bfloat16) @ p.astype(jnp.bfloat16), w, x) == {"": ((8, 4), "bfloat16")}
    assert folded(lambda p, x: x @ (p["w"] * p["s"]), {"w": w, "s": scale}, x) == {"s": ((8, 4), "float32")}
    assert folded(lambda p, x: x + jnp.sum(p), w, x) == {"": ((), "float32")}


def test_what_is_larger_or_for_nothing_stays_in_the_program():
    x = normal(256, 8)
    large, small = normal(8, 512), jnp.arange(4096, dtype=jnp.int8).reshape(8, 512)
    assert not folded(lambda p, x: x @ p.T, normal(4, 8), x), "a product takes the transpose of a matrix"
    assert not folded(lambda p, x: x @ p.reshape(8, 4), normal(32), x)
    assert not folded(lambda p, x: x @ (p.astype(jnp.float32) / 127), small, x), "8 bits are a quarter to read"
    assert not folded(lambda p, x: x[:, :1, None] + jnp.exp(p)[None] * jnp.ones((4096, 1, 1)), normal(1, 8), x[:1, :1])
    assert not folded(lambda p, x: x @ p + jnp.arange(512.0) ** 2, large, x), "of no parameter"
    assert not folded(lambda p, x: (x @ p).at[0].add(1), normal(8, 4), x)


def test_one_row_takes_the_transpose_that_was_made():
    assert folded(lambda p, x: x @ p.T, normal(4, 8), normal(1, 8)) == {"": ((8, 4), "float32")}


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="a GPU's kernels read weights as they lie")
@pytest.mark.parametrize("transposed", [False, True])
def test_weights_of_linear_layers_are_brought_into_panels_once(transposed, tmp_path):
    w, b, x = normal(256, 320) / 16, normal(320), normal(8, 256)

    def layer(p, x):
        return jax.nn.gelu(x @ (p["w"].T if transposed else p["w"]) + p["b"], approximate=False)

    params = {"w": w.T if transposed else w, "b": b}
    assert folded(layer, params, x) == {"w": ((256 * 320,), "float32")}
    panels = np.asarray(zenith.compile((layer, params), x).folded["folded.w"]).reshape(5, 256, 64)
    np.testing.assert_array_equal(panels[3, :, 7], w[:, 3 * 64 + 7])
    path = zenith.compile((layer, params), x, dynamic={"batch": (2, 8)}).save(tmp_path / "m.zenith")
    loaded = zenith.load(path)
    assert set(loaded.parameters) == {"b"} and list(loaded.folded) == ["folded.w"]
    np.testing.assert_allclose(loaded(x[:5]), layer(params, x[:5]), rtol=1e-4, atol=1e-5)


def test_weights_that_stay_as_they_lie():
    x, gelu = normal(8, 256), ft.partial(jax.nn.gelu, approximate=False)
    assert not folded(lambda p, x: gelu(x @ p + 1), normal(256, 300) / 16, x), "no whole panels"
    assert not folded(lambda p, x: gelu(x @ p + 1), normal(256, 320) / 16, normal(1024, 256)), "left to XLA"
    assert not folded(lambda p, x, w: gelu(x @ w + p), normal(320), x, normal(256, 320) / 16), "an input"


def test_an_output_that_needs_no_input():
    assert folded(lambda p, x: (x + 1, p * 2, p), normal(8), normal(8)) == {"": ((8,), "float32")}


def test_telemetry_knows_what_became_of_a_model_that_was_folded():
    zenith.compile((convolved, PARAMS), X)
    record = zenith.telemetry.records()[-1]
    assert record.function.endswith("convolved") and record.stage == "compiled" and "compile" in record.seconds
