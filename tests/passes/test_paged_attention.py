"""Gathered pages before attention: the spellings that become attention over pages, and what does not."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fusion import *  # noqa: F403
from jax import lax

import zenith_jax as zenith

pytestmark = pytest.mark.skipif(
    jax.default_backend() != "cpu",
    reason="float32, which a GPU's kernel does not take; it has test_paged_attention_cuda.py",
)

B, T, H, K, D, PAGES, SIZE, M = 3, 1, 4, 2, 8, 7, 4, 5
S = M * SIZE


def arguments(t: int = T, dtype=jnp.float32):
    """Tables with entries from the end and, but for what fills them with NaN, beyond both ends."""
    rng = np.random.default_rng(20260110)
    q = rng.normal(size=(B, t, H, D))
    k, v = rng.normal(size=(2, PAGES, SIZE, K, D))
    tables = rng.integers(-PAGES, PAGES, size=(B, M))
    lengths = np.array([5, 20, 11])
    return [jnp.asarray(x, dtype) for x in (q, k, v)] + [jnp.asarray(x, jnp.int32) for x in (tables, lengths)]


def masked(lengths):
    return jnp.arange(S) < lengths[:, None, None, None]


def grouped(q, k, v, allowed):
    """q: (b, t, h, d); k, v: (b, s, k, d)."""
    b, t = q.shape[:2]
    logits = jnp.einsum("btkgd,bskd->bkgts", q.reshape(b, t, K, H // K, D), k) * D**-0.5
    logits = jnp.where(allowed[:, None], logits, -1e30)
    return jnp.einsum("bkgts,bskd->btkgd", jax.nn.softmax(logits, axis=-1).astype(v.dtype), v).reshape(q.shape)


def indexed(q, k, v, tables, lengths):
    k, v = (x[tables].reshape(B, S, K, D) for x in (k, v))
    return jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=lengths)


def taken(q, k, v, tables, lengths):
    k, v = (jnp.take(x, tables, axis=0).reshape(B, -1, K, D) for x in (k, v))
    return grouped(q, k, v, masked(lengths))


def clipped(q, k, v, tables, lengths):
    k, v = (jnp.take(x, tables, axis=0, mode="clip").reshape(B, -1, K, D) for x in (k, v))
    return grouped(q, k, v, masked(lengths))


def flat_and_repeated(q, k, v, tables, lengths):
    k, v = (jnp.repeat(x[tables.reshape(-1)].reshape(B, -1, K, D), H // K, axis=2) for x in (k, v))
    logits = jnp.einsum("bthd,bshd->bhts", q * D**-0.5, k) + jnp.where(masked(lengths), 0, -jnp.inf)
    return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(logits, axis=-1), v)


def heads_first_by_vmap(q, k, v, tables, lengths):
    """As JAX's Pallas kernel has its pages, and its reference."""
    k, v = (jnp.moveaxis(x, 2, 0) for x in (k, v))

    def one(q, table, length):
        keys, values = (x[:, table].reshape(K, S, D) for x in (k, v))
        logits = jnp.einsum("kgd,ksd->kgs", q.reshape(K, H // K, D), keys) * D**-0.5
        logits = jnp.where(jnp.arange(S) < length, logits, jnp.finfo(jnp.float32).min)
        return jnp.einsum("kgs,ksd->kgd", jax.nn.softmax(logits, axis=-1), values).reshape(1, H, D)

    return jax.vmap(one)(q[:, 0], tables, lengths)


def heads_second(q, k, v, tables, lengths):
    k, v = (x.swapaxes(1, 2)[tables].swapaxes(2, 3).reshape(B, S, K, D) for x in (k, v))
    return grouped(q, k, v, masked(lengths))


def causal_window_and_sinks(q, k, v, tables, lengths):
    """Speculative tokens: query i stands at length - t + i."""
    k, v = (x[tables].reshape(B, S, K, D) for x in (k, v))
    k, v = (jnp.repeat(x, H // K, axis=2) for x in (k, v))
    logits = 5.0 * jnp.tanh(jnp.einsum("bthd,bshd->bhts", q, k) / 5.0)
    position = (lengths[:, None] - q.shape[1] + jnp.arange(q.shape[1]))[:, None, :, None]
    s = jnp.arange(S)
    logits = jnp.where((s <= position) & (s > position - 6), logits, -1e30)
    sinks = jnp.broadcast_to(jnp.arange(H, dtype=q.dtype)[None, :, None, None], (*logits.shape[:-1], 1))
    p = jax.nn.softmax(jnp.concatenate([logits, sinks], axis=-1), axis=-1)[..., :-1]
    return jnp.einsum("bhts,bshd->bthd", p, v)


def several_queries_of_grouped_heads(q, k, v, tables, lengths):
    """As many queries as heads share keys: the mask alone says which is which."""
    k, v = (x[tables].reshape(B, S, K, D) for x in (k, v))
    position = lengths[:, None] - q.shape[1] + jnp.arange(q.shape[1])
    return jax.nn.dot_product_attention(q, k, v, mask=(jnp.arange(S) <= position[..., None])[:, None])


def without_mask(q, k, v, tables, lengths):
    del lengths
    return grouped(q, *(x[tables].reshape(B, S, K, D) for x in (k, v)), jnp.ones((1, 1, 1, S), bool))


SPELLINGS = [
    indexed,
    taken,
    clipped,
    flat_and_repeated,
    heads_first_by_vmap,
    heads_second,
    causal_window_and_sinks,
    several_queries_of_grouped_heads,
    without_mask,
]
QUERIES = {causal_window_and_sinks: 3, several_queries_of_grouped_heads: H // K}


@pytest.mark.parametrize("function", SPELLINGS, ids=lambda f: f.__name__)
def test_pages_are_looked_up_and_no_copy_is_made(function):
    args = arguments(t=QUERIES.get(function, T))
    report = zenith.explain(function)(*args)
    assert report.counts() == {"paged_attention": 1}, str(report)
    assert "pages of 4" in str(report)
    # Keys and values of all entries, written and read, at least.
    assert report.fused[0].bytes_saved >= 2 * 2 * 4 * B * S * K * D
    fused = zenith.fuse(function)
    assert "gather" not in str(jax.make_jaxpr(fused)(*args))
    np.testing.assert_allclose(jax.jit(fused)(*args), jax.jit(function)(*args), rtol=2e-5, atol=2e-6)


def test_entries_beyond_the_pages_mean_what_the_gather_says():
    q, k, v, tables, lengths = arguments()
    tables = tables.at[:, 0].set(PAGES).at[0, 1].set(-PAGES - 1)
    lengths = lengths.at[1].set(0)
    for function in (indexed, taken, clipped):
        actual, expected = (jax.jit(f)(q, k, v, tables, lengths) for f in (zenith.fuse(function), function))
        if function is taken:  # NaN, where they are seen; plain JAX's masked values are 0 * NaN besides
            assert np.isnan(actual[0]).all() and np.isnan(actual[2]).all()
            assert np.isnan(expected[0]).all()
        else:
            np.testing.assert_allclose(actual, expected, rtol=2e-5, atol=2e-6)
    negative = jnp.where(tables < 0, -1, tables)
    actual, expected = (f(q, k, v, negative, lengths) for f in (jax.jit(zenith.fuse(clipped)), jax.jit(clipped)))
    np.testing.assert_allclose(actual, expected, rtol=2e-5, atol=2e-6)  # -1 is page 0 there


def test_vmap_scan_and_gradients_are_right(check_fused):
    args = arguments()
    check_fused(indexed, *args, counts={"paged_attention": 1})

    def steps(q, k, v, tables, lengths):
        """Each step writes its key to its page before it attends."""

        def step(carry, i):
            k, v = carry
            where = tables[jnp.arange(B), lengths // SIZE], lengths % SIZE
            k, v = (x.at[where].set(q[:, 0, :K] * i) for x in (k, v))
            return (k, v), indexed(q * i, k, v, tables, lengths + 1)

        return lax.scan(step, (k, v), jnp.arange(1.0, 3.0))[1]

    args[4] = args[4] % S
    report = zenith.explain(steps)(*args)
    assert report.counts() == {"paged_attention": 1}, str(report)
    np.testing.assert_allclose(
        jax.jit(zenith.fuse(steps))(*args), jax.jit(steps)(*args), rtol=2e-5, atol=2e-6
    )  # fmt: skip
    args[3] = args[3] % PAGES
    mapped = jax.vmap(zenith.fuse(indexed), (0, None, None, None, 0))
    q, lengths = (jnp.stack([x, x[::-1]]) for x in (args[0], args[4]))
    expected = jnp.stack([indexed(a, *args[1:4], n) for a, n in zip(q, lengths, strict=True)])
    np.testing.assert_allclose(mapped(q, *args[1:4], lengths), expected, rtol=2e-5, atol=2e-6)


def test_by_default_a_gradient_gathers():
    with zenith.configured(use_cost=True):
        report = zenith.explain(jax.grad(lambda *a: indexed(*a).sum()))(*arguments())
    assert "paged_attention" not in report.counts()


# --- what is left to attention ----------------------------------------------------------------------------------------


def other_table(q, k, v, tables, lengths):
    k, v = k[tables].reshape(B, S, K, D), v[tables[::-1]].reshape(B, S, K, D)
    return jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=lengths)


def tokens_before_pages(q, k, v, tables, lengths):
    k, v = (x[tables].swapaxes(1, 2).reshape(B, S, K, D) for x in (k, v))
    return jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=lengths)


def values_in_another_order(q, k, v, tables, lengths):
    k, v = k[tables].reshape(B, S, K, D), v[tables].swapaxes(1, 2).reshape(B, S, K, D)
    return jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=lengths)


def mask_of_keys(q, k, v, tables, lengths):
    k, v = (x[tables].reshape(B, S, K, D) for x in (k, v))
    return jax.nn.dot_product_attention(q, k, v, mask=(jnp.sin(lengths[:, None] * jnp.arange(S)) < 0.5)[:, None, None])


def biased(q, k, v, tables, lengths):
    k, v = (x[tables].reshape(B, S, K, D) for x in (k, v))
    return jax.nn.dot_product_attention(
        q, k, v, bias=-0.1 * jnp.arange(S, dtype=q.dtype)[None, None, None] * lengths[0]
    )


def returned(q, k, v, tables, lengths):
    k, v = (x[tables].reshape(B, S, K, D) for x in (k, v))
    return jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=lengths), k + 1


def of_a_slice(q, k, v, tables, lengths):
    """XLA slices what it gathers; a kernel would have all pages copied."""
    k, v = (jnp.stack([x, x])[1] for x in (k, v))
    return indexed(q, k, v, tables, lengths)


def scaled_pages(q, k, v, tables, lengths):
    return indexed(q, k * lengths[0].astype(k.dtype), v, tables, lengths)


def parts_of_pages(q, k, v, tables, lengths):
    k, v = (jax.vmap(lambda i, x=x: lax.dynamic_slice(x, (i, 0, 0, 0), (2, SIZE, K, D)))(tables[:, 0]) for x in (k, v))
    return jax.nn.dot_product_attention(q, *(x.reshape(B, 2 * SIZE, K, D) for x in (k, v)))


def shifted_wrap(q, k, v, tables, lengths):
    """Negative entries count from another place than the end: the index is as it is."""
    tables = jnp.where(tables < 0, tables + PAGES - 1, tables)
    return clipped(q, k, v, tables, lengths)


@pytest.mark.parametrize(
    "function, reason",
    [
        (other_table, "different tables"),
        (tokens_before_pages, "one page after the other"),
        (values_in_another_order, None),
        (mask_of_keys, "more than an interval"),
        (biased, "a bias"),
        (returned, "used elsewhere"),
        (of_a_slice, "the pages are computed by"),
        (scaled_pages, "the pages are computed by `mul`"),
        (parts_of_pages, None),
    ],
    ids=lambda x: getattr(x, "__name__", None),
)
def test_left_to_attention_with_the_reason(function, reason):
    args = arguments()
    report = zenith.explain(function)(*args)
    assert "paged_attention" not in report.counts(), str(report)
    assert reason is None or reason in " ".join(s.detail for s in report.fused), str(report)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6),
        jax.jit(zenith.fuse(function))(*args),
        jax.jit(function)(*args),
    )


def test_an_index_that_is_no_wrap_is_taken_as_it_is():
    args = arguments()
    assert zenith.explain(shifted_wrap)(*args).counts() == {"paged_attention": 1}
    np.testing.assert_allclose(
        jax.jit(zenith.fuse(shifted_wrap))(*args), jax.jit(shifted_wrap)(*args), rtol=2e-5, atol=2e-6
    )


def test_pages_of_another_dtype_than_the_products_are_gathered():
    def function(q, k, v, tables, lengths):
        return indexed(q, k.astype(jnp.float32), v.astype(jnp.float32), tables, lengths)

    def cast_after(q, k, v, tables, lengths):
        k, v = (x[tables].astype(jnp.float32).reshape(B, S, K, D) for x in (k, v))
        return jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=lengths)

    q, k, v, *rest = arguments()
    for f in (function, cast_after):
        report = zenith.explain(f)(q, k.astype(jnp.bfloat16), v.astype(jnp.bfloat16), *rest)
        assert "cast the query" in str(report) or "convert_element_type" in str(report), str(report)
        assert "paged_attention" not in report.counts()
