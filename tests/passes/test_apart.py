"""Products of one operand that feed a kernel stay products of their own on a GPU."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import zenith_jax as zenith
from zenith_jax.passes import apart


def barriers(function, *args, platform="cuda") -> list[int]:
    """Results of each optimization barrier in the rewritten program."""
    with zenith.configured(platform=platform, use_cost=True):
        jaxpr = jax.make_jaxpr(zenith.fuse(function))(*args)
    return [len(e.outvars) for e in jaxpr.eqns if e.primitive.name == "optimization_barrier"]


def attention_of(x, weights, biases):
    q, k, v = ((x @ w + b).reshape(*x.shape[:2], 4, 64) for w, b in zip(weights, biases, strict=True))
    return jax.nn.dot_product_attention(q, k, v)


def arguments(b=8, t=1024, dtype=jnp.bfloat16):
    x, w, bias = (jax.ShapeDtypeStruct(shape, dtype) for shape in ((b, t, 256), (256, 256), (256,)))
    return x, [w] * 3, [bias] * 3


def test_query_key_and_value_are_three_products():
    assert barriers(attention_of, *arguments()) == [3]
    gradient = jax.grad(lambda *a: attention_of(*a).astype(jnp.float32).sum(), (0, 1, 2))
    assert barriers(gradient, *arguments())[0] == 3


def test_stock_flax_attention_is():
    module = nnx.MultiHeadAttention(4, 256, dtype=jnp.bfloat16, decode=False, rngs=nnx.Rngs(0))
    graph, state = nnx.split(module)
    x = jax.ShapeDtypeStruct((8, 1024, 256), jnp.bfloat16)
    assert barriers(lambda state, x: nnx.merge(graph, state)(x), state, x) == [3]


@pytest.mark.parametrize(
    ("function", "args", "platform"),
    [
        (attention_of, arguments(), "cpu"),
        (attention_of, arguments(b=1), "cuda"),  # small
        (lambda x, ws, bs: [x @ w + b for w, b in zip(ws, bs, strict=True)], arguments(), "cuda"),  # no kernel
        (  # of three operands
            lambda x, ws, bs: jax.nn.dot_product_attention(
                *((y @ w + b).reshape(*x.shape[:2], 4, 64) for y, w, b in zip((x, x * 2, x * 3), ws, bs, strict=True))
            ),
            arguments(),
            "cuda",
        ),
    ],
    ids=["on a CPU", "small", "without a kernel", "of three operands"],
)
def test_others_stay_as_they_are(function, args, platform):
    assert barriers(function, *args, platform=platform) == []


def test_the_function_is_the_same(monkeypatch):
    monkeypatch.setattr(apart, "LEAST_BYTES", 1)
    rng = np.random.default_rng(0)
    args = jax.tree.map(
        lambda s: jnp.asarray(rng.normal(size=s.shape) * 0.1, jnp.float32), arguments(1, 16, jnp.float32)
    )
    monkeypatch.setattr("zenith_jax.passes.choose.cuda._LOGITS", 1)
    expected = attention_of(*args)
    with zenith.configured(platform="cuda", use_cost=True), jax.default_matmul_precision("highest"):
        jaxpr = jax.make_jaxpr(zenith.fuse(attention_of))(*args)
        assert any(e.primitive.name == "optimization_barrier" for e in jaxpr.eqns)
        found = jax.core.eval_jaxpr(jaxpr.jaxpr, jaxpr.consts, *jax.tree.leaves(args))
    np.testing.assert_allclose(found[0], expected, atol=1e-5)
