"""Cross entropy as people write it: found, with right values and gradients; and what only looks like it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import zenith_jax as zenith

B, T, V = 3, 5, 37


def inputs(rng, dtype=jnp.float32):
    logits = jnp.asarray(rng.normal(size=(B, T, V)) * 3, dtype)
    return logits, jnp.asarray(rng.integers(V, size=(B, T)), jnp.int32)


def hot(y, dtype=jnp.float32):
    return jax.nn.one_hot(y, V, dtype=dtype)


def by_hand(x, y):
    top = x.max(-1, keepdims=True)
    lse = jnp.log(jnp.exp(x - top).sum(-1)) + top[..., 0]
    return lse - jnp.take_along_axis(x, y[..., None], axis=-1)[..., 0]


def smoothed(x, y, on=0.9, off=0.1 / V):
    """As flax's translation example: the smoothed labels come from a select."""
    target = lax.select(y[..., None] == jnp.arange(V), jnp.full((B, T, V), on), jnp.full((B, T, V), off))
    return -(target * jax.nn.log_softmax(x)).sum(-1)


def with_z_loss(x, y):
    lse = jax.nn.logsumexp(x, axis=-1)
    picked = (hot(y) * x).sum(-1)
    return lse - picked + 1e-3 * lse**2


def ignoring(x, y):
    keep = y % 4 != 0
    loss = optax.softmax_cross_entropy_with_integer_labels(x, jnp.where(keep, y, 0))
    return jnp.where(keep, loss, 0).sum() / keep.sum()


def by_index(x, y):
    x, y = x.reshape(-1, V), y.reshape(-1)
    return -jax.nn.log_softmax(x)[jnp.arange(B * T), y]


def smoothed_by_the_mean(x, y, weight=0.1):
    """As PyTorch's documentation has it, and ports of it."""
    p = jax.nn.log_softmax(x)
    picked = jnp.take_along_axis(p, y[..., None], axis=-1)[..., 0]
    return -(1 - weight) * picked - weight * p.mean(-1)


def smoothed_by_the_logits(x, y, weight=0.1):
    lse = jax.nn.logsumexp(x, axis=-1)
    return lse - (1 - weight) * (hot(y) * x).sum(-1) - weight / V * x.sum(-1)


def with_z_loss_by_hand(x, y):
    """As T5X writes it: the logarithm stands in the log-probabilities and again in the z-loss."""
    peak = x.max(-1, keepdims=True)
    shifted = x - peak
    total = jnp.exp(shifted).sum(-1, keepdims=True)
    lse = jnp.squeeze(jnp.log(total) + peak, -1)
    return -(hot(y) * (shifted - jnp.log(total))).sum(-1) + 1e-2 * lse**2


SPELLINGS = {
    "optax, integers": optax.softmax_cross_entropy_with_integer_labels,
    "optax, one-hot": lambda x, y: optax.softmax_cross_entropy(x, hot(y)),
    "optax, smoothed": lambda x, y: optax.softmax_cross_entropy(x, optax.smooth_labels(hot(y), 0.1)),
    "optax, mean": lambda x, y: optax.softmax_cross_entropy_with_integer_labels(x, y).mean(),
    "by hand": by_hand,
    "log_softmax and one-hot": lambda x, y: -jnp.sum(hot(y) * jax.nn.log_softmax(x), axis=-1),
    "log_softmax and take_along_axis": lambda x, y: -jnp.take_along_axis(jax.nn.log_softmax(x), y[..., None], -1),
    "log_softmax and index": by_index,
    "log_softmax and vmapped index": lambda x, y: (
        -jax.vmap(jax.vmap(lambda row, label: row[label]))(jax.nn.log_softmax(x), y)
    ),
    "log_softmax and where": lambda x, y: jnp.where(hot(y, bool), jax.nn.log_softmax(x), 0).sum(-1),
    "x - logsumexp": lambda x, y: -((x - jax.nn.logsumexp(x, axis=-1, keepdims=True)) * hot(y)).sum(-1),
    "smoothed by a select": smoothed,
    "smoothed by the mean": smoothed_by_the_mean,
    "smoothed by the logits": smoothed_by_the_logits,
    "z-loss": with_z_loss,
    "z-loss by hand": with_z_loss_by_hand,
    "ignored labels": ignoring,
    "of the middle axis": lambda x, y: (
        -(jnp.moveaxis(hot(y), -1, 1) * jax.nn.log_softmax(jnp.moveaxis(x, -1, 1), axis=1)).sum(1)
    ),
}


@pytest.mark.parametrize("function", SPELLINGS.values(), ids=SPELLINGS)
def test_spelling_is_fused(rng, check_fused, function):
    report = check_fused(function, *inputs(rng), counts={"cross_entropy": 1})
    assert report.fused[0].detail == f"rows of {V}"


def test_logits_are_upcast_by_the_kernel(rng, check_fused):
    """The common case: bfloat16 logits, a loss in float32. No float32 logits are left in the program."""
    logits, labels = inputs(rng, jnp.bfloat16)

    def function(x, y):
        return optax.softmax_cross_entropy_with_integer_labels(x.astype(jnp.float32), y).mean()

    check_fused(function, logits, labels, counts={"cross_entropy": 1})
    jaxpr = jax.make_jaxpr(zenith.fuse(jax.grad(function)))(logits, labels)
    assert f"f32[{B},{T},{V}]" not in str(jaxpr)


def test_accuracy_of_the_logits_beside_the_loss(rng, check_fused):
    def function(x, y):
        return optax.softmax_cross_entropy_with_integer_labels(x, y).mean(), (x.argmax(-1) == y).mean()

    check_fused(function, *inputs(rng), counts={"cross_entropy": 1})


@pytest.mark.parametrize(
    "function",
    [
        optax.softmax_cross_entropy_with_integer_labels,
        lambda x, y: optax.softmax_cross_entropy(x, hot(y)),
        lambda x, y: jax.vmap(jax.vmap(lambda row, label: row[label]))(jax.nn.log_softmax(x), y),
        by_hand,  # its maximum is not guarded: a row whose maximum is infinite is NaN
        lambda x, y: -jnp.take_along_axis(x - jax.nn.logsumexp(x, axis=-1, keepdims=True), y[..., None], -1)[..., 0],
        smoothed_by_the_mean,
    ],
    ids=["nan", "one-hot", "nearest", "unguarded", "guarded", "smoothed by the mean"],
)
def test_labels_that_are_no_classes_and_infinite_logits(rng, function):
    logits, labels = inputs(rng)
    labels = labels.at[0].set(jnp.array([-1, V, -V, 2 * V, -100]))
    logits = logits.at[1, 0, 3].set(jnp.inf).at[1, 1, 4].set(-jnp.inf).at[1, 2].set(-jnp.inf).at[1, 3, 0].set(jnp.nan)
    report = zenith.explain(function)(logits, labels)
    assert report.counts() == {"cross_entropy": 1}
    np.testing.assert_allclose(
        jax.jit(zenith.fuse(function))(logits, labels), jax.jit(function)(logits, labels), rtol=1e-5, atol=1e-5
    )
    gradient = lambda f: jax.grad(lambda x: jnp.nansum(f(x, labels)[0]))  # noqa: E731
    fused, plain = (jax.jit(f)(logits) for f in (zenith.fuse(gradient(function)), gradient(function)))
    np.testing.assert_allclose(fused[0], plain[0], atol=1e-5)  # of finite logits


def test_two_losses_of_one_model_are_two_sites(rng, check_fused):
    x, y = inputs(rng)
    check_fused(
        lambda x, z, y: by_hand(x, y).mean() + optax.softmax_cross_entropy_with_integer_labels(z, y).mean(),
        *(x, x[::-1], y),
        counts={"cross_entropy": 2},
    )


MISSES = {
    "of another array": (lambda x, y: jax.nn.logsumexp(x, -1) - (hot(y) * (x + 1)).sum(-1), None),
    "no maximum": (lambda x, y: jnp.log(jnp.exp(x).sum(-1)) - (hot(y) * x).sum(-1), None),
    "log2": (lambda x, y: jnp.log2(jnp.exp(x - x.max(-1, keepdims=True)).sum(-1)) - (hot(y) * x).sum(-1), None),
    "a sink": (
        lambda x, y: jnp.log(1 + jnp.exp(x - x.max(-1, keepdims=True)).sum(-1)) + x.max(-1) - (hot(y) * x).sum(-1),
        None,
    ),
    "soft labels": (lambda x, y: optax.softmax_cross_entropy(x, jnp.cos(x[::-1]) / V), None),
    "log-probabilities returned": (
        lambda x, y: ((p := jax.nn.log_softmax(x)), -(hot(y) * p).sum(-1)),
        "used elsewhere too",
    ),
    "entropy beside it": (
        lambda x, y: -(hot(y) * (p := jax.nn.log_softmax(x))).sum(-1) - (jnp.exp(p) * p).sum(-1),
        "used elsewhere too",
    ),
    "mean over the batch beside it": (
        lambda x, y: ((p := jax.nn.log_softmax(x)).mean(0), -(hot(y) * p).sum(-1)),
        "used elsewhere too",
    ),
    "sum of squares beside it": (
        lambda x, y: -(hot(y) * (p := jax.nn.log_softmax(x))).sum(-1) - (p * p).sum(-1),
        "used elsewhere too",
    ),
    "sum without labels": (lambda x, y: jax.nn.log_softmax(x).sum(-1) * y, None),
    "over the batch": (lambda x, y: -(hot(y) * jax.nn.log_softmax(x, axis=0)).sum(-1), None),
    "several classes of a row": (
        lambda x, y: -jnp.take_along_axis(jax.nn.log_softmax(x), y[:, :1, None] + jnp.arange(2), -1),
        None,
    ),
    "labels of the class": (lambda x, y: -((jnp.arange(V) % 3 == jnp.arange(V)) * jax.nn.log_softmax(x)).sum(-1), None),
    "weights cut to integers": (
        lambda x, y: -((hot(y) * 1.9 + 0.2).astype(jnp.int32).astype(jnp.float32) * jax.nn.log_softmax(x)).sum(-1),
        None,
    ),
    "weights divided as integers": (
        lambda x, y: -(lax.div(hot(y, jnp.int32) * 3, jnp.full((B, T, V), 2)) * jax.nn.log_softmax(x)).sum(-1),
        None,
    ),
    "weights of two signs": (
        lambda x, y: -(jnp.where(hot(y, bool), 2.0, -1.0) * jax.nn.log_softmax(x)).sum(-1),
        "weighs 2 of a row, every other class -1",
    ),
    "a label of less weight": (
        lambda x, y: -((0.9 - 0.8 * hot(y)) * jax.nn.log_softmax(x)).sum(-1),
        "weighs 0.1 of a row, every other class 0.9",
    ),
    "shifted classes": (lambda x, y: -((y[..., None] == jnp.arange(V) * 2) * jax.nn.log_softmax(x)).sum(-1), None),
}


@pytest.mark.parametrize("name", MISSES)
def test_near_miss_is_refused(rng, check_refused, name):
    function, reason = MISSES[name]
    check_refused(function, *inputs(rng), op="cross_entropy", reason=reason)


def test_a_label_that_depends_on_the_loss(rng):
    x, y = inputs(rng)

    def function(x, y):
        lse = jax.nn.logsumexp(x, axis=-1)
        label = jnp.where(lse > 4, y, 0)
        return lse - jnp.take_along_axis(x, label[..., None], axis=-1)[..., 0]

    report = zenith.explain(function)(x, y)
    assert report.counts() == {}
    np.testing.assert_allclose(zenith.fuse(function)(x, y), function(x, y), rtol=1e-6)
