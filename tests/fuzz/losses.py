"""Softmax cross entropy as libraries and people write it, and its near misses."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from fuzz.script import Script
from jax import lax


def cross_entropy(script: Script, x: Any) -> list[Any]:
    """Losses of the rows of x, classes last: a list of results."""
    classes = script.pick("classes", 5, 3, 11, 2)
    logits = x @ script.array("weight", (x.shape[-1], classes), x.dtype) * script.pick("by", 2.0, 1.0, 9.0)
    if script.pick("in float32", True, False):
        logits = logits.astype(jnp.float32)
    rows = logits.shape[:-1]
    kind = script.pick("labels", "label", "label", "any_label")
    dtype = script.pick("label dtype", "int32", "uint8", "int8") if kind == "label" else "int32"
    labels = script.array(kind, rows, f"{dtype}<{classes}")
    if script.one_in(20, "labels of the logits"):
        labels = jnp.argmax(logits, -1)
    if script.one_in(24, "labels shifted"):
        labels = jnp.roll(labels, 1, -1) if rows else labels
    hot = _one_hot(script, labels, classes, logits.dtype)
    log_p = _log_probabilities(script, logits)
    lse = jax.nn.logsumexp(logits, axis=-1)
    top = logits.max(-1, keepdims=True)
    by_hand = lambda: jnp.log(jnp.exp(logits - top).sum(-1)) + top[..., 0]  # noqa: E731
    take = lambda y: jnp.take_along_axis(y, labels[..., None].astype(jnp.int32), axis=-1)[..., 0]  # noqa: E731
    smooth = script.pick("smoothing", 0.1, 0.3)
    loss = script.spell(
        "loss",
        [
            lambda: -take(log_p),
            lambda: optax.softmax_cross_entropy_with_integer_labels(logits, labels.astype(jnp.int32)),
            lambda: optax.softmax_cross_entropy(logits, hot),
            lambda: -jnp.sum(hot * log_p, -1),
            lambda: lse - take(logits),
            lambda: by_hand() - take(logits),
            lambda: lse - jnp.sum(jnp.where(labels[..., None] == jnp.arange(classes), logits, 0.0), -1),
            lambda: -jnp.sum((hot * (1 - smooth) + smooth / classes) * log_p, -1),
            lambda: -(1 - smooth) * take(log_p) - smooth * jnp.mean(log_p, -1),
            lambda: lse - take(logits) + 0.01 * lse**2,
            lambda: -jnp.einsum("...v,...v->...", hot, log_p),
        ],
        [
            lambda: -take(jax.nn.softmax(logits)),
            lambda: -jnp.sum(hot * logits, -1),
            lambda: jnp.log(jnp.sum(jnp.exp(logits - top), -1) + 1) - take(logits - top),
            lambda: lse - take(lax.stop_gradient(logits)),
            lambda: lax.stop_gradient(lse) - take(logits),
            lambda: -jnp.sum(hot * hot * log_p * script.array("scale", (classes,)), -1),
            lambda: -jnp.sum((1 - hot) * log_p, -1),
            lambda: lse - jnp.max(logits, -1),
            lambda: -take(log_p[..., ::-1]),
            lambda: -take(jax.nn.log_softmax(logits, axis=0)),
            lambda: jnp.log(jnp.sum(jnp.exp(logits - top) ** 2, -1)) + top[..., 0] - take(logits),
            lambda: -jnp.sum(hot * log_p) * jnp.ones(rows),
        ],
    )()
    loss = script.pick(
        "reduced",
        lambda: loss,
        lambda: jnp.mean(loss),
        lambda: jnp.where(labels != 1, loss, 0.0),
        lambda: jnp.sum(loss * (labels > 0)) / jnp.maximum(jnp.sum(labels > 0), 1),
        lambda: -loss,
    )()
    extra = script.pick(
        "besides",
        list,
        lambda: [lse],
        lambda: [log_p],
        lambda: [jnp.argmax(logits, -1)],
        lambda: [jax.nn.softmax(logits)],
        lambda: [take(logits)],
        lambda: [-take(log_p) * 2],
        lambda: [logits.max(-1)],
    )()
    return [loss, *extra]


def _one_hot(script: Script, labels: Any, classes: int, dtype: Any) -> Any:
    return script.pick(
        "one-hot",
        lambda: jax.nn.one_hot(labels, classes, dtype=dtype),
        lambda: (labels[..., None] == jnp.arange(classes)).astype(dtype),
        lambda: jnp.where(labels[..., None] == jnp.arange(classes), 1.0, 0.0).astype(dtype),
        lambda: jnp.where(jnp.arange(classes) == labels[..., None], 2.0, -1.0).astype(dtype),
        lambda: (labels[..., None] == jnp.arange(classes) + 1).astype(dtype),
    )()


def _log_probabilities(script: Script, logits: Any) -> Any:
    top = logits.max(-1, keepdims=True)
    return script.spell(
        "log-probabilities",
        [
            lambda: jax.nn.log_softmax(logits),
            lambda: logits - jax.nn.logsumexp(logits, -1, keepdims=True),
            lambda: (logits - top) - jnp.log(jnp.sum(jnp.exp(logits - top), -1, keepdims=True)),
            lambda: (
                (logits - lax.stop_gradient(top))
                - jnp.log(jnp.sum(jnp.exp(logits - lax.stop_gradient(top)), -1, keepdims=True))
            ),
        ],
        [
            lambda: jnp.log(jax.nn.softmax(logits)),
            lambda: logits - jnp.log(jnp.sum(jnp.exp(logits - top), -1, keepdims=True)),
            lambda: (logits - top) - jnp.log(jnp.mean(jnp.exp(logits - top), -1, keepdims=True)),
            lambda: (logits - top) - jnp.log2(jnp.sum(jnp.exp(logits - top), -1, keepdims=True)),
        ],
    )()
