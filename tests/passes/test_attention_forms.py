"""Spellings of attention that move heads and batches about: what matches, what reaches the kernel, what must not match.

Values and gradients are compared in float64 by `check_fused`; the shapes of what the kernel is given are read off the
rewritten jaxpr, since a repeated key that is materialised has the right value too.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

import zenith_jax as zenith

B, T, S, K, G, D = 2, 5, 7, 3, 2, 6
H = K * G


def operands(rng, *, q=(B, T, H, D), k=(B, S, K, D)):
    return [jnp.asarray(rng.normal(size=s), jnp.float32) for s in (q, k, k)]


def attend(q, k, v, logits=lambda x: x):
    p = jax.nn.softmax(logits(jnp.einsum("bthd,bshd->bhts", q, k) * 0.4), axis=-1)
    return jnp.einsum("bhts,bshd->bthd", p, v)


def key_shape(function, *args):
    """Of the key that the one attention kernel of the rewritten function is given."""
    jaxpr = jax.make_jaxpr(zenith.fuse(function))(*args)
    (call,) = [e for e in jaxpr.eqns if e.primitive.name == "zenith_call"]
    return call.invars[1].aval.shape


def repeated(x):
    return jnp.repeat(x, G, axis=2)


def broadcast(x):
    return jnp.broadcast_to(x[:, :, :, None], (B, S, K, G, D)).reshape(B, S, H, D)


@pytest.mark.parametrize("spread", [repeated, broadcast], ids=lambda f: f.__name__)
def test_keys_spread_over_a_group_of_heads_are_given_once(rng, check_fused, spread):
    q, k, v = operands(rng)
    function = lambda q, k, v: attend(q, spread(k), spread(v))  # noqa: E731
    check_fused(function, q, k, v, counts={"attention": 1}, floor_ulps=32)
    assert key_shape(function, q, k, v) == (B, K, S, D)


def test_spread_keys_with_masks_and_biases_of_all_heads(rng, check_fused):
    q, k, v = operands(rng)
    mask = jnp.asarray(rng.random((B, H, T, S)) < 0.7).at[..., 0].set(True)
    bias = jnp.asarray(rng.normal(size=(1, H, 1, S)), jnp.float32)

    def function(q, k, v, bias):
        return attend(q, repeated(k), repeated(v), lambda x: jnp.where(mask, x + bias, -jnp.inf))

    check_fused(function, q, k, v, bias, counts={"attention": 1}, floor_ulps=32)
    assert key_shape(function, q, k, v, bias) == (B, K, S, D)


def test_only_the_key_spread(rng, check_fused):
    q, k, v = operands(rng)
    check_fused(
        lambda q, k, v: attend(q, repeated(k), repeated(v) * jnp.arange(1.0, 1 + H)[:, None]),
        q,
        k,
        v,
        counts={"attention": 1},
        floor_ulps=32,
    )


@pytest.mark.parametrize("mask", ["none", "causal", "of each head"])
def test_logits_with_groups_merged_into_heads(rng, check_fused, mask):
    q, k, v = operands(rng)
    masks = {
        "none": jnp.ones((1, 1, 1), bool),
        "causal": jnp.tril(jnp.ones((T, S), bool))[:, None],
        "of each head": jnp.asarray(rng.random((T, H, S)) < 0.7).at[..., 0].set(True),
    }

    def function(q, k, v):
        logits = jnp.einsum("btkgd,bskd->btkgs", q.reshape(B, T, K, G, D), k).reshape(B, T, H, S)
        p = jax.nn.softmax(jnp.where(masks[mask], logits, -2e38), axis=-1).reshape(B, T, K, G, S)
        return jnp.einsum("btkgs,bskd->btkgd", p, v).reshape(B, T, H, D)

    report = check_fused(function, q, k, v, counts={"attention": 1}, floor_ulps=32)
    assert ("mask" in report.fused[0].detail) == (mask == "of each head")


@pytest.mark.parametrize("masked", [False, True])
def test_heads_merged_into_the_batch(rng, check_fused, masked):
    """As code ported from torch.bmm is written."""
    q, k, v = operands(rng, k=(B, S, H, D))
    padding = jnp.arange(S) < jnp.array([S, 4])[:, None]

    def function(q, k, v):
        q, k, v = (x.transpose(0, 2, 1, 3).reshape(B * H, -1, D) for x in (q, k, v))
        logits = q @ k.swapaxes(1, 2) * 0.4
        if masked:
            logits = jnp.where(padding[:, None, None], logits.reshape(B, H, T, S), -1e30).reshape(B * H, T, S)
        return (jax.nn.softmax(logits, axis=-1) @ v).reshape(B, H, T, D).transpose(0, 2, 1, 3)

    check_fused(function, q, k, v, counts={"attention": 1}, floor_ulps=32)


@pytest.mark.parametrize(
    "distance",
    [
        lambda t, s: jnp.abs(t - s) <= 2,
        lambda t, s: jnp.abs(s - t) < 3,
        lambda t, s: jnp.abs(t - s) <= 2,
        lambda t, s: jnp.abs(s + 1 - t) <= 1,
        lambda t, s: ~(jnp.abs(t - s) > 2),
    ],
    ids=["le", "lt", "reversed", "shifted", "not gt"],
)
def test_a_window_by_distance_is_a_band(rng, check_fused, distance):
    q, k, v = operands(rng, k=(B, T, H, D))
    allowed = lambda: distance(jnp.arange(T)[:, None], jnp.arange(T))  # noqa: E731
    report = check_fused(
        lambda q, k, v: attend(q, k, v, lambda x: jnp.where(allowed(), x, -1e30)),
        q,
        k,
        v,
        counts={"attention": 1},
        floor_ulps=32,
    )
    assert "band" in report.fused[0].detail and "mask" not in report.fused[0].detail


@pytest.mark.parametrize(
    "distance",
    [
        lambda t, s: jnp.abs(t - s) >= 2,
        lambda t, s: jnp.abs(t - s) <= 1.5,
        lambda t, s: jnp.abs(t + s) <= 4,
        lambda t, s: jnp.abs(t - 2 * s) <= 4,
        lambda t, s: jnp.abs(t.astype(jnp.uint8) - s.astype(jnp.uint8)) <= 2,  # wraps
    ],
    ids=["outside", "half", "sum", "twice", "unsigned"],
)
def test_what_is_no_band_stays_a_mask(rng, check_fused, distance):
    q, k, v = operands(rng, k=(B, T, H, D))
    allowed = lambda: distance(jnp.arange(T)[:, None], jnp.arange(T)).at[:, 0].set(True)  # noqa: E731
    report = check_fused(
        lambda q, k, v: attend(q, k, v, lambda x: jnp.where(allowed(), x, -1e30)),
        q,
        k,
        v,
        counts={"attention": 1},
        floor_ulps=32,
    )
    assert "mask" in report.fused[0].detail and "band" not in report.fused[0].detail


def test_several_biases_are_added(rng, check_fused):
    q, k, v = operands(rng, k=(B, S, H, D))
    a, b, c = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((H, T, S), (B, 1, 1, S), (T, 1)))
    check_fused(
        lambda q, k, v, a, b, c: attend(q, k, v, lambda x: ((x + a) * 0.5 - b) + c * 0.1),
        *(q, k, v, a, b, c),
        counts={"attention": 1},
        floor_ulps=64,
    )


def over_sequence(x):
    return jnp.repeat(x[:, : S // 2], 2, axis=1)


@pytest.mark.parametrize("first", [False, True])
def test_a_table_of_biases_by_one_hot_buckets_is_a_bias(rng, check_fused, first):
    """As T5 looks its relative positions up on a TPU: the logits are a sum of two products."""
    table = jnp.asarray(rng.normal(size=(4, H)), jnp.float32)
    buckets = jnp.clip(jnp.arange(S) - jnp.arange(T)[:, None], -2, 1) + 2

    def function(q, k, v, table):
        bias = jnp.einsum("tsn,nh->hts", jax.nn.one_hot(buckets, 4), table)[None]
        return attend(q, k, v, lambda x: bias + x if first else x + bias)

    report = check_fused(function, *operands(rng, k=(B, S, H, D)), table, counts={"attention": 1}, floor_ulps=32)
    assert "bias" in report.fused[0].detail


def test_keys_repeated_along_the_sequence_stay(rng, check_fused):
    q, k, v = operands(rng, k=(B, S, H, D))
    function = lambda q, k, v: attend(q, over_sequence(k), over_sequence(v))  # noqa: E731
    check_fused(function, q, k, v, counts={"attention": 1}, floor_ulps=32)
    assert key_shape(function, q, k, v) == (B, H, S // 2 * 2, D)


def test_probabilities_regrouped_along_the_keys_are_refused(rng, check_refused):
    """(h, s) read as (s, h): the same sizes, other elements."""
    q, k, v = (jnp.asarray(rng.normal(size=(B, 4, 4, D)), jnp.float32) for _ in range(3))

    def function(q, k, v):
        p = jax.nn.softmax(jnp.einsum("bthd,bshd->bths", q, k), axis=-1)
        return jnp.einsum("btsh,bshd->bthd", p.reshape(B, 4, 16).reshape(B, 4, 4, 4), v)

    check_refused(function, q, k, v, op="attention", reason="another axis than the product")


def test_softmax_over_merged_heads_and_keys_is_refused(rng, check_refused):
    q, k, v = operands(rng, k=(B, S, H, D))

    def function(q, k, v):
        logits = jnp.einsum("bthd,bshd->bths", q, k).reshape(B, T, H * S)
        p = jax.nn.softmax(logits, axis=-1).reshape(B, T, H, S)
        return jnp.einsum("bths,bshd->bthd", p, v)

    check_refused(function, q, k, v, op="attention", reason="another axis than the product with value")
