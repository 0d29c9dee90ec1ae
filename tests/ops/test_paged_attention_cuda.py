"""Attention over pages on a GPU, through JAX: the op and what is rewritten to it, against the gathered formula."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from formulas import paged_attention

import zenith_jax as zenith
from zenith_jax import ops

pytestmark = pytest.mark.gpu

B, H, K = 3, 8, 2
EACH = pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=lambda d: d.__name__)


def arguments(dtype, t, page, d, heads_axis=2, s=640):
    rng = np.random.default_rng(20260111)
    m = s // page
    pages = B * m + 2
    q = rng.normal(size=(B, t, H, d))
    k, v = (np.moveaxis(x, 2, heads_axis) for x in rng.normal(size=(2, pages, page, K, d)))
    tables = rng.permutation(pages)[: B * m].reshape(B, m) - pages
    return [jnp.asarray(x, dtype) for x in (q, k, v)] + [
        jnp.asarray(tables, jnp.int32),
        jnp.asarray([s, 0, s // 2 + 3], jnp.int32),
    ]


def check(actual, args, dtype, **options):
    wide = [x.astype(jnp.float32) for x in args[:3]]
    with jax.default_matmul_precision("highest"):
        expected = np.asarray(paged_attention(*wide, *args[3:], **options))
    error = np.linalg.norm(np.asarray(actual, np.float32) - expected) / np.linalg.norm(expected)
    assert error < 4 * float(jnp.finfo(dtype).eps), error


@EACH
@pytest.mark.parametrize(
    ("t", "page", "d", "heads_axis"), [(1, 16, 128, 2), (5, 32, 64, 0), (16, 64, 128, 1), (2, 128, 256, 2)]
)
def test_the_kernel_is_called_and_right(dtype, t, page, d, heads_axis):
    args = arguments(dtype, t, page, d, heads_axis)
    options = dict(heads_axis=heads_axis, softcap=5.0 if d == 64 else None, local_window_size=100 if t == 5 else None)
    function = jax.jit(lambda *a: ops.paged_attention(*a, **options))
    assert "zenith_paged_attention_fwd" in function.lower(*args).as_text()
    actual = function(*args)
    np.testing.assert_array_equal(actual[1], 0)
    check(actual, args, dtype, **options)


@EACH
def test_pages_that_the_kernel_does_not_take_are_gathered(dtype):
    args = arguments(dtype, 2, 40, 128)
    function = jax.jit(ops.paged_attention)
    assert "zenith_paged_attention_fwd" not in function.lower(*args).as_text()
    check(function(*args), args, dtype)


def test_gathered_pages_in_a_program_become_the_kernel():
    args = arguments(jnp.bfloat16, 1, 16, 128)

    def step(q, k, v, tables, lengths):
        k, v = (x[tables].reshape(B, -1, K, 128) for x in (k, v))
        return jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=lengths)

    args[4] = args[4].at[1].set(7)  # plain JAX has the mean of all values where there is no key
    with zenith.configured(use_cost=False):
        fused = zenith.jit(step)
        assert "zenith_paged_attention_fwd" in fused.lower(*args).as_text()
        check(fused(*args), args, jnp.bfloat16)
        mapped = jax.vmap(zenith.fuse(step), (0, None, None, None, None))
        check(jax.jit(mapped)(jnp.stack([args[0]] * 2), *args[1:])[1], args, jnp.bfloat16)
