"""Self- and cross-attention in any layout, with masks and biases of every origin; and its near misses."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from fuzz.rows import norm, softmax_along
from fuzz.script import Script
from jax import lax

# Letters: a batch, h heads, g query heads to a key head, t query and s key positions, d and e features.


def attention(script: Script, x: Any) -> tuple[Any, list[Any]]:
    """x: (..., t, features) -> the same shape."""
    batch = "abc"[: x.ndim - 2]
    sizes = dict(zip(batch, x.shape[:-2], strict=True), t=x.shape[-2])
    sizes |= dict(d=script.pick("d", 4, 3, 8, 1), h=script.pick("heads", 2, 3, 1), g=script.pick("groups", 2, 3))
    sizes["e"] = script.pick("e", sizes["d"], 5)
    heads = script.pick("head form", "h", "hg", "repeated", "")
    repeated, heads = heads == "repeated", heads.replace("repeated", "hg")
    memory = x
    if script.one_in(3, "cross"):
        sizes["s"] = script.pick("s", 5, 2, 7)
        memory = script.array("normal", (*x.shape[:-2], sizes["s"], x.shape[-1]), x.dtype)
    sizes["s"] = memory.shape[-2]
    key_heads = heads if repeated else heads.replace("g", "")

    q = _projected(script, "query", x, batch + "t" + heads + "d", sizes)
    k = _projected(script, "key", memory, batch + "s" + heads.replace("g", "") + "d", sizes)
    v = _projected(script, "value", memory, batch + "s" + heads.replace("g", "") + "e", sizes)
    if script.one_in(6, "qk-norm"):
        q, _ = norm(script, q)
        k, _ = norm(script, k)
    if repeated and heads:
        k, v = (_repeated(script, y, sizes["g"]) for y in (k, v))
    if heads == "hg" and (repeated or script.one_in(3, "heads merged")) and key_heads == "hg":
        sizes = {**sizes, "h": sizes["h"] * sizes["g"]}
        merge = lambda y: y.reshape(*y.shape[:-3], -1, y.shape[-1])  # noqa: E731
        q, k, v = merge(q), merge(k), merge(v)
        heads = key_heads = "h"
    factor = sizes["d"] ** -0.5
    place = script.spell(
        "scale",
        ["logits", "query", "key", "both", "divide", "none"],
        ["data", "heads", "after mask", "negative", "softcap", "zero"],
    )
    if place in ("query", "both"):
        q = q * (factor**0.5 if place == "both" else factor)
    if place in ("key", "both"):
        k = k * (factor**0.5 if place == "both" else factor)

    q, ql = _laid_out(script, "query layout", q, batch + "t" + heads + "d")
    k, kl = _laid_out(script, "key layout", k, batch + "s" + key_heads + "d")
    v, vl = _laid_out(script, "value layout", v, batch + "s" + key_heads + "e")
    ll = batch + heads + "ts"
    if script.one_in(5):
        ll = script.shuffled("logits", ll)
    if sizes["t"] == sizes["s"] and script.one_in(40, "key and query positions swapped"):
        ll = ll.replace("t", "z").replace("s", "t").replace("z", "s")
    accumulate = script.pick("accumulate", None, jnp.float32) if q.dtype != jnp.float16 else None
    logits = jnp.einsum(f"{ql},{kl}->{ll}", q, k, preferred_element_type=accumulate)
    if script.pick("logits in float32", False, True):
        logits = logits.astype(jnp.float32)
    logits = {
        "logits": lambda y: y * factor,
        "divide": lambda y: y / np.sqrt(sizes["d"]).astype(y.dtype),
        "data": lambda y: y * script.array("scale", (), y.dtype),
        "heads": lambda y: y * script.array("scale", [sizes[c] if c in heads else 1 for c in ll], y.dtype),
        "negative": lambda y: y * -factor,
        "softcap": lambda y: jnp.tanh(y / 3.0) * 3.0,
        "zero": lambda y: y * 0.0,
    }.get(place, lambda y: y)(logits)
    taps = [logits]
    logits = _scored(script, logits, ll, sizes, heads, batch)
    if place == "after mask":
        logits = logits * factor
    p = softmax_along(script, logits, ll.index("s"))
    taps.append(p)
    p = script.spell(
        "probabilities",
        [lambda: p, lambda: p.astype(v.dtype)],
        [
            lambda: p * script.array("mask", p.shape),
            lambda: jnp.where(script.array("mask", p.shape), p, 0),
            lambda: p * 0.9,
            lambda: p + 0.01,
            lambda: lax.stop_gradient(p),
            lambda: jnp.flip(p, ll.index("s")),
            lambda: p * p,
        ],
    )()
    ol = script.shuffled("result layout", batch + "t" + heads + "e") if script.one_in(4) else batch + "t" + heads + "e"
    out = jnp.einsum(f"{ll},{vl}->{ol}", p, v)
    out = jnp.transpose(out, [ol.index(c) for c in batch + "t" + heads + "e"])
    out = out.reshape(*x.shape[:-1], -1).astype(x.dtype)
    if script.pick("output product", True, False) or out.shape != x.shape:
        out = out @ script.array("weight", (out.shape[-1], x.shape[-1]), x.dtype)
    return out, taps


def _projected(script: Script, what: str, x: Any, letters: str, sizes: dict[str, int]) -> Any:
    """x times a matrix, split into heads."""
    shape = [sizes[c] for c in letters]
    features = letters[len(x.shape) - 1 :]
    width = int(np.prod([sizes[c] for c in features]))
    if len(features) > 1 and script.pick(f"{what} by", "matmul", "einsum") == "einsum":
        w = script.array("weight", (x.shape[-1], width), x.dtype).reshape(-1, *(sizes[c] for c in features))
        return jnp.tensordot(x, w, 1)
    if width == x.shape[-1] and script.one_in(3, f"{what} is x"):
        return x.reshape(shape)
    y = x @ script.array("weight", (x.shape[-1], width), x.dtype)
    if script.one_in(4, f"{what} bias"):
        y = y + script.array("normal", (width,), x.dtype)
    return y.reshape(shape)


def _repeated(script: Script, y: Any, groups: int) -> Any:
    """(..., h, d) -> (..., h, g, d): each head g times; wrong: heads tiled, which orders them otherwise."""
    h, d = y.shape[-2:]
    return script.pick(
        "repeat",
        lambda: jnp.repeat(y, groups, axis=-2),
        lambda: jnp.broadcast_to(y[..., None, :], (*y.shape[:-2], h, groups, d)),
        lambda: jnp.tile(y, (1,) * (y.ndim - 2) + (groups, 1)),
    )().reshape(*y.shape[:-2], h, groups, d)


def _laid_out(script: Script, what: str, y: Any, letters: str) -> tuple[Any, str]:
    if not script.one_in(3):
        return y, letters
    order = script.shuffled(what, letters)
    return jnp.transpose(y, [letters.index(c) for c in order]), order


# --- masks and biases -------------------------------------------------------------------------------------------------


def _scored(script: Script, logits: Any, ll: str, sizes: dict[str, int], heads: str, batch: str) -> Any:
    """Up to three masks and biases, in any order."""
    for _ in range(script.pick("scores", 1, 0, 2, 3)):
        logits = script.pick("score", _masked, _masked, _biased)(script, logits, ll, sizes, heads, batch)
    return logits


def _shape(script: Script, ll: str, sizes: dict[str, int], lacking: str) -> list[int]:
    return [1 if c in lacking else sizes[c] for c in ll]


def _positions(ll: str, letter: str, n: int, dtype: Any = jnp.int32) -> Any:
    return jnp.arange(n, dtype=dtype).reshape([-1 if c == letter else 1 for c in ll])


def _mask(script: Script, ll: str, sizes: dict[str, int], heads: str, batch: str) -> Any:
    dtype = script.pick("position dtype", jnp.int32, jnp.float32, jnp.uint8, jnp.int8)
    t, s = (_positions(ll, c, sizes[c], dtype) for c in "ts")

    def tril(k=0, maker=jnp.tril, xp=jnp):
        m = maker(xp.ones((sizes["t"], sizes["s"]), bool), k)
        return jnp.asarray(m if ll.index("t") < ll.index("s") else m.T).reshape(
            _shape(script, ll, sizes, batch + heads)
        )

    def padding():
        lengths = script.array("length", [sizes[c] if c in batch else 1 for c in ll], f"int32<{sizes['s']}")
        return s.astype(jnp.int32) < lengths

    def segments():
        a, b = (script.array("label", [sizes[c] if c in batch + x else 1 for c in ll], "int32<2") for x in "ts")
        return a == b

    width = script.pick("width", 2, 0, 1, 9)
    shift = script.pick("shift", 0, 1, -1, 2)
    return script.pick(
        "mask",
        lambda: script.array("mask", _shape(script, ll, sizes, "")),
        lambda: script.array("mask", _shape(script, ll, sizes, heads)),
        lambda: script.array("mask", _shape(script, ll, sizes, heads + "t")),
        lambda: script.array("mask", _shape(script, ll, sizes, batch + heads)),
        lambda: script.array("normal", _shape(script, ll, sizes, heads)) > -1,
        tril,
        lambda: tril(shift),
        lambda: tril(shift, np.tril, np),
        lambda: tril(-shift, np.triu, np),
        lambda: t >= s,
        lambda: s <= t + shift,
        lambda: t > s - width,
        lambda: jnp.abs(t.astype(jnp.int32) - s.astype(jnp.int32)) <= width,
        lambda: jnp.abs(t - s) < width,
        lambda: (t >= s) & (t - s < width),
        lambda: (t >= s) | (s < width),
        lambda: s < width,
        padding,
        segments,
        lambda: (t // 2) == (s // 2),
        lambda: t + s < width + 3,
        lambda: 2 * t >= s,
        lambda: t != s,
        lambda: (t >= s).astype(jnp.float32) > 0,
    )()


def _masked(script: Script, logits: Any, ll: str, sizes: dict[str, int], heads: str, batch: str) -> Any:
    mask = _mask(script, ll, sizes, heads, batch)
    for _ in range(script.below(2)):
        other = _mask(script, ll, sizes, heads, batch)
        mask = script.pick("joined", jnp.logical_and, jnp.logical_or, lambda a, b: a & ~b)(mask, other)
    low = float(jnp.finfo(logits.dtype).min)
    fill = script.spell(
        "fill", [-jnp.inf, low, -1e30 if low < -1e30 else -6e4, low / 2], [-1e4, -10.0, 0.0, 1e4, jnp.nan]
    )
    if (
        script.poisoned
    ):  # a finite fill stands above a logit of -inf, which the rewriter does not expect: docs/matching.md
        fill = -jnp.inf
    zero = jnp.zeros((), logits.dtype)
    fill_like = jnp.asarray(fill, logits.dtype)
    return script.pick(
        "applied",
        lambda: jnp.where(mask, logits, fill),
        lambda: jnp.where(mask, logits, fill_like),
        lambda: jnp.where(~mask, fill, logits),
        lambda: lax.select(jnp.broadcast_to(mask, logits.shape), logits, jnp.full_like(logits, fill)),
        lambda: logits + jnp.where(mask, zero, fill_like),
        lambda: logits + (1 - mask.astype(logits.dtype)) * jnp.asarray(max(fill, low / 2), logits.dtype),
        lambda: jnp.where(mask, logits, script.array("normal", (), logits.dtype)),
        lambda: logits * mask,
    )()


def _biased(script: Script, logits: Any, ll: str, sizes: dict[str, int], heads: str, batch: str) -> Any:
    t, s = (_positions(ll, c, sizes[c]) for c in "ts")
    lacking = script.pick("bias lacks", batch, "", heads, batch + heads, heads + "t", "s", batch + "ts", "t", ll)
    dtype = script.pick("bias dtype", logits.dtype, jnp.float32, jnp.bfloat16)
    plain = lambda: script.array("normal", _shape(script, ll, sizes, lacking), dtype)  # noqa: E731
    bias = script.pick(
        "bias",
        plain,
        lambda: plain() * script.pick("by", 2.0, -0.5),
        lambda: script.array("normal", _shape(script, ll, sizes, batch + "ts")) * (s - t),
        lambda: -jnp.abs(t - s).astype(jnp.float32) * 0.25,
        lambda: script.array("normal", (sizes["t"] + sizes["s"],))[s - t + sizes["t"] - 1],
        lambda: jnp.asarray(0.7, logits.dtype),
        lambda: script.array("mask", _shape(script, ll, sizes, "")).astype(logits.dtype),
        lambda: jnp.log(jnp.abs(plain()) + 0.1),
        lambda: (s - t).astype(jnp.int32),
    )()
    wide = logits
    return script.pick(
        "added", lambda: wide + bias, lambda: bias + wide, lambda: wide - bias, lambda: wide + bias.astype(wide.dtype)
    )().astype(logits.dtype)


def flash_like(script: Script, x: Any) -> tuple[Any, list[Any]]:
    """Attention whose softmax is divided after the product with value: not matched, or right."""
    w = script.array("weight", (x.shape[-1], x.shape[-1]), x.dtype)
    logits = (x @ w) @ jnp.swapaxes(x, -1, -2) / np.sqrt(x.shape[-1]).astype(x.dtype)
    e = jnp.exp(logits - lax.stop_gradient(logits.max(-1, keepdims=True)))
    return (e @ x) / e.sum(-1, keepdims=True), [logits]


def jax_nn(script: Script, x: Any) -> tuple[Any, list[Any]]:
    """jax.nn.dot_product_attention, with what it takes."""
    b, t = int(np.prod(x.shape[:-2])), x.shape[-2]
    if x.dtype == jnp.float16:  # XLA's CPU backend has no such product
        x = x.astype(jnp.bfloat16)
    h, k, d = (*script.pick("heads", (2, 2), (4, 2), (3, 1), (1, 1)), script.pick("d", 4, 8, 3))
    q, key, v = ((x @ script.array("weight", (x.shape[-1], n * d), x.dtype)).reshape(b, t, n, d) for n in (h, k, k))
    options: dict[str, Any] = {}
    if script.one_in(3, "bias"):
        options["bias"] = script.array("normal", script.pick("of", (1, h, t, t), (b, 1, t, t), (1, 1, 1, t)), x.dtype)
    if script.one_in(4, "scale"):
        options["scale"] = 0.3
    if not script.poisoned:  # masks fill with a finite number: see _masked
        options |= _jax_nn_masks(script, b, h, t)
    out = jax.nn.dot_product_attention(q, key, v, **options)
    return out.reshape(*x.shape[:-1], h * d) @ script.array("weight", (h * d, x.shape[-1]), x.dtype), [q]


def _jax_nn_masks(script: Script, b: int, h: int, t: int) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if script.one_in(3, "mask"):
        options["mask"] = script.array(
            "mask", script.pick("of", (b, 1, t, t), (1, h, t, t), (1, 1, 1, t), (b, h, 1, t))
        )
    if script.one_in(3, "causal"):
        options["is_causal"] = True
    if script.one_in(4, "window"):
        options["local_window_size"] = script.pick("of", (2, 1), (1, 0), (0, 0), (9, 9))
    if script.one_in(4, "lengths"):
        options["key_value_seq_lengths"] = script.array("length", (b,), f"int32<{t}")
    if script.one_in(4, "query lengths"):
        options["query_seq_lengths"] = script.array("length", (b,), f"int32<{t}")
    return options
