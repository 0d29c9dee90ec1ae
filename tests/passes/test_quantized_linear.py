"""Layers with integer weights: which spellings are one, and what is not."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fusion import without_cost as without_cost
from jax import lax
from numerics import assert_error_ratio, in_float64

import zenith_jax as zenith
from zenith_jax.ir.graph import Graph
from zenith_jax.passes.rewrite import Context, plan

K, N, G = 24, 10, 3


def floats(*shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(sum(shape)).normal(size=shape), dtype)


def integers(*shape, dtype=jnp.int8):
    return jnp.asarray(np.random.default_rng(sum(shape)).integers(-8, 8, size=shape), dtype)


X, W, S, B = floats(3, K), integers(K, N), floats(N), floats(N)
SG = floats(G, N)


def grouped(x, w, s):
    wide = w.reshape(G, K // G, N).astype(x.dtype) * s[:, None]
    return x @ wide.reshape(K, N)


def transposed_groups(x, w, s):
    wide = w.reshape(N, G, K // G).astype(x.dtype) * s[..., None]
    return x @ wide.reshape(N, K).T


class Layer(nn.Module):
    """As checkpoints of quantised models are read: the kernel and its scale are parameters."""

    @nn.compact
    def __call__(self, x):
        w = self.param("kernel", lambda _: W)
        s = self.param("scale", lambda _: S)
        return jnp.dot(x, w.astype(x.dtype)) * s + self.param("bias", lambda _: B)


SPELLINGS = {
    "scaled weights": (lambda x, w, s: x @ (w.astype(x.dtype) * s), (X, W, S), "int8"),
    "scaled product": (lambda x, w, s: (x @ w.astype(x.dtype)) * s, (X, W, S), "int8"),
    "product of two types": (lambda x, w, s: s * (x @ w), (X, W, S), "int8"),
    "int4": (lambda x, w, s: x @ (s * w.astype(x.dtype)), (X, W.astype(jnp.int4), S), "int4"),
    "bias": (lambda x, w, s, b: b + (x @ w.astype(x.dtype)) * s, (X, W, S, B), "int8, bias"),
    "bias, scaled weights": (lambda x, w, s, b: x @ (w * s) + b[None], (X, W, S, B), "int8, bias"),
    "through int32, as ONNX": (
        lambda x, w, s: x @ (w.astype(jnp.int32).astype(jnp.float32) * s.reshape(1, N)),
        (X, W, S),
        "int8",
    ),
    "one scale": (lambda x, w, s: x @ (w * s), (X, W, jnp.float32(0.3)), "int8"),
    "transposed": (lambda x, w, s: jnp.einsum("bk,nk->bn", x, w * s[:, None]), (X, W.T, S), "int8"),
    "transposed in the program": (lambda x, w, s: x @ (w * s[:, None]).T, (X, W.T, S), "int8"),
    "groups": (grouped, (X, W, SG), f"int8, {G} groups"),
    "groups by repeat": (lambda x, w, s: x @ (w * jnp.repeat(s, K // G, 0)), (X, W, SG), f"int8, {G} groups"),
    "groups, transposed": (transposed_groups, (X, W.T, SG.T), f"int8, {G} groups"),
    "batch": (lambda x, w, s: x @ (w * s), (floats(2, 1, 3, K), W, S), "int8"),
    "one row": (lambda x, w, s: x @ (w * s), (X[0], W, S), "int8"),
    "features in front": (lambda x, w, s: lax.dot_general(x, w * s, (((0,), (0,)), ((), ()))), (X.T, W, S), "int8"),
    "heads": (
        lambda x, w, s: jnp.einsum("td,dhk->thk", x, w * s),
        (X, W.reshape(K, 5, 2), S.reshape(5, 2)),
        "int8",
    ),
    "heads of one scale each": (
        lambda x, w, s: jnp.einsum("td,dhk->thk", x, w * s[:, None]),
        (X, W.reshape(K, 5, 2), S[:5]),
        "int8",
    ),
    "flax": (lambda x: Layer().apply({"params": {"kernel": W, "scale": S, "bias": B}}, x), (X,), "int8, bias"),
}


def check(function, args, detail):
    report = zenith.explain(function)(*args)
    assert [(s.op, s.detail) for s in report.fused] == [("quantized_linear", detail)], report
    fused, plain = zenith.jit(function)(*args), jax.jit(function)(*args)
    assert fused.dtype == plain.dtype and fused.shape == plain.shape
    assert_error_ratio(fused, plain, in_float64(function)(*args), floor_ulps=4.0)


@pytest.mark.parametrize("name", SPELLINGS)
def test_spelling_is_one_kernel(name):
    check(*SPELLINGS[name])


BF16 = [a.astype(jnp.bfloat16) for a in (X, S, B)]


@pytest.mark.parametrize(
    "function",
    [
        lambda x, w, s, b: (x @ w.astype(x.dtype)) * s + b,
        lambda x, w, s, b: (jnp.matmul(x, w, preferred_element_type=jnp.float32) * s + b).astype(x.dtype),
        lambda x, w, s, b: x @ (w * s.astype(jnp.float32)).astype(x.dtype) + b,
    ],
)
def test_bfloat16_with_roundings_in_between(function):
    x, s, b = BF16
    check(function, (x, W, s, b), "int8, bias")


def test_a_result_that_is_wider_than_x_keeps_its_digits():
    def logits(x, w, s):
        return jnp.matmul(x, w, preferred_element_type=jnp.float32) * s

    check(logits, (BF16[0], W, S), "int8")


def test_a_cast_of_the_result_stays_outside():
    report = zenith.explain(lambda x, w, s: (x @ (w * s)).astype(jnp.float32))(BF16[0], W, BF16[1])
    assert report.fused[0].shapes.startswith("bfloat16[3,24], int8")


NEAR_MISSES = {
    "scale of each summed feature": (lambda x, w, s: x @ (w * s[:, None]), (X, W, floats(K)), "changes along what is"),
    "groups that interleave": (
        lambda x, w, s: x @ (w.reshape(K // G, G, N) * s).reshape(K, N),
        (X, W, SG),
        "changes along what is",
    ),
    "a zero point": (lambda x, w, s: x @ ((w.astype(jnp.int32) - 3).astype(x.dtype) * s), (X, W, S), "a zero point"),
    "unsigned": (lambda x, w, s: x @ (w * s), (X, W.astype(jnp.uint8), S), "the weights are uint8"),
    "int16": (lambda x, w, s: x @ (w * s), (X, W.astype(jnp.int16), S), "the weights are int16"),
    "a bias before the scale": (lambda x, w, s, b: (x @ w + b) * s, (X, W, S, B), None),
    "a scale of the rows": (lambda x, w, s: (x @ w) * s[:, None], (X, W, floats(3)), None),
    "a narrower integer between": (
        lambda x, w, s: x @ (w.astype(jnp.int4).astype(jnp.int8) * s),
        (X, W, S),
        None,  # int4 it is, with XLA's own cast below
    ),
    "weights that are used again": (lambda x, w, s: (x @ (v := w * s), v), (X, W, S), "used elsewhere"),
    "shuffled weights": (
        lambda x, w, s: x @ w.reshape(2, K // 2, N).transpose(1, 0, 2).reshape(K, N).astype(x.dtype) * s,
        (X, W, S),
        "reordered",
    ),
    "no scale": (lambda x, w: x @ w, (X, W), None),
    "a scale by the result": (lambda x, w, s: (y := x @ w) * y.sum(0), (X, W, S), None),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_miss_is_left_alone(name):
    function, args, reason = NEAR_MISSES[name]
    report = zenith.explain(function)(*args)
    sites = [s for s in report.refused if s.op == "quantized_linear"]
    if name == "a narrower integer between":
        check(function, args, "int4")
        return
    assert not report.fused, report
    assert [reason in s.reason for s in sites] == ([True] if reason else []), report


WIDE = integers(512, 512), floats(512)


def test_a_dequantised_matrix_of_an_onnx_model_is_one():
    onnx = pytest.importorskip("onnx", reason="it writes the model")
    (w, s), x = WIDE, floats(3, 512)  # of small weights the loader computes the floats
    helper, arrays = onnx.helper, onnx.numpy_helper
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s"], ["wide"], axis=1),
        helper.make_node("MatMul", ["x", "wide"], ["product"]),
        helper.make_node("Add", ["product", "b"], ["y"]),
    ]
    ends = (
        [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [3, size])] for n, size in (("x", 512), ("y", 512))
    )
    constants = [arrays.from_array(np.asarray(a), name) for name, a in (("w", w), ("s", s), ("b", s))]
    graph = helper.make_graph(nodes, "layer", *ends, constants)
    loaded = zenith.onnx.load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10))
    report = zenith.explain(loaded.apply)(loaded.params, x)
    assert [(s.op, s.detail) for s in report.fused] == [("quantized_linear", "int8, bias")]
    expected = np.asarray(x, np.float64) @ (np.asarray(w, np.float64) * np.asarray(s)) + np.asarray(s)
    # Sums of 512 products of up to 8 * 3 * 3.
    np.testing.assert_allclose(
        jax.tree.leaves(zenith.jit(loaded.apply)(loaded.params, x))[0], expected, rtol=1e-5, atol=1e-3
    )


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="JAX's default is a GPU")
@pytest.mark.parametrize(
    ("x", "w", "s", "reason"),
    [
        (floats(16, 512), *WIDE, None),
        (floats(17, 512), *WIDE, None),
        (floats(17, 512).astype(jnp.bfloat16), WIDE[0], WIDE[1].astype(jnp.bfloat16), "17 rows"),
        (floats(1025, 512), *WIDE, "1025 rows"),
        (floats(1, 512), WIDE[0][:, :511], WIDE[1][:511], "512 x 511 weights"),
    ],
    ids=["taken", "tiles", "more rows", "most rows", "fewer weights"],
)
def test_the_rule_of_the_cpu(x, w, s, reason):
    with zenith.configured(use_cost=True):
        report = zenith.explain(lambda x: (x @ w) * s)(x)
    assert bool(report.fused) == (reason is None)
    assert [reason in r.reason for r in report.refused if r.op == "quantized_linear"] == ([True] if reason else [])


def test_a_gradient_of_a_fused_layer_is_right():
    x, w, s, b = X, W, S, B

    def loss(x, s, b):
        return jnp.sum(jnp.sin(0.1 * ((x @ w.astype(x.dtype)) * s + b)))

    gradient = jax.value_and_grad(loss, (0, 1, 2))
    assert [s.op for s in zenith.explain(gradient)(x, s, b).fused] == ["quantized_linear"]
    fused, plain = zenith.jit(gradient)(x, s, b), jax.jit(gradient)(x, s, b)
    assert_error_ratio(fused, plain, in_float64(gradient)(x, s, b), floor_ulps=16.0)


def _on_a_gpu(x, w, scale, use_cost, transposed=False):
    def layer(x, w, scale):
        w = w.T if transposed else w
        k, n = w.shape
        if scale.ndim == 1:
            return (x @ w.astype(x.dtype)) * scale
        return x @ (w.astype(x.dtype).reshape(len(scale), -1, n) * scale[:, None]).reshape(k, n)

    shapes = [jax.ShapeDtypeStruct(*a) for a in (x, w, scale)]
    graph = Graph.of(jax.make_jaxpr(layer)(*shapes))
    return [m.op for m in plan(graph, Context("cuda", use_cost=use_cost))]


def test_on_a_gpu_few_weights_are_taken_on_request():
    """And as far as the kernel goes."""

    def found(rows, use_cost):
        x, w, scale = ((rows, 64), jnp.bfloat16), ((64, 32), jnp.int8), ((32,), jnp.bfloat16)
        return _on_a_gpu(x, w, scale, use_cost)

    assert found(16, False) == ["quantized_linear"]
    assert found(16, True) == [] and "quantized_linear" not in found(17, False)


@pytest.mark.parametrize(
    ("rows", "k", "w_dtype", "groups", "taken"),
    [
        (16, 4096, jnp.int4, 32, True),
        (16, 2048, jnp.int4, 16, False),
        (16, 4096, jnp.int4, None, False),
        (1, 4096, jnp.int8, None, True),
        (1, 2048, jnp.int8, None, False),
        (16, 4096, jnp.int8, None, True),
        (1, 4096, jnp.int8, 32, True),
        (2, 4096, jnp.int8, 32, False),
    ],
)
def test_the_rule_of_a_gpu(rows, k, w_dtype, groups, taken):
    x, w = ((rows, k), jnp.bfloat16), ((k, 4096), w_dtype)
    scale = ((groups, 4096) if groups else (4096,), jnp.bfloat16)
    assert _on_a_gpu(x, w, scale, True) == (["quantized_linear"] if taken else [])


@pytest.mark.parametrize(
    ("rows", "k", "capability", "taken"),
    [(1, 4096, "9.0", False), (8, 4096, "9.0", True), (1, 14336, "9.0", True), (8, 4096, "8.0", False)],
)
def test_on_a_gpu_int8_of_n_by_k_is_taken_where_it_was_faster(rows, k, capability, taken, monkeypatch):
    monkeypatch.setattr("zenith_jax.passes.choose.cuda.compute_capability", lambda: capability)
    shapes = ((rows, k), jnp.bfloat16), ((4096, k), jnp.int8), ((4096,), jnp.bfloat16)
    assert _on_a_gpu(*shapes, True, transposed=True) == (["quantized_linear"] if taken else [])
