"""An imported model is a JAX function: differentiated, batched, sharded and rewritten like one written by hand."""

import functools as ft

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import zenith_jax as zenith
from zenith_jax import native
from zenith_jax.frontends.onnx import load

onnx = pytest.importorskip("onnx")

BATCH, LENGTH, WIDTH, HEADS = 8, 6, 16, 2
FUSED = {"layer_norm": 1, "add_layer_norm": 1, "attention": 1, "gelu_erf": 1}


@pytest.fixture(scope="module")
def block():
    """A transformer's encoder block, and an input."""
    node = onnx.helper.make_node
    nodes = [
        node("LayerNormalization", ["x", "scale1", "bias1"], ["n"], epsilon=1e-5),
        *[node("MatMul", ["n", f"w_{letter}"], [letter]) for letter in "qkv"],
        node("Attention", ["q", "k", "v"], ["a"], q_num_heads=HEADS, kv_num_heads=HEADS),
        node("MatMul", ["a", "w_o"], ["o"]),
        node("Add", ["x", "o"], ["h"]),
        node("LayerNormalization", ["h", "scale2", "bias2"], ["m"], epsilon=1e-5),
        node("Gemm", ["rows", "w_1", "b_1"], ["g"]),
        node("Gelu", ["g"], ["u"]),
        node("Gemm", ["u", "w_2", "b_2"], ["f"]),
        node("Reshape", ["m", "as_rows"], ["rows"]),
        node("Shape", ["x"], ["shape"]),
        node("Reshape", ["f", "shape"], ["back"]),
        node("Add", ["h", "back"], ["y"]),
    ]
    rng = np.random.default_rng(0)
    shapes = {f"w_{letter}": (WIDTH, WIDTH) for letter in "qkvo"} | {"w_1": (WIDTH, 32), "w_2": (32, WIDTH)}
    shapes |= {"b_1": (32,), "b_2": (WIDTH,)} | {f"{n}{i}": (WIDTH,) for n in ("scale", "bias") for i in (1, 2)}
    weights = {n: (0.3 * rng.standard_normal(s)).astype(np.float32) for n, s in shapes.items()}
    weights["as_rows"] = np.array([-1, WIDTH])
    graph = onnx.helper.make_graph(
        nodes,
        "block",
        [onnx.helper.make_tensor_value_info("x", 1, ["batch", "length", WIDTH])],
        [onnx.helper.make_tensor_value_info("y", 1, None)],
        [onnx.numpy_helper.from_array(v, n) for n, v in weights.items()],
    )
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 23)], ir_version=10)
    return load(proto), rng.standard_normal((BATCH, LENGTH, WIDTH)).astype(np.float32)


def by_hand(p, x):
    def layer_norm(x, scale, bias):
        mean = jnp.mean(x, -1, keepdims=True)
        variance = jnp.mean((x - mean) ** 2, -1, keepdims=True)
        return (x - mean) / jnp.sqrt(variance + 1e-5) * scale + bias

    def heads(x):
        return x.reshape(*x.shape[:-1], HEADS, -1)

    n = layer_norm(x, p["scale1"], p["bias1"])
    q, k, v = (heads(n @ p[f"w_{letter}"]) for letter in "qkv")
    weights = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k) / np.sqrt(q.shape[-1]))
    h = x + jnp.einsum("bhts,bshd->bthd", weights, v).reshape(x.shape) @ p["w_o"]
    m = layer_norm(h, p["scale2"], p["bias2"])
    return h + jax.nn.gelu(m @ p["w_1"] + p["b_1"], approximate=False) @ p["w_2"] + p["b_2"]


def loss(apply, p, x):
    return jnp.sum(jnp.sin(apply(p, x)))


TOLERANCE = dict(rtol=2e-5, atol=2e-5)  # sums of 16 to 800 terms of size 1 in another order


def test_gradients_of_all_parameters_are_those_of_the_model_written_by_hand(block):
    model, x = block
    imported = lambda p, x: model.apply(p, x)[0]  # noqa: E731
    expected = jax.jit(jax.value_and_grad(ft.partial(loss, by_hand), (0, 1)))(model.params, x)
    with zenith.configured(use_cost=False):
        for jit in (jax.jit, zenith.jit):
            got = jit(jax.value_and_grad(ft.partial(loss, imported), (0, 1)))(model.params, x)
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, expected)
    assert set(got[1][0]) == set(model.params) and len(model.params) == 12


def test_vmap_over_inputs_and_over_parameters(block):
    model, x = block
    models = jax.tree.map(lambda v: jnp.stack([v, -v, 2 * v]), model.params)
    inputs = jnp.stack([x, x + 1, -x])
    batched = jax.vmap(lambda p, x: model.apply(p, x)[0])
    expected = jax.lax.map(lambda pair: by_hand(*pair), (models, inputs))
    with zenith.configured(use_cost=False):
        for jit in (jax.jit, zenith.jit):
            np.testing.assert_allclose(jit(batched)(models, inputs), expected, rtol=1e-4, atol=1e-4)
        assert zenith.explain(batched)(models, inputs).counts() == FUSED


@pytest.mark.skipif(native.unavailable_reason("cpu") is not None, reason="the CPU module is not built")
@pytest.mark.parametrize("tensor_parallel", [False, True])
def test_sharded_over_four_devices(block, tensor_parallel):
    """The batch alone: nothing moves between devices. With the feed-forward layer's weights too: one sum."""
    model, x = block
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "model"))
    place = lambda *axes: NamedSharding(mesh, PartitionSpec(*axes))  # noqa: E731
    specs = {"w_1": (None, "model"), "b_1": ("model",), "w_2": ("model",)} if tensor_parallel else {}
    params = {n: jax.device_put(v, place(*specs.get(n, ()))) for n, v in model.params.items()}
    inputs = jax.device_put(x, place("data"))
    function = zenith.jit(lambda p, x: model.apply(p, x)[0])
    with zenith.configured(use_cost=False):
        y = function(params, inputs)
        hlo = function.lower(params, inputs).compile().as_text()
    np.testing.assert_allclose(y, by_hand(model.params, x), **TOLERANCE)
    assert y.sharding.is_equivalent_to(inputs.sharding, 3)
    assert "all-gather" not in hlo and ("all-reduce" in hlo) == tensor_parallel
    assert "zenith_attention_fwd" in hlo


def test_the_rewriter_finds_what_single_onnx_operators_say(block):
    model, x = block
    with zenith.configured(use_cost=False):
        assert zenith.explain(lambda p, x: model.apply(p, x)[0])(model.params, x).counts() == FUSED
