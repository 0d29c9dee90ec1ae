"""Attention over keys and values in pages, which a table of each sequence says; and near misses."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from fuzz.rows import softmax_along
from fuzz.script import Script

PAGES = 5


def paged_attention(script: Script, x: Any) -> tuple[Any, list[Any]]:
    """x: (..., t, features), all leading axes one batch -> the same shape."""
    queries = x.reshape(-1, *x.shape[-2:])
    b, t, features = queries.shape
    h, g, d, e = (script.pick("heads", 2, 1), script.pick("groups", 2, 1, 3), script.pick("d", 4, 8), 4)
    size, count = script.pick("page", 2, 4, 1), script.pick("pages", 2, 3)
    s = size * count
    q = (queries @ script.array("weight", (features, h * g * d), x.dtype)).reshape(b, t, h, g, d)
    is_any = script.pick("entries outside", False, False, True)
    table = script.array("any_label" if is_any else "label", (b, count), f"int32<{PAGES}")
    other = script.spell("values by", [lambda: table], [lambda: table[::-1], lambda: table[:, ::-1]])()
    layout = script.pick("cache", "pshd", "hpsd", "phsd")
    k = _gathered(script, layout, is_any, table, (PAGES, size, h, d), x.dtype)
    v = _gathered(script, layout, is_any, other, (PAGES, size, h, e), x.dtype)
    logits = jnp.einsum("bthgd,bshd->bhgts", q, k) * d**-0.5
    taps = [logits]
    lengths = script.array("length", (b,), f"int32<{s}")[:, None, None]
    key, query = jnp.arange(s), jnp.arange(t)[:, None]
    allowed = script.spell(
        "mask",
        [
            lambda: key < lengths,
            lambda: key <= lengths - t + query,
            lambda: (key <= lengths - t + query) & (key > lengths - t + query - 3),
        ],
        [lambda: key != lengths, lambda: script.array("mask", (b, t, s)), lambda: key % lengths != 0],
    )()
    if script.pick("masked", True, True, True, False):
        low = script.pick("masked with", -1e30, -jnp.inf) if logits.dtype != jnp.float16 else -1e4
        logits = jnp.where(allowed[:, None, None], logits, low).astype(logits.dtype)
    p = softmax_along(script, logits, 4)
    taps.append(p)
    out = jnp.einsum("bhgts,bshe->bthge", p.astype(v.dtype), v).reshape(b, t, -1)
    out = out @ script.array("weight", (out.shape[-1], features), x.dtype)
    return out.reshape(x.shape).astype(x.dtype), taps


def _gathered(script: Script, layout: str, is_any: bool, table: Any, shape: tuple[int, ...], dtype: Any) -> Any:
    """Pages of a new cache, by the table: (b, s, heads, features). Entries outside mean the nearest page: one that is
    filled with NaN is a NaN behind a mask, which docs/matching.md treats of."""
    pages = script.array("normal", [shape["pshd".index(c)] for c in layout], dtype)
    axis = layout.index("p")
    clipped = lambda: jnp.take(pages, table, axis=axis, mode="clip")  # noqa: E731
    forms = [clipped, lambda: pages[(slice(None),) * axis + (table,)], lambda: jnp.take(pages, table, axis=axis)]
    picked = script.pick("gathered", *forms[: 1 if is_any else 3])()
    letters = layout.replace("p", "bm")
    picked = picked.transpose([letters.index(c) for c in "bmshd"])
    return picked.reshape(table.shape[0], -1, *picked.shape[3:])
