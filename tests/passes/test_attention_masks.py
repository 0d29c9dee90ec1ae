"""Masks as the structure that they are: what is proved from iotas and comparisons, and what must stay a tensor.

Every mask is compared in value with the program as it is written; gradients of each kind of structure once.
"""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zenith_jax as zenith

B, T, S, H, D = 2, 7, 9, 2, 4


def operands(rng, t=T, s=S):
    return [jnp.asarray(rng.normal(size=(B, n, H, D)), jnp.float32) for n in (t, s, s)]


def attend(q, k, v, allowed, fill=-1e30):
    logits = jnp.where(allowed, jnp.einsum("bthd,bshd->bhts", q, k) * 0.4, fill)
    return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(logits, axis=-1), v)


def positions():
    return jnp.arange(T)[:, None], jnp.arange(S)


def of_example(x):
    """(B,) over (b, h, t, s)."""
    return x[:, None, None, None]


def square(dtype=bool):
    return jnp.ones((T, S), dtype)


def triangle(k):
    return jnp.tril(square(), k)


LENGTHS = jnp.array([3, S])
SEGMENTS = jnp.array([[0, 0, 1, 1, 1, 2, 2, 2, 5], [4, 4, 4, 4, 3, 3, 4, 4, 4]])


QUERIES = jnp.sin(jnp.arange(B * T) * 2.0).reshape(B, 1, T, 1) < 0.4
KEYS = jnp.sin(jnp.arange(B * S) * 2.0).reshape(B, 1, 1, S) < 0.4
STRUCTURES = {
    "padding lengths": ("interval", lambda t, s, n: s < of_example(n)),
    "padding lengths, turned round": ("interval", lambda t, s, n: of_example(n) > s),
    "padding lengths, negated": ("interval", lambda t, s, n: ~(s >= of_example(n))),
    "padding on the left": ("interval", lambda t, s, n: s + 1 >= of_example(n)),
    "padding in 8 bits": ("interval", lambda t, s, n: s.astype(jnp.uint8) < of_example(n).astype(jnp.uint8)),
    "padding of each head": ("interval", lambda t, s, n: s < of_example(n) + jnp.arange(H)[:, None, None]),
    "positions in a cache": ("interval", lambda t, s, n: s <= n[0] + t),
    "distance below a length": ("interval", lambda t, s, n: s - t < of_example(n)),
    "a prefix of three": ("interval", lambda t, s, n: (s <= t) | (s < 3)),
    "prefixes": ("interval", lambda t, s, n: (s <= t) | (s < of_example(n))),
    "prefixes and padding": ("interval", lambda t, s, n: ((s <= t) | (s < of_example(n))) & (s < of_example(n + 2))),
    "padding of queries and keys": ("interval", lambda t, s, n: (t < of_example(n)) & (s < of_example(n))),
    "masks of queries and keys": ("interval mask", lambda t, s, n: QUERIES & ~KEYS),
    "blocks": ("segments", lambda t, s, n: t // 3 == s // 3),
    "blocks, negated": ("segments", lambda t, s, n: ~(t // 3 != s // 3)),
    "segments": ("segments", lambda t, s, n: SEGMENTS[:, None, :T, None] == SEGMENTS[:, None, None]),
    "causal segments": ("causal segments", lambda t, s, n: (t // 3 == s // 3) & (s <= t)),
    "between two triangles": ("band", lambda t, s, n: triangle(1) ^ triangle(-3)),
    "between two triangles, turned": ("band", lambda t, s, n: jnp.triu(square(), 2) ^ jnp.triu(square(), -2)),
    "triangles of numbers": ("causal", lambda t, s, n: jnp.tril(square(jnp.int32)) * square(jnp.int32) > 0),
    "padding multiplied": (
        "interval",
        lambda t, s, n: (s < of_example(n)).astype(jnp.int32) * (t < of_example(n)).astype(jnp.int32) != 0,
    ),
    "causal and padding multiplied as floats": (
        "causal interval",
        lambda t, s, n: jnp.tril(square(jnp.float32)) * (s < of_example(n)).astype(jnp.float32) > 0,
    ),
    # What is none of these.
    "triangles of two sides": ("mask", lambda t, s, n: jnp.tril(square()) ^ jnp.triu(square())),
    "outside of two triangles": ("mask", lambda t, s, n: ~(triangle(1) ^ triangle(-3))),
    "a band and a triangle": ("mask", lambda t, s, n: (triangle(1) & ~triangle(-3)) ^ triangle(0)),
    "integers of data multiplied": ("mask", lambda t, s, n: (n + 1)[:, None, None, None] * s * jnp.int32(65536) != 0),
    "not both": (
        "mask",
        lambda t, s, n: (s < of_example(n)).astype(jnp.int32) * (t < of_example(n)).astype(jnp.int32) == 0,
    ),
    "more than one": ("mask", lambda t, s, n: jnp.tril(square(jnp.int32)) * (s < of_example(n)) > 1 - s),
    "key positions of data": ("mask", lambda t, s, n: s * n[0] < 9),
    "bound of each key": ("mask", lambda t, s, n: s <= jnp.roll(s, 1) + of_example(n)),
    "positions in floats": ("mask", lambda t, s, n: s.astype(jnp.float32) < of_example(n) - 0.5),
    "positions that wrap": (
        "mask",
        lambda t, s, n: s.astype(jnp.uint8) - jnp.uint8(2) < of_example(n).astype(jnp.uint8),
    ),
    "open to both sides": ("mask", lambda t, s, n: (s <= t) | (s >= of_example(n))),
    "equal floats": ("mask", lambda t, s, n: jnp.sin(t // 3) == jnp.sin(s // 3)),
    "equal to a number of both": ("mask", lambda t, s, n: (t + s) % 2 == s % 2),
    "two segments": ("segments mask", lambda t, s, n: (t // 3 == s // 3) & (t % 3 == s % 3)),
    "unequal": ("mask", lambda t, s, n: t // 3 != s // 3),
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_mask_is_read_as_its_structure_and_nothing_else(rng, name):
    detail, allowed = STRUCTURES[name]
    q, k, v = operands(rng)
    function = lambda q, k, v, n: attend(q, k, v, allowed(*positions(), n))  # noqa: E731
    (site,) = zenith.explain(function)(q, k, v, LENGTHS).sites
    assert site.fused and site.detail == f"t{T} s{S} d{D} {detail}"
    np.testing.assert_allclose(
        jax.jit(zenith.fuse(function))(q, k, v, LENGTHS), jax.jit(function)(q, k, v, LENGTHS), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("fill", [-1e30, -jnp.inf])
def test_gradients_with_intervals_and_segments(rng, check_fused, fill):
    """Prefixes cut by padding, and segments: no row of a finite fill or of none is lost."""

    def function(q, k, v, n):
        t, s = positions()
        allowed = ((s <= t) | (s < of_example(n))) & (t // 4 == s // 4) & (s < of_example(n + 4))
        return attend(q, k, v, allowed | (s == 8) if np.isinf(fill) else allowed, fill)

    report = check_fused(function, *operands(rng), LENGTHS, counts={"attention": 1}, floor_ulps=64)
    assert ("segments" in report.fused[0].detail) != np.isinf(fill)


@pytest.mark.parametrize("written", ["in place", "added"])
def test_a_fill_of_minus_1e9_is_one_in_bfloat16_too(rng, check_fused, written):
    """bfloat16 has no -1e9: it is -998244352 there."""

    def function(q, k, v):
        x = jnp.einsum("bthd,bshd->bhts", q, k) * 0.3
        t, s = positions()
        fill = jnp.asarray(-1e9, q.dtype)
        x = jnp.where(s <= t, x, fill) if written == "in place" else x + jnp.where(s <= t, 0, fill).astype(x.dtype)
        return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(x, -1), v)

    args = [x.astype(jnp.bfloat16) for x in operands(rng)]
    report = check_fused(function, *args, counts={"attention": 1})
    assert "causal" in report.fused[0].detail


def test_examples_of_length_zero(rng, check_fused):
    lengths = jnp.array([0, 5])
    function = lambda q, k, v, n: attend(q, k, v, jnp.arange(S) < of_example(n))  # noqa: E731
    check_fused(function, *operands(rng), lengths, counts={"attention": 1}, floor_ulps=64)


def test_lengths_under_vmap_and_scan(rng, check_fused):
    q, k, v = operands(rng)

    def function(q, k, v, n):
        one = lambda q, k, v, n: attend(q[None], k[None], v[None], jnp.arange(S) < n)[0]  # noqa: E731
        step = lambda n, _: (n + 1, jax.vmap(one)(q, k, v, n))  # noqa: E731
        return jax.lax.scan(step, n, None, length=2)[1]

    check_fused(function, q, k, v, jnp.array([3, 7]), counts={"attention": 1}, floor_ulps=64)


def test_no_tensor_over_queries_and_keys_is_left(rng):
    """The mask of (t, s) is not computed: what the kernel is given grows with t + s."""
    q, k, v = operands(rng)
    prefixes = lambda q, k, v, n: attend(q, k, v, STRUCTURES["prefixes"][1](*positions(), n))  # noqa: E731
    blocks = lambda q, k, v: attend(q, k, v, STRUCTURES["blocks"][1](*positions(), None))  # noqa: E731
    both = lambda q, k, v, m, n: attend(q, k, v, m & ~n)  # noqa: E731
    for function, args in ((prefixes, (q, k, v, LENGTHS)), (blocks, (q, k, v)), (both, (q, k, v, QUERIES, KEYS))):
        assert f"{T},{S}]" not in str(jax.make_jaxpr(zenith.fuse(function))(*args))


@pytest.mark.parametrize("groups", [1, 2])
def test_a_cache_is_read_where_it_lies(rng, groups):
    """(batch, length, heads, features), as caches are: nothing of its size is copied for one query."""
    q, k, v = operands(rng, t=1)
    q = jnp.repeat(q, groups, axis=2)

    def function(q, k, v, n):
        k, v = (jnp.repeat(x, groups, axis=2) for x in (k, v))
        return attend(q, k, v, jnp.arange(S) <= n)

    text = jax.jit(zenith.fuse(function)).lower(q, k, v, 3).compile().as_text()
    assert "zenith_attention_fwd" in text
    assert not re.search(r"f32\[2,(9,2|2,9),4\]\S* (copy|transpose|fusion)\(", text), text
