"""Linear layers with what follows them: which spellings are one, and what is not.

The kernels are for GPUs; here the rewriter is told that it writes for one, and what it writes runs by the reference.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.extend.core as jec
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from fusion import value_and_gradients
from numerics import assert_error_ratio, in_float64

import zenith_jax as zenith
from zenith_jax.ir.graph import Graph
from zenith_jax.passes.rewrite import Context, plan, rewrite

BF16 = jnp.bfloat16
ON_GPU = Context("cuda", use_cost=False)


def array(*shape, dtype=BF16):
    rng = np.random.default_rng(sum(shape) + len(shape))
    return jnp.asarray(rng.normal(size=shape) * shape[-1] ** -0.25, dtype)


X, W, B, R = array(3, 4, 16), array(16, 24), array(24), array(3, 4, 24)


def sites(function, *args, context=ON_GPU):
    return [(m.op, m.detail) for m in plan(Graph.of(jax.make_jaxpr(function)(*args)), context)]


def check(function, *args):
    """Values and gradients of what the rewriter writes for a GPU."""
    primal = jax.make_jaxpr(function)(*args)
    fused = lambda *a: jec.jaxpr_as_fun(rewrite(primal, ON_GPU))(*a)[0]  # noqa: E731
    assert "linear" in str(jax.make_jaxpr(fused)(*args))
    both, plain = value_and_gradients(fused), value_and_gradients(function)
    assert_error_ratio(jax.jit(both)(*args), jax.jit(plain)(*args), in_float64(plain)(*args), floor_ulps=8.0)


def gelu_by_hand(x):
    return 0.5 * x * (1 + jax.lax.erf(x / np.sqrt(2)))


SPELLINGS = {
    "relu": (lambda x, w, b: jax.nn.relu(x @ w + b), (X, W, B), "relu, bias"),
    "maximum": (lambda x, w, b: jnp.maximum(x @ w + b, 0), (X, W, B), "maximum, bias"),
    "squared relu": (lambda x, w: jnp.square(jax.nn.relu(x @ w)), (X, W), "relu_squared"),
    "tanh": (lambda x, w, b: jnp.tanh(b + x @ w), (X, W, B), "tanh, bias"),
    "silu without bias": (lambda x, w: jax.nn.silu(x @ w), (X, W), "silu"),
    "gelu tanh": (lambda x, w, b: jax.nn.gelu(x @ w + b), (X, W, B), "gelu_tanh, bias"),
    "gelu by hand": (
        lambda x, w, b: gelu_by_hand((x @ w + b).astype(jnp.float32)).astype(BF16),
        (X, W, B),
        "gelu_erf, bias",
    ),
    "transposed": (lambda x, w, b: x @ w.T + b, (X, array(24, 16), B), "bias"),
    "several features": (
        lambda x, w, b: jnp.einsum("btd,dhe->bthe", x, w) + b,
        (X, array(16, 3, 8), array(3, 8)),
        "bias",
    ),
    "several contracted": (
        lambda x, w, b, r: r + jnp.einsum("bthe,heo->bto", x, w) + b,
        (array(3, 4, 2, 8), array(2, 8, 24), B, R),
        "bias, residual",
    ),
    "activation and residual": (
        lambda x, w, b, r: jax.nn.gelu(x @ w + b, approximate=False) + r,
        (X, W, B, R),
        "gelu_erf, bias, residual",
    ),
    "rows taken apart": (
        lambda x, w, b, r: jax.nn.relu((x @ w).reshape(3, 4, 24) + b) + r,
        (X.reshape(12, 16), W, B, R),
        "relu, bias, residual",
    ),
    "rows put together": (
        lambda x, w, b, r: (x @ w).reshape(12, 24) + b + r,
        (X, W, B, R.reshape(12, 24)),
        "bias, residual",
    ),
    "a dimension of size 1": (lambda x, w, b: jnp.tanh((x @ w)[None] + b), (X, W, B), "tanh, bias"),
    "float32 inside": (
        lambda x, w, b: jax.nn.silu(jnp.dot(x, w, preferred_element_type=jnp.float32) + b).astype(BF16),
        (X, W, array(24, dtype=jnp.float32)),
        "silu, bias",
    ),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_linear_layers_are_found(name):
    function, args, detail = SPELLINGS[name]
    assert sites(function, *args) == [("linear", detail)]


@pytest.mark.parametrize(
    "name",
    ["relu", "maximum", "activation and residual", "several contracted", "rows taken apart", "rows put together"],
)
def test_values_and_gradients_are_those_of_the_program(name):
    function, args, _ = SPELLINGS[name]
    check(function, *args)


def test_layers_of_flax_are_found():
    layer = nnx.Linear(16, 24, dtype=BF16, rngs=nnx.Rngs(0))
    assert sites(lambda x: jax.nn.gelu(layer(x), approximate=False), X) == [("linear", "gelu_erf, bias")]
    dense = nn.Dense(24, dtype=BF16)
    parameters = dense.init(jax.random.key(0), X)
    assert sites(lambda p, x: jax.nn.relu(dense.apply(p, x)), parameters, X) == [("linear", "relu, bias")]


def test_a_gate_is_a_site_of_its_own(caplog):
    assert sites(lambda x, g, r: jax.nn.silu(x @ g) * r, X, W, R) == [("gated_silu", "")]
    assert not caplog.records


@jax.custom_jvp
def relu(x):
    return jnp.maximum(x, 0)


relu.defjvp(lambda primals, tangents: (relu(*primals), tangents[0]))  # passes gradients straight through

MISSES = {
    "the product alone": (lambda x, w: x @ w, (X, W)),
    "a bias along the rows": (lambda x, w, b: x @ w + b[:, None], (X, W, array(4))),
    "a scale in between": (lambda x, w, b: 2 * (x @ w) + b, (X, W, B)),
    "a constant for a bias": (lambda x, w: x @ w + 1, (X, W)),
    "a float32 result": (lambda x, w, b: jnp.dot(x, w, preferred_element_type=jnp.float32) + b, (X, W, B)),
    "a cast to another 16-bit type": (lambda x, w, b: (x @ w).astype(jnp.float16).astype(BF16) + b, (X, W, B)),
    "the product used twice": (lambda x, w, b: (x @ w + b, (x @ w).sum()), (X, W, B)),
    "a bias that is made of the product": (lambda x, w: (y := x @ w) + y.mean((0, 1)), (X, W)),
    "weights of a batch": (lambda x, w, r: jnp.einsum("btd,bdo->bto", x, w) + r, (X, array(3, 16, 24), R)),
    "float32": (lambda x, w, b: x @ w + b, tuple(a.astype(jnp.float32) for a in (X, W, B))),
    "features taken apart": (lambda x, w, b: (x @ w).reshape(3, 4, 2, 12) + b, (X, W, array(12))),
    "features and rows exchanged": (lambda x, w, b: (x @ w).reshape(3, 24, 4) + b, (X, W, array(4))),
    "repeated": (lambda x, w, b: jnp.broadcast_to((x @ w)[None], (2, 3, 4, 24)) + b, (X, W, B)),
    "a residual that is repeated": (lambda x, w, r: x @ w + jnp.broadcast_to(r, (3, 4, 24)), (X, W, array(4, 24))),
}


@pytest.mark.parametrize("name", MISSES)
def test_near_misses_are_refused(name):
    function, args = MISSES[name]
    assert not [op for op, _ in sites(function, *args) if op == "linear"]


def test_a_pre_activation_that_is_used_elsewhere_leaves_a_layer_without_the_activation():
    both = lambda x, w, b: (jax.nn.gelu(p := x @ w + b), p)  # noqa: E731
    assert sites(both, X, W, B) == [("linear", "bias"), ("gelu_tanh", "")]
    added = lambda x, w, b: jax.nn.gelu(p := x @ w + b) + p  # noqa: E731
    assert sites(added, X, W, B) == [("linear", "bias"), ("gelu_tanh", "")]


def test_a_users_derivative_of_relu_stays():
    assert sites(lambda x, w, b: relu(x @ w + b), X, W, B) == [("linear", "bias")]


def test_a_residual_of_a_norm_is_the_norms():
    def block(x, w, b, r, scale):
        total = (r + (x @ w + b)).astype(jnp.float32)
        mean_square = jnp.mean(total**2, -1, keepdims=True)
        return (total * jax.lax.rsqrt(mean_square + 1e-6) * scale).astype(BF16), total

    found = sites(block, X, W, B, R, array(24, dtype=jnp.float32))
    assert found[1:] == [("linear", "bias")] and "norm" in found[0][0]


def test_on_the_cpu_the_activation_is_fused_as_ever_and_the_layer_reported():
    function = lambda x, w, b: jax.nn.gelu(x @ w + b)  # noqa: E731
    with zenith.configured(use_cost=False):
        report = zenith.explain(function)(X, W, B)
    assert report.counts() == {"gelu_tanh": 1}
    assert [(s.op, s.reason) for s in report.refused] == [
        ("linear", "on the CPU a linear layer has a kernel for float32, not for bfloat16 x bfloat16")
    ]


def test_what_no_kernel_takes_is_refused():
    report = plan(Graph.of(jax.make_jaxpr(lambda x, w, b: x @ w + b)(X, array(16, 20), array(20))), ON_GPU)
    assert not report  # 20 is no multiple of 8


def test_layers_are_taken_where_the_table_has_them_ahead():
    ahead = lambda x, w, b: jax.nn.gelu(x @ w + b)  # noqa: E731
    many, few = (jax.ShapeDtypeStruct((rows, 768), BF16) for rows in (8192, 512))
    w, b = jax.ShapeDtypeStruct((768, 3072), BF16), jax.ShapeDtypeStruct((3072,), BF16)
    on_gpu = Context("cuda")
    assert sites(ahead, many, w, b, context=on_gpu) == [("linear", "gelu_tanh, bias")]
    assert sites(ahead, few, w, b, context=on_gpu) == []
    differentiated = dataclasses.replace(on_gpu, differentiated=True)
    assert sites(ahead, many, w, b, context=differentiated) == [("linear", "gelu_tanh, bias")]
    half = jax.ShapeDtypeStruct((2048, 768), BF16)
    assert sites(ahead, half, w, b, context=on_gpu) and not sites(ahead, half, w, b, context=differentiated)
    silu, back = (lambda x, w: jax.nn.silu(x @ w)), jax.ShapeDtypeStruct((3072, 768), BF16)
    assert sites(silu, jax.ShapeDtypeStruct((8192, 3072), BF16), back, context=on_gpu) == [("linear", "silu")]
    assert sites(silu, jax.ShapeDtypeStruct((8192, 3072), BF16), back, context=differentiated) == []
    exact = lambda x, w, b: jax.nn.gelu(x @ w + b, approximate=False)  # noqa: E731
    assert sites(exact, many, w, b, context=differentiated) == [("linear", "gelu_erf, bias")]
    assert sites(lambda x, w, b: x @ w + b, many, w, b, context=on_gpu) == []
    added, long = (lambda x, w, b, r: x @ w + b + r), jax.ShapeDtypeStruct((8192, 3072), BF16)
    short_product = (many, w, b, jax.ShapeDtypeStruct((8192, 3072), BF16))
    long_product = (long, *(jax.ShapeDtypeStruct(s, BF16) for s in ((3072, 768), (768,), (8192, 768))))
    assert sites(added, *short_product, context=on_gpu) == [("linear", "bias, residual")]
    assert sites(added, *long_product, context=on_gpu) == []
    assert sites(added, *short_product, context=differentiated) == []
    gated = lambda x, w, b: jax.nn.silu(x @ w) * (x @ w + b)  # noqa: E731
    assert ("linear", "silu") not in sites(gated, many, w, b, context=on_gpu)
