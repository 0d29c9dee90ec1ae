"""Rotary position embeddings in the spellings that people use, and in some that are other functions."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from fuzz.script import Script
from jax import lax


def rotation(script: Script, x: Any) -> tuple[Any, list[Any]]:
    """Of the first, nearly always all, of an even number of features of x."""
    count = x.shape[-1] // 2 * 2
    if script.one_in(3, "first features") and count > 2:
        count -= 2
    if count == 0:
        return x, []
    half, narrow = count // 2, x.dtype
    turned, rest = x[..., :count], x[..., count:]
    if script.pick("in float32", False, True):
        turned = turned.astype(jnp.float32)
    shape = script.pick("tables", (x.shape[-2], half), (half,), (*x.shape[:-1], half), (1, half))
    angle = script.array("normal", shape, script.pick("tables' dtype", jnp.float32, narrow))
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    y = script.pick("kind", _parts, _halves, _neighbours, _reversed)(script, turned, cos, sin)
    taps = [y]
    y = y.astype(narrow) if script.pick("result", True, False) else y
    return (jnp.concatenate([y, rest.astype(y.dtype)], -1) if rest.shape[-1] else y), taps


def _parts(script: Script, x: Any, cos: Any, sin: Any) -> Any:
    half = x.shape[-1] // 2
    first, second = script.spell(
        "pairs",
        [lambda: jnp.split(x, 2, -1), lambda: (x[..., :half], x[..., half:]), lambda: (x[..., ::2], x[..., 1::2])],
        [lambda: (x[..., half:], x[..., :half]), lambda: (x[..., :half], x[..., :half])],
    )()
    y0, y1 = script.spell(
        "signs",
        [
            lambda: (first * cos - second * sin, second * cos + first * sin),
            lambda: (cos * first - sin * second, sin * first + cos * second),
            lambda: (first * cos + second * sin, second * cos - first * sin),
        ],
        [
            lambda: (first * cos + second * sin, second * cos + first * sin),
            lambda: (first * cos - second * sin, second * sin + first * cos),
            lambda: (first * cos - second * sin, second * cos + first * sin * 1.01),
            lambda: (first * cos - second * lax.stop_gradient(sin), second * cos + first * sin),
        ],
    )()
    return script.pick(
        "together",
        lambda: jnp.concatenate([y0, y1], -1),
        lambda: jnp.stack([y0, y1], -1).reshape(x.shape),
    )()


def _halves(script: Script, x: Any, cos: Any, sin: Any) -> Any:
    half = x.shape[-1] // 2
    cos, sin = (script.pick("wide", lambda a: jnp.concatenate([a, a], -1), lambda a: _tiled(a))(a) for a in (cos, sin))
    turned = script.spell(
        "rotate_half",
        [
            lambda: jnp.concatenate([-x[..., half:], x[..., :half]], -1),
            lambda: jnp.roll(x, half, -1) * jnp.concatenate([-jnp.ones(half, x.dtype), jnp.ones(half, x.dtype)]),
        ],
        [
            lambda: jnp.concatenate([x[..., half:], -x[..., :half]], -1),
            lambda: jnp.concatenate([x[..., half:], x[..., :half]], -1),
            lambda: jnp.concatenate([-x[..., :half], x[..., half:]], -1),
        ],
    )()
    return script.pick("sum", lambda: x * cos + turned * sin, lambda: turned * sin + x * cos)()


def _tiled(table: Any) -> Any:
    return jnp.tile(table, (*(1,) * (table.ndim - 1), 2))


def _neighbours(script: Script, x: Any, cos: Any, sin: Any) -> Any:
    wide = script.spell("wide", [lambda a: jnp.repeat(a, 2, -1)], [_tiled])
    turned = jnp.stack([-x[..., 1::2], x[..., ::2]], -1).reshape(x.shape)
    return x * wide(cos) + turned * wide(sin)


def _reversed(script: Script, x: Any, cos: Any, sin: Any) -> Any:
    pairs = x.reshape(*x.shape[:-1], x.shape[-1] // 2, 2)
    signed = script.spell("signed", [lambda: jnp.stack([-sin, sin], -1)], [lambda: jnp.stack([sin, sin], -1)])()
    return (pairs * cos[..., None] + pairs[..., ::-1] * signed).reshape(x.shape)
