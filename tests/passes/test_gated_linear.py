"""A gate and its value as one kernel of both products: which spellings are one, and what is not.

The kernel is for GPUs; as in test_linear.py the rewriter is told that it writes for one.
"""

from __future__ import annotations

import jax
import jax.extend.core as jec
import jax.numpy as jnp
import numpy as np
import pytest
from fusion import value_and_gradients
from mutants import Program, mutants
from numerics import assert_error_ratio, in_float64

from zenith_jax.ir.graph import Graph
from zenith_jax.passes.rewrite import Context, plan, rewrite

BF16 = jnp.bfloat16
ON_GPU = Context("cuda", use_cost=False)


def array(*shape, seed=0, dtype=BF16):
    rng = np.random.default_rng(seed + sum(shape))
    return jnp.asarray(rng.normal(size=shape) * shape[-1] ** -0.25, dtype)


X, W, V = array(3, 4, 16), array(16, 24), array(16, 24, seed=1)


def sites(function, *args, context=ON_GPU):
    return [(m.op, m.detail) for m in plan(Graph.of(jax.make_jaxpr(function)(*args)), context)]


def in_float32(x, w, v):
    gate, value = ((x @ a).astype(jnp.float32) for a in (w, v))
    return (jax.nn.silu(gate) * value).astype(BF16)


SPELLINGS = {
    "silu": (lambda x, w, v: jax.nn.silu(x @ w) * (x @ v), (X, W, V), "silu"),
    "value first": (lambda x, w, v: (x @ v) * jax.nn.gelu(x @ w, approximate=False), (X, W, V), "gelu_erf"),
    "in float32": (in_float32, (X, W, V), "silu"),
    "weights (n, k)": (
        lambda x, w, v: jax.nn.gelu(x @ w.T) * jnp.einsum("btk,nk->btn", x, v),
        (X, array(24, 16), array(24, 16, seed=1)),
        "gelu_tanh",
    ),
    "several features": (
        lambda x, w, v: jax.nn.silu(jnp.einsum("btd,dhe->bthe", x, w)) * jnp.einsum("btd,dhe->bthe", x, v),
        (X, array(16, 3, 8), array(16, 3, 8, seed=1)),
        "silu",
    ),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_spelling(name):
    function, args, detail = SPELLINGS[name]
    assert sites(function, *args) == [("gated_linear", detail)]
    primal = jax.make_jaxpr(function)(*args)
    fused = lambda *a: jec.jaxpr_as_fun(rewrite(primal, ON_GPU))(*a)[0]  # noqa: E731
    assert "gated_linear_fwd" in str(jax.make_jaxpr(fused)(*args))
    both, plain = value_and_gradients(fused), value_and_gradients(function)
    assert "gated_linear_pre_fwd" in str(jax.make_jaxpr(both)(*args))
    if name in ("silu", "weights (n, k)"):
        assert_error_ratio(jax.jit(both)(*args), jax.jit(plain)(*args), in_float64(plain)(*args), floor_ulps=8.0)


def returned(x, w, v):
    gate = x @ w
    return jax.nn.silu(gate) * (x @ v), gate


def one_product(x, w, v):
    y = x @ w
    return jax.nn.silu(y) * y


NONE = {
    "another x": lambda x, w, v: jax.nn.silu(x @ w) * ((x + 1) @ v),
    "a bias of the gate": lambda x, w, v: jax.nn.silu(x @ w + v[0]) * (x @ v),
    "a bias of the value": lambda x, w, v: jax.nn.silu(x @ w) * (x @ v + w[0]),
    "a value that is no product": lambda x, w, v: jax.nn.silu(x @ w) * (x @ v)[::-1],
    "weights of another layout": lambda x, w, v: jax.nn.silu(x @ w) * (x @ v.reshape(24, 16).T),
    "a gate that is returned": returned,
    "one product for both": one_product,
    "float32": lambda x, w, v: jax.nn.silu(x.astype(jnp.float32) @ w.astype(jnp.float32)) * (x @ v),
}


@pytest.mark.parametrize("name", NONE)
def test_no_gated_linear(name):
    found = [op for op, _ in sites(NONE[name], X, W, V)]
    assert "gated_linear" not in found and "gated_silu" in found, found


def test_no_mutant_is_computed_as_another_function():
    """Axes, operands, primitives, literals: what is found after one was changed computes what was written, within a few
    roundings to bfloat16 of the largest value; a wrong function is off by as much as the values are."""
    x, w, v = array(16, 16), array(16, 16), array(16, 16, seed=1)
    program = Program.trace(lambda x, w, v: jax.nn.silu(x @ w) * (x @ v), (x, w, v))
    taken = 0
    for what, mutant in mutants(program):
        try:
            written = jax.make_jaxpr(mutant)(x, w, v)
        except Exception:  # no valid program: JAX's own rules refuse it
            continue
        if "gated_linear" not in [m.op for m in plan(Graph.of(written), ON_GPU)]:
            continue
        taken += 1
        found, plain = (
            [np.asarray(y, np.float64) for y in f(x, w, v)]
            for f in (jec.jaxpr_as_fun(rewrite(written, ON_GPU)), mutant)
        )
        for y, wanted in zip(found, plain, strict=True):
            np.testing.assert_allclose(y, wanted, rtol=0, atol=4 * 2.0**-8 * np.abs(wanted).max(), err_msg=what)
    assert taken > 0


def test_on_a_cpu_the_gate_is_a_site_of_its_own():
    function, args, _ = SPELLINGS["silu"]
    assert sites(function, *args, context=Context("cpu", use_cost=False)) == [("gated_silu", "")]


def test_it_is_taken_where_the_table_has_it_ahead():
    function, args, _ = SPELLINGS["silu"]
    many = [jax.ShapeDtypeStruct(s, BF16) for s in ((2048, 768), (768, 3072), (768, 3072))]
    assert sites(function, *many, context=Context("cuda")) == [("gated_linear", "silu")]
    assert sites(function, *args, context=Context("cuda")) == []
