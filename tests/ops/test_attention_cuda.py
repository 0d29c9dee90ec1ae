"""Attention's CUDA kernels through JAX, at sizes that take the tensor cores: against the same formula in float64.

The programs of tests/cuda compare kernel by kernel with naive ones; here is what JAX adds, and what those share with
the fast kernels: what the log-sum-exp of a row keeps where a bias moves it far from 0.
"""

from __future__ import annotations

import functools as ft

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zenith_jax as zenith
from zenith_jax import ops

pytestmark = pytest.mark.gpu

B, T, H, D = 2, 200, 4, 64
LOWEST = float(np.finfo(np.float32).min)


def arrays(dtype, t=T, s=T, k=H):
    shapes = [(B, t, H, D), (B, s, k, D), (B, s, k, D), (B, t, H, D)]
    return [jax.random.normal(jax.random.key(i), shape, dtype) for i, shape in enumerate(shapes)]


def formula(q, k, v, *, bias=0.0, allowed=True, softcap=None, sinks=None, rounded=False):
    """In the dtype of q; rounded: logits in float32, as every implementation has them, then wider."""
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    logits = jnp.einsum("bthd,bshd->bhts", q, k) * D**-0.5
    if softcap:
        logits = softcap * jnp.tanh(logits / softcap)
    logits = logits + bias
    if rounded:
        logits = logits + jax.lax.stop_gradient(jax.lax.reduce_precision(logits, 8, 23) - logits)
    logits = jnp.where(allowed, logits, -jnp.inf)
    if sinks is not None:
        column = jnp.broadcast_to(sinks[:, None, None], (*logits.shape[:-1], 1)).astype(logits.dtype)
        logits = jnp.concatenate([logits, column], -1)
    p = jax.nn.softmax(logits, axis=-1)[..., : k.shape[1]]
    return jnp.einsum("bhts,bshd->bthd", p, v)


def check(function, expected, arguments, dout, dtype):
    """Value and all gradients, relative to their size: 4 roundoffs of the dtype, as tests/cuda/attention_test.cu."""

    def both(f, *args):
        out, vjp = jax.vjp(f, *args)
        return (out, *vjp(dout.astype(out.dtype)))

    found = jax.jit(ft.partial(both, function))(*arguments)
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(x, np.float64)) for x in arguments]
        want = jax.jit(ft.partial(both, expected))(*wide)
    for a, b in zip(found, want, strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        error = np.linalg.norm(a - b) / np.linalg.norm(b)
        assert error < 4 * float(jnp.finfo(dtype).eps) + 1e-5, error


DTYPES = pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16], ids=lambda d: d.__name__)


@DTYPES
@pytest.mark.parametrize("fill", [-1e9, -1e30, LOWEST], ids="{:.0e}".format)
def test_gradients_of_rows_that_a_finite_bias_masks_wholly(fill, dtype):
    q, k, v, dout = arrays(dtype)
    bias = np.where(np.random.default_rng(0).random((B, 1, T, T)) < 0.5, 0.0, fill)
    bias[:, :, ::3] = fill
    bias[:, :, ::6] += 0 if fill == LOWEST else 0.25 * fill * (np.arange(T) % 2)  # half of the row far below
    bias = jnp.asarray(bias, jnp.float32)
    check(ft.partial(ops.attention, bias=bias), ft.partial(formula, bias=bias, rounded=True), (q, k, v), dout, dtype)


@DTYPES
def test_gradient_of_a_bias_under_a_cap(dtype):
    q, k, v, dout = arrays(dtype)
    bias = jax.random.normal(jax.random.key(7), (H, T, T))
    check(
        lambda q, k, v, bias: ops.attention(q, k, v, bias=bias, softcap=2.0),
        lambda q, k, v, bias: formula(q, k, v, bias=bias, softcap=2.0),
        (q, k, v, bias),
        dout,
        dtype,
    )


@DTYPES
def test_gradient_of_sinks(dtype):
    q, k, v, dout = arrays(dtype)
    sinks = jnp.arange(H, dtype=jnp.float32)
    check(
        lambda q, k, v, sinks: ops.attention(q, k, v, sinks=sinks),
        lambda q, k, v, sinks: formula(q, k, v, sinks=sinks),
        (q, k, v, sinks),
        dout,
        dtype,
    )


@DTYPES
def test_lengths_and_segments(dtype):
    q, k, v, dout = arrays(dtype, k=2)
    lengths, segments = jnp.array([37, T]), jnp.arange(B * T).reshape(B, T) // 70
    segments = segments.at[1, 5].set(99)
    same = segments[:, None, :, None] == segments[:, None, None]
    allowed = same & (jnp.arange(T) < lengths[:, None])[:, None, None]
    live = jnp.any(allowed, -1)[:, 0, :, None, None]  # a query without a key has the mean of all values
    structure = dict(key_lengths=lengths, query_segments=segments, key_segments=segments)
    check(
        lambda q, k, v: jnp.where(live, ops.attention(q, k, v, **structure), 0),
        lambda q, k, v: jnp.where(live, formula(q, k, v, allowed=jnp.where(live[:, None, :, :, 0], allowed, True)), 0),
        (q, k, v),
        dout,
        dtype,
    )


@pytest.mark.parametrize("t", [1, 3, 16])
def test_decoding_with_a_cache_is_as_exact_as_the_formula(t):
    q, k, v, _ = arrays(jnp.bfloat16, t=t, s=3000, k=2)
    lengths = jnp.array([2900, 17])
    found = jax.jit(zenith.fuse(lambda *a: ops.attention(*a, key_lengths=lengths)))(q, k, v)
    allowed = (jnp.arange(3000) < lengths[:, None])[:, None, None]
    want = formula(*(x.astype(jnp.float32) for x in (q, k, v)), allowed=allowed)
    assert np.linalg.norm(found.astype(jnp.float32) - want) < 4 * 2**-8 * np.linalg.norm(want)
