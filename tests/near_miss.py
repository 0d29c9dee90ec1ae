"""Near misses: what one is, and its arguments."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

B, H, N, D = 2, 2, 6, 6  # square where a wrong axis could hide
EPS = 1e-2


@dataclasses.dataclass(frozen=True)
class Case:
    """miss(*args) must be refused because of `reason` (None: it is not even a site); twin(*args) must match."""

    name: str
    op: str
    miss: Callable[..., Any]
    twin: Callable[..., Any]
    reason: str | None
    args: str  # see `arguments`


def arguments(kinds: str) -> list[Any]:
    """x: (B, H, N, D); m: a mask (B, H, N, N); r: (B, N, D); p: (D,); c: a scalar, about 1; h: (B, H)."""
    rng = np.random.default_rng(20260104)
    shapes = {"x": (B, H, N, D), "m": (B, H, N, N), "r": (B, N, D), "p": (D,), "c": (), "h": (B, H)}
    arrays = []
    for kind in kinds:
        if kind == "m":
            arrays.append(jnp.asarray(rng.random(shapes[kind]) < 0.7))
        else:
            arrays.append(jnp.asarray(rng.normal(size=shapes[kind]) + (kind in "cp"), jnp.float32))
    return arrays


# --- functions that are almost the softmax ----------------------------------------------------------------------------


def softmax_with_sink(x):
    e = jnp.exp(x - x.max(-1, keepdims=True))
    return e / (e.sum(-1, keepdims=True) + 1.0)


def softmax_with_shift_of_sink(x):
    top = jnp.maximum(x.max(-1, keepdims=True), 0.0)
    return jnp.exp(x - top) / jnp.exp(x - top).sum(-1, keepdims=True)


def softmax_without_max(x):
    return jnp.exp(x) / jnp.exp(x).sum(-1, keepdims=True)


def softmax_of_another_row(x):
    e = jnp.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1)[..., None, :]


def softmax_stopped(x):
    e = jnp.exp(x - x.max(-1, keepdims=True))
    return e / lax.stop_gradient(e.sum(-1, keepdims=True))


def quantised(x):
    return x.astype(jnp.float8_e4m3fn).astype(jnp.float32)
