"""Norms, softmax and activations along rows, in the spellings that people use, and in some that are other functions."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from fuzz.script import Script
from jax import lax

# --- norms ------------------------------------------------------------------------------------------------------------


def norm(script: Script, x: Any) -> tuple[Any, list[Any]]:
    """A layer norm or an rms norm, with a residual add in front or not: (y, values that may be returned too)."""
    taps = []
    n, narrow = x.shape[-1], x.dtype
    if script.pick("residual", False, True):
        x = x + script.array("normal", x.shape, x.dtype)
        taps.append(x)
    wide = script.pick("cast", jnp.float32, narrow)
    x = x.astype(wide)
    axis = script.spell("axis", [-1], [0, tuple(range(x.ndim))[-2:], x.ndim - 2])
    kept = lambda f, v: f(v, axis, keepdims=True)  # noqa: E731
    count = np.prod([x.shape[a] for a in np.atleast_1d(axis)]).item()
    mean = lambda v: script.pick(  # noqa: E731
        "mean",
        lambda: kept(jnp.mean, v),
        lambda: kept(jnp.sum, v) / count,
        lambda: kept(jnp.sum, v) * (1 / count),
        lambda: jnp.expand_dims(jnp.sum(v, axis), axis) / count,
    )()
    centred = script.pick("kind", True, False)
    square = script.spell("square", [jnp.square, lambda v: v * v, lambda v: v**2], [jnp.abs, lambda v: v**4])
    if centred:
        mu = mean(x)
        mu_of = script.spell(
            "mean",
            [lambda: mu],
            [lambda: mean(x * 1.01), lambda: lax.stop_gradient(mu), lambda: jnp.max(x, axis, keepdims=True)],
        )()
        c = x - mu_of
        spread = script.spell(
            "variance",
            [
                lambda: mean(square(c)),
                lambda: kept(jnp.var, x),
                lambda: mean(square(x)) - square(mu),
                lambda: jnp.maximum(0.0, mean(jnp.square(x)) - jnp.square(mu)),
                lambda: mean(square(x - mean(x))),
            ],
            [
                lambda: jnp.sum(square(c), axis, keepdims=True) / max(count - 1, 1),
                lambda: jnp.var(x, axis, keepdims=True, ddof=min(1, count - 1)),
                lambda: jnp.sum(square(c), axis, keepdims=True),
                lambda: mean(square(x)),
                lambda: lax.stop_gradient(mean(square(c))),
                lambda: mean(square(c)) * 1.01,
                lambda: mean(square(x)) - mu,
            ],
        )()
        taps += [mu, c]
    else:
        c = x
        spread = script.spell(
            "mean square",
            [lambda: mean(square(x)), lambda: mean(x * x)],
            [
                lambda: jnp.sum(square(x), axis, keepdims=True),
                lambda: mean(square(lax.stop_gradient(x))),
                lambda: mean(square(x)) - 0.01,
                lambda: mean(square(x + 0.01)),
            ],
        )()
    eps = script.pick("eps", 1e-5, 1e-6, 1e-3, 0.5)
    rstd = script.spell(
        "rstd",
        [
            lambda: lax.rsqrt(spread + eps),
            lambda: 1 / jnp.sqrt(spread + eps),
            lambda: lax.rsqrt(eps + spread),
            lambda: (spread + eps) ** -0.5,
        ],
        [
            lambda: 1 / (jnp.sqrt(spread + 1e-2) + eps),
            lambda: lax.rsqrt(jnp.maximum(spread, 1e-2)),
            lambda: jnp.sqrt(spread + eps),
            lambda: lax.rsqrt(spread + script.array("scale", (), wide) ** 2),
            lambda: 1 / (spread + eps),
        ],
    )()
    taps += [spread, rstd]
    y = script.pick(
        "order",
        lambda: c * rstd,
        lambda: c / jnp.sqrt(spread + eps),
        lambda: rstd * c,
        lambda: lax.mul(c, jnp.broadcast_to(rstd, c.shape)),
    )()
    early = script.pick("cast back", False, True)
    if early:
        y = y.astype(narrow)
    scale_shape = lambda: script.spell(  # noqa: E731
        "parameter", [(n,), (1, n)], [x.shape, (), (x.shape[-2], 1), (x.shape[-2], n)]
    )
    how = script.pick("scale", "w", "1 + w", "none", "folded", "distributed")
    if how != "none":
        w = script.array("scale" if how != "1 + w" else "normal", scale_shape(), y.dtype)
        w = w + 1 if how == "1 + w" else w
        folded = how == "folded" and not early
        y = c * (rstd * w) if folded else script.pick("side", lambda: y * w, lambda: w * y)()
    if how == "distributed" and centred and not early:
        y = _distributed(script, x, mu_of, rstd, w)
    if script.pick("bias", True, False):
        b = script.array("normal", scale_shape(), y.dtype)
        y = y + b if script.pick("side", 0, 1) == 0 else b + y
    return script.pick("result", lambda: y.astype(narrow), lambda: y)(), taps


def _distributed(script: Script, x: Any, mean: Any, rstd: Any, w: Any) -> Any:
    """(x - mean) * rstd * w as a sum, which may have a bias."""
    s = script.pick("side", lambda: rstd * w, lambda: w * rstd)()
    b = script.array("normal", x.shape[-1:], s.dtype)
    return (
        x * s
        + script.spell(
            "shift",
            [lambda: b - mean * s, lambda: b + (-mean) * s, lambda: -mean * s, lambda: -(s * mean) + b],
            [lambda: b + mean * s, lambda: mean * s - b, lambda: b - mean * rstd, lambda: b - mean * w],
        )()
    )


# --- softmax ----------------------------------------------------------------------------------------------------------


def softmax_along(script: Script, x: Any, axis: int) -> Any:
    """softmax(x) along an axis, or nearly."""
    top = lambda v: jnp.max(v, axis, keepdims=True)  # noqa: E731
    other = 0 if axis % x.ndim else x.ndim - 1

    def by_hand(shift, total=lambda e: jnp.sum(e, axis, keepdims=True)):
        e = jnp.exp(x - shift(x))
        return e / total(e)

    def by_reciprocal():
        e = jnp.exp(x - top(x))
        return e * (1 / jnp.sum(e, axis, keepdims=True))

    def spelled_wide():
        return jax.nn.softmax(x.astype(jnp.float32), axis=axis).astype(x.dtype)

    return script.spell(
        "softmax",
        [
            lambda: jax.nn.softmax(x, axis=axis),
            spelled_wide,
            lambda: by_hand(top),
            lambda: by_hand(lambda v: lax.stop_gradient(top(v))),
            by_reciprocal,
            lambda: jnp.exp(jax.nn.log_softmax(x, axis=axis)),
            lambda: jnp.exp(x - jax.nn.logsumexp(x, axis=axis, keepdims=True)),
        ],
        [
            lambda: by_hand(lambda v: jnp.max(v, other, keepdims=True)),
            lambda: by_hand(lambda v: 0.0),
            lambda: by_hand(top, lambda e: jnp.sum(e, axis, keepdims=True) + 1),
            lambda: by_hand(top, lambda e: jnp.sum(e, other, keepdims=True)),
            lambda: by_hand(top, lambda e: lax.stop_gradient(jnp.sum(e, axis, keepdims=True))),
            lambda: by_hand(top, lambda e: jnp.sum(e)),
            lambda: by_hand(top, lambda e: jnp.sum(e * e, axis, keepdims=True)),
            lambda: by_hand(lambda v: jnp.maximum(top(v), 0)),
            lambda: by_hand(lambda v: jnp.mean(v, axis, keepdims=True)),
            lambda: by_hand(lambda v: 2 * top(v)),
            lambda: jax.nn.softmax(x, axis=other),
            lambda: jnp.exp2(x - top(x)) / jnp.sum(jnp.exp2(x - top(x)), axis, keepdims=True),
        ],
    )()


def softmax(script: Script, x: Any) -> tuple[Any, list[Any]]:
    axis = script.pick("axis", -1, *range(x.ndim))
    x = script.pick(
        "logits",
        lambda: x,
        lambda: x * script.pick("temperature", 3.0, 20.0, -1.0),
        lambda: x / jnp.sqrt(jnp.asarray(x.shape[-1], x.dtype)),
        lambda: jnp.where(script.array("mask", x.shape), x, script.pick("fill", -jnp.inf, -1e9)),
        lambda: x - jnp.max(x, axis, keepdims=True),
        lambda: x + script.array("normal", x.shape[-1:], x.dtype),
    )()
    y = softmax_along(script, x, axis)
    return script.pick("use", lambda: y, lambda: y * x.shape[axis], lambda: y * script.array("normal", x.shape))(), [y]


# --- activations ------------------------------------------------------------------------------------------------------


def _off(script: Script, what: str, value: float) -> float:
    """A constant of a formula, seldom another one."""
    return script.spell(what, [value], [value * 1.01, -value, value + 1e-3, 0.0])


def gelu_tanh(script: Script, x: Any) -> Any:
    c, a = _off(script, "0.044715", 0.044715), _off(script, "sqrt(2/pi)", float(np.sqrt(2 / np.pi)))
    cube = script.spell("cube", [lambda: x**3, lambda: x * x * x, lambda: x * x**2], [lambda: x**2 * jnp.abs(x)])()
    inner = script.pick(
        "inner", lambda: a * (x + c * cube), lambda: a * x + a * c * cube, lambda: a * x * (1 + c * x * x)
    )()
    one = _off(script, "1", 1.0)
    return script.pick(
        "gelu_tanh",
        lambda: 0.5 * x * (one + jnp.tanh(inner)),
        lambda: x * (0.5 * (one + jnp.tanh(inner))),
        lambda: x * jax.nn.sigmoid(2 * inner),
        lambda: (x / 2) * jnp.tanh(inner) + x / 2,
        lambda: jax.nn.gelu(x),
    )()


def gelu_erf(script: Script, x: Any) -> Any:
    a = _off(script, "sqrt(1/2)", float(np.sqrt(0.5)))
    return script.pick(
        "gelu_erf",
        lambda: jax.nn.gelu(x, approximate=False),
        lambda: 0.5 * x * (1 + lax.erf(x * a)),
        lambda: x * 0.5 * lax.erfc(-x * a),
        lambda: x * (lax.erf(x / 1.4142135) + 1) / 2,
        lambda: x * jax.scipy.stats.norm.cdf(x.astype(jnp.float32)).astype(x.dtype),
    )()


def silu(script: Script, x: Any) -> Any:
    one = _off(script, "1", 1.0)
    return script.pick(
        "silu",
        lambda: jax.nn.silu(x),
        lambda: x * jax.nn.sigmoid(x * one),
        lambda: x / (one + jnp.exp(-x)),
        lambda: x * (1 / (1 + jnp.exp(-x))),
        lambda: 0.5 * x * (1 + jnp.tanh(x * 0.5)),
    )()


def neighbour(script: Script, x: Any) -> Any:
    """Activations that none of our ops is."""
    return script.pick(
        "neighbour",
        lambda: x * jax.nn.sigmoid(1.702 * x),
        lambda: x * jnp.tanh(jnp.log1p(jnp.exp(x))),
        lambda: jnp.tanh(x),
        lambda: jax.nn.sigmoid(x) * script.array("scale", x.shape[-1:], x.dtype),
        lambda: x * lax.stop_gradient(jax.nn.sigmoid(x)),
        lambda: lax.stop_gradient(x) * jax.nn.sigmoid(x),
        lambda: x * jax.nn.sigmoid(jnp.roll(x, 1, -1)),
        lambda: x * jax.nn.sigmoid(jnp.max(x, -1, keepdims=True)),
        lambda: x * (1 - jax.nn.sigmoid(x)),
        lambda: x + x * jax.nn.sigmoid(x),
        lambda: x * x * jax.nn.sigmoid(x),
    )()


def _halves(script: Script, x: Any) -> tuple[Any, Any]:
    """Two parts of one size, nearly always the halves of the last axis."""
    n = x.shape[-1] // 2
    return script.spell(
        "halves",
        [
            lambda: tuple(jnp.split(x[..., : 2 * n], 2, axis=-1)),
            lambda: (x[..., :n], x[..., n : 2 * n]),
            lambda: (x[..., n : 2 * n], x[..., :n]),
        ],
        [
            lambda: (x[..., :n], x[..., -n:]),
            lambda: (x[..., : 2 * n : 2], x[..., 1 : 2 * n : 2]),
            lambda: (x[..., :n], x[..., :n]),
            lambda: (x[..., :n], 2 * x[..., n : 2 * n]),
        ],
    )()


def activation(script: Script, x: Any) -> tuple[Any, list[Any]]:
    gate = script.pick("gated", None, "same", "linear", "other half", "nearly")
    narrow = x.dtype
    if script.one_in(4, "scaled before"):
        x = x * script.pick("by", 2.0, 0.5, 9.0)
    if script.one_in(4, "in float32"):
        x = x.astype(jnp.float32)
    halves = _halves(script, x) if gate == "other half" and x.shape[-1] > 1 else (x, x)
    x, other = halves
    y = script.pick("activation", gelu_tanh, gelu_erf, silu, neighbour)(script, x)
    taps = [y]
    if gate == "same":
        y = y * x
    elif gate == "other half":
        y = script.pick("product", lambda: y * other, lambda: other * y)()
    elif gate == "nearly":
        y = script.pick(
            "nearly gated",
            lambda: y * script.array("normal", x.shape[-1:], x.dtype),
            lambda: y * y,
            lambda: y * (y + x),
            lambda: y / (1 + x * x),
            lambda: y * lax.stop_gradient(x),
            lambda: y * 0.5,
        )()
    elif gate == "linear":
        y = y * script.array("normal", x.shape, x.dtype)
    return script.pick("result", lambda: y.astype(narrow), lambda: y)(), taps
