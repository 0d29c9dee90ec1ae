"""Attention over pages: what is read, what entries mean, transformations. Values in all dtypes: test_conformance.py."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from formulas import paged_attention
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from numerics import assert_error_ratio, in_float64

from zenith_jax import ops
from zenith_jax.errors import DTypeError, ShapeError

pytestmark = pytest.mark.skipif(
    jax.default_backend() != "cpu",
    reason="float32, which a GPU's kernel does not take; it has test_paged_attention_cuda.py",
)

B, T, H, K, D, PAGES, SIZE, M = 3, 2, 4, 2, 8, 16, 4, 5
LENGTHS = np.array([7, 0, 18], np.int32)


def arguments(seed: int = 20260109):
    """Each sequence has its own pages; entries behind its length are those of page 0, which is nobody's."""
    rng = np.random.default_rng(seed)
    q = rng.normal(size=(B, T, H, D))
    k, v = rng.normal(size=(2, PAGES, SIZE, K, D))
    tables = 1 + rng.permutation(PAGES - 1)[: B * M].reshape(B, M)
    tables[np.arange(M) * SIZE >= LENGTHS[:, None]] = 0
    return [jnp.asarray(x, jnp.float32) for x in (q, k, v)] + [jnp.asarray(tables, jnp.int32), jnp.asarray(LENGTHS)]


def test_pages_behind_the_length_are_not_read():
    q, k, v, tables, lengths = arguments()
    expected = ops.paged_attention(q, k, v, tables, lengths)
    unused = np.setdiff1d(np.arange(PAGES), np.asarray(tables)[np.arange(M) * SIZE < LENGTHS[:, None]])
    assert 0 in unused
    k, v = (x.at[unused].set(jnp.nan) for x in (k, v))
    anything = jnp.where(tables == 0, jnp.array([0, -1 << 31, (1 << 31) - 1, -1, 99]), tables)
    np.testing.assert_array_equal(ops.paged_attention(q, k, v, anything, lengths), expected)
    np.testing.assert_array_equal(expected[1], 0)  # a length of 0


def test_entries_are_taken_as_an_index_is():
    q, k, v, tables, _ = arguments()
    lengths = jnp.full((B,), M * SIZE)
    tables = tables.at[:, 1].set(-3).at[:, 2].set(1000).at[:, 3].set(-1000)
    actual = ops.paged_attention(q, k, v, tables, lengths)
    np.testing.assert_allclose(actual, paged_attention(q, k, v, tables, lengths), rtol=1e-5, atol=1e-6)
    inside = tables.at[:, 1].set(PAGES - 3).at[:, 2].set(PAGES - 1).at[:, 3].set(0)
    np.testing.assert_array_equal(actual, ops.paged_attention(q, k, v, inside, lengths))


@pytest.mark.parametrize("heads_axis", [0, 1, 2])
def test_pages_are_read_where_they_lie(heads_axis):
    q, k, v, tables, lengths = arguments()
    k, v = (jnp.moveaxis(x, 2, heads_axis) for x in (k, v))
    text = jax.jit(lambda *a: ops.paged_attention(*a, heads_axis=heads_axis)).lower(q, k, v, tables, lengths).compile()
    for line in text.as_text().splitlines():
        made = re.search(r"= f32\[([\d,]+)\]\S* (copy|transpose|fusion)\(", line)
        assert not made or np.prod([int(n) for n in made[1].split(",")]) < k.size, line


def test_length_beyond_the_table_is_the_table():
    q, k, v, tables, _ = arguments()
    full, more = (ops.paged_attention(q, k, v, tables, jnp.full((B,), n), is_causal=False) for n in (M * SIZE, 10**9))
    np.testing.assert_array_equal(full, more)


@pytest.mark.parametrize("heads_axis", [0, 1, 2])
def test_one_query_in_any_layout_of_pages(heads_axis):
    q, k, v, tables, lengths = arguments()
    sinks = jnp.arange(H) * 0.3
    expected = ops.attention(
        q[:, :1],
        *(x[tables].reshape(B, M * SIZE, K, D) for x in (k, v)),
        key_lengths=lengths,
        softcap=3.0,
        scale=0.7,
        sinks=sinks,
    )
    k, v = (jnp.moveaxis(x, 2, heads_axis) for x in (k, v))
    options = dict(heads_axis=heads_axis, softcap=3.0, scale=0.7, sinks=sinks)
    actual = ops.paged_attention(q[:, 0], k, v, tables.astype(jnp.uint8), lengths, **options)
    np.testing.assert_allclose(actual, expected[:, 0], rtol=1e-5, atol=1e-6)


def test_vmap_over_sequences_shares_the_pages():
    q, k, v, tables, lengths = arguments()
    one = lambda q, tables, n: ops.paged_attention(q[None], k, v, tables[None], n[None])[0]  # noqa: E731
    mapped = jax.vmap(one)
    np.testing.assert_allclose(
        mapped(q, tables, lengths), ops.paged_attention(q, k, v, tables, lengths), rtol=1e-6, atol=1e-6
    )
    text = str(jax.make_jaxpr(mapped)(q, tables, lengths))
    (call,) = re.findall(r"zenith_call\[.*?\] (.*)", text, re.DOTALL)
    assert "gather" not in text and not re.search(rf"f32\[{B},(\d+,)*{PAGES},", text), call


@pytest.mark.parametrize("axes", [(0, 0, 0, 0, 0), (None, 0, 0, None, None), (1, None, 0, 0, None)])
def test_vmap_over_pools_is_one_call(axes):
    args = arguments()
    mapped = [
        x if a is None else jnp.stack([x, jnp.roll(x, 1, -1)], a) for x, a in zip(args, axes, strict=True)
    ]  # fmt: skip
    actual = jax.vmap(ops.paged_attention, axes)(*mapped)
    for i in range(2):
        one = [x if a is None else jnp.take(x, i, a) for x, a in zip(mapped, axes, strict=True)]
        np.testing.assert_allclose(actual[i], paged_attention(*one), rtol=1e-5, atol=1e-6)


def test_gradients_and_tangents_are_those_of_the_gathered_pages():
    args = arguments()

    def both(function):
        def of_floats(q, k, v):
            return jnp.sum(jnp.sin(function(q, k, v, *args[3:]) * (1 + jnp.arange(D))))

        def run(*floats):
            forward = jax.jvp(of_floats, floats, floats)[1]
            return forward, jax.grad(of_floats, (0, 1, 2))(*floats)

        return run

    fused, plain = (jax.jit(both(f))(*args[:3]) for f in (ops.paged_attention, paged_attention))
    assert_error_ratio(fused, plain, in_float64(both(paged_attention))(*args[:3]), floor_ulps=16)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("name", ["heads", "sequences"])
def test_sharded_arguments_are_right_and_heads_stay_on_their_device(name, kind):
    if jax.device_count() < 2:
        pytest.skip("needs 2 devices")
    args = arguments()
    mesh = jax.make_mesh((2,), ("x",), axis_types=(kind,), devices=jax.devices()[:2])
    args = [jnp.concatenate([a, a[:1]]) if i not in (1, 2) else a for i, a in enumerate(args)]  # 4 sequences
    q, pages, rows = (
        (P(None, None, "x"), P(None, None, "x"), P()) if name == "heads" else (P("x"), P(), P("x"))
    )  # fmt: skip
    specs = [q, pages, pages, rows, rows]
    placed = [jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip(args, specs, strict=True)]
    with jax.set_mesh(mesh):
        compiled = jax.jit(ops.paged_attention, out_shardings=NamedSharding(mesh, q)).lower(*placed).compile()
    np.testing.assert_allclose(compiled(*placed), paged_attention(*args), rtol=1e-5, atol=1e-6)
    if name == "heads":
        assert not re.search(r"all-gather|all-to-all|collective-permute|all-reduce", compiled.as_text())


def refused(change: dict[str, object], error: type[Exception], text: str, **options):
    given = dict(zip(("query", "key_pages", "value_pages", "block_tables", "lengths"), arguments(), strict=True))
    with pytest.raises(error, match=re.escape(text)):
        ops.paged_attention(**(given | change), **options)


def test_errors_name_the_invariant_and_what_came():
    q, k, v, tables, lengths = arguments()
    refused({}, ShapeError, "heads_axis must be 2 for pages", heads_axis=3)
    refused({"key_pages": k[0]}, ShapeError, "pages rank 4, got shapes")
    refused({"value_pages": v[1:]}, ShapeError, "must agree in all axes but the last")
    refused({"query": q[..., 1:]}, ShapeError, "the same number of features, got (3, 2, 4, 7)")
    refused({"query": q[:, :, 1:]}, ShapeError, "do the pages have another order?")
    refused({"key_pages": k[:0], "value_pages": v[:0]}, ShapeError, "must hold a page")
    refused({"block_tables": tables[1:]}, ShapeError, "block_tables must have shape (3, 'pages')")
    refused({"lengths": lengths[:, None]}, ShapeError, "lengths must have shape (3,)")
    refused({"lengths": lengths * 1.0}, DTypeError, "lengths must be integers, got float32")
    refused({"query": q.astype(jnp.bfloat16)}, DTypeError, "convert the query, which is small")
    refused({}, ShapeError, "softcap must be positive", softcap=0.0)
    refused({}, ShapeError, "local_window_size must not be negative", local_window_size=-1)
    refused({}, ShapeError, "sinks must have one logit for each query head", sinks=jnp.zeros(3))
