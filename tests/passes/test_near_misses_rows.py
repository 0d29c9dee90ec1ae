"""Programs that look like a norm, a softmax or an activation and are another function.

They are refused, with the reason, and unchanged in value. Each stands beside a twin that differs in the one thing and
must match, so that no refusal is for another cause.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.scipy.stats import norm
from near_miss import (
    EPS,
    B,
    Case,
    D,
    arguments,
    quantised,
    softmax_of_another_row,
    softmax_stopped,
    softmax_with_sink,
    softmax_without_max,
)

# --- norms ------------------------------------------------------------------------------------------------------------


def normalise(x, scale, *, axis=-1, ddof=0, power=2, mean=None, statistic=lambda v: v, eps=EPS):
    mean = x.mean(axis, keepdims=True) if mean is None else mean
    variance = jnp.sum((x - mean) ** power, axis, keepdims=True) / (x.shape[axis] - ddof)
    return (x - mean) * statistic(lax.rsqrt(variance + eps)) * scale


def layer_norm(x, scale):
    return normalise(x, scale)


def rms(x, scale, *, statistic=lambda r: r, of=lambda x: x, factor=1.0):
    return x * statistic(lax.rsqrt(jnp.mean(jnp.square(of(x)), -1, keepdims=True) + EPS)) * scale * factor


def with_statistics(x, scale):
    rstd = lax.rsqrt(x.var(-1, keepdims=True) + EPS)
    return (x - x.mean(-1, keepdims=True)) * rstd * scale, rstd


def with_mean(x, scale):
    mean = x.mean(-1, keepdims=True)
    return normalise(x, scale, mean=mean), mean


def average(x):
    return x.mean(-1, keepdims=True)


def distributed(x, scale, bias, *, mean=None, of_mean=None, s=lambda s: s, minus=jnp.subtract):
    """x * s + (bias - mean * s): twins of which one argument is another value."""
    product = lax.rsqrt(x.var(-1, keepdims=True) + EPS) * scale
    shift = (average(x) if mean is None else mean) * (product if of_mean is None else of_mean)
    return x * s(product) + minus(bias, shift)


def distributed_with_mean(x, scale, bias):
    mean = average(x)
    return distributed(x, scale, bias, mean=mean), mean


DISTRIBUTED = [
    Case(f"distributed: {name}", "layer_norm", miss, distributed, reason, "rpp")
    for name, miss, reason in (
        ("the mean added", lambda x, s, b: distributed(x, s, b, minus=jnp.add), "is not the mean times"),
        ("the mean of other rows", lambda x, s, b: distributed(x, s, b, mean=x.mean(1, keepdims=True)), "not its mean"),
        ("no mean", lambda x, s, b: distributed(x, s, b, mean=x), "not its mean"),
        ("a maximum", lambda x, s, b: distributed(x, s, b, mean=x.max(-1, keepdims=True)), "not its mean"),
        ("the mean times scale alone", lambda x, s, b: distributed(x, s, b, of_mean=s), "without its mean subtracted"),
        ("a bias of each element", lambda x, s, b: distributed(x, s, jnp.sin(x)), "the normalised axis alone"),
        ("a bias of each row", lambda x, s, b: distributed(x, s, b[:, None]), "the normalised axis alone"),
        ("a scale of each row", lambda x, s, b: distributed(x, s[:, None], b), "the normalised axis alone"),
        ("of x transposed", lambda x, s, b: distributed(x, s, b, s=lambda p: p.swapaxes(1, 2)), ""),
        ("a mean without gradient", lambda x, s, b: distributed(x, s, b, mean=lax.stop_gradient(average(x))), ""),
        ("the mean used elsewhere", distributed_with_mean, "elsewhere"),
    )
]


NORMS = [
    *DISTRIBUTED,
    Case(
        "variance of N - 1",
        "layer_norm",
        lambda x, s: normalise(x, s, ddof=1),
        layer_norm,
        f"the sum over {D} elements is divided by {D - 1}",
        "rp",
    ),
    Case(
        "variance of N - 1 by jnp.var",
        "layer_norm",
        lambda x, s: (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, ddof=1, keepdims=True) + EPS) * s,
        lambda x, s: (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + EPS) * s,
        f"the sum over {D} elements is divided by {D - 1}",
        "rp",
    ),
    Case(
        "mean over another axis",
        "layer_norm",
        lambda x, s: normalise(x, s, mean=x.mean(1, keepdims=True)),
        layer_norm,
        None,
        "rp",
    ),  # fused as the rms norm of x - mean, which it is
    Case("all over another axis", "layer_norm", lambda x, s: normalise(x, s, axis=1), layer_norm, None, "rp"),
    Case(
        "norm over two axes",
        "layer_norm",
        lambda x, s: (x - x.mean((1, 2), keepdims=True)) * lax.rsqrt(x.var((1, 2), keepdims=True) + EPS) * s,
        layer_norm,
        None,
        "rp",
    ),  # fused as group norms, this and the one before
    Case(
        "eps outside of the square root",
        "layer_norm",
        lambda x, s: (x - x.mean(-1, keepdims=True)) / (jnp.sqrt(x.var(-1, keepdims=True)) + EPS) * s,
        layer_norm,
        "there is no eps inside the square root",
        "rp",
    ),
    Case(
        "variance of another value",
        "layer_norm",
        lambda x, y, s: (x - x.mean(-1, keepdims=True)) * lax.rsqrt(y.var(-1, keepdims=True) + EPS) * s,
        lambda x, y, s: layer_norm(x, s),
        "the variance is of another value than x",
        "rrp",
    ),
    Case(
        "mean of another value",
        "layer_norm",
        lambda x, y, s: (x - y.mean(-1, keepdims=True)) * lax.rsqrt(x.var(-1, keepdims=True) + EPS) * s,
        lambda x, y, s: layer_norm(x, s),
        "is not its mean along the normalised axis",
        "rrp",
    ),
    Case(
        "mean not subtracted",
        "layer_norm",
        lambda x, s: x * lax.rsqrt(x.var(-1, keepdims=True) + EPS) * s,
        layer_norm,
        "without its mean subtracted",
        "rp",
    ),
    Case("fourth moment", "layer_norm", lambda x, s: normalise(x, s, power=4), layer_norm, None, "rp"),
    Case("statistics returned", "layer_norm", with_statistics, layer_norm, "do not return the statistics", "rp"),
    Case("mean returned", "layer_norm", with_mean, layer_norm, "do not return the statistics", "rp"),
    Case(
        "variance without gradient",
        "layer_norm",
        lambda x, s: normalise(x, s, statistic=lax.stop_gradient),
        layer_norm,
        "",
        "rp",
    ),
    Case(
        "times the standard deviation",
        "layer_norm",
        lambda x, s: (x - x.mean(-1, keepdims=True)) * jnp.sqrt(x.var(-1, keepdims=True) + EPS) * s,
        layer_norm,
        "as a factor, not as a divisor",
        "rp",
    ),
    Case(
        "statistics of another row",
        "layer_norm",
        lambda x, s: normalise(x, s, statistic=lambda r: jnp.swapaxes(r, 1, 2)),
        layer_norm,
        "",
        "rp",
    ),
    Case(
        "mean square of another row",
        "rms_norm",
        lambda x: rms(x[0], 1.0, statistic=lambda r: r.T),
        lambda x: rms(x[0], 1.0),
        "the standard deviation of one row divides another",
        "r",
    ),
    Case(
        "mean square of the transposed matrix",
        "rms_norm",
        lambda x: rms(x[0], 1.0, of=lambda x: x.T),
        lambda x: rms(x[0], 1.0),
        "",
        "r",
    ),
    Case(
        "mean of absolute values",
        "rms_norm",
        lambda x, s: x * lax.rsqrt(jnp.mean(jnp.abs(x), -1, keepdims=True) + EPS) * s,
        rms,
        None,
        "rp",
    ),
    Case(
        "sum of squares",
        "rms_norm",
        lambda x, s: x * lax.rsqrt(jnp.sum(x * x, -1, keepdims=True) + EPS) * s,
        rms,
        None,
        "rp",
    ),
    Case(
        "eps that depends on data",
        "rms_norm",
        lambda x, c: x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + c * c),
        lambda x, c: rms(x, 1.0),
        None,
        "rc",
    ),
    Case(
        "quantised before its norm",
        "rms_norm",
        lambda x, s: x * lax.rsqrt(jnp.mean(jnp.square(quantised(x)), -1, keepdims=True) + EPS) * s,
        rms,
        "",
        "rp",
    ),
    Case("mean square without gradient", "rms_norm", lambda x, s: rms(x, s, of=lax.stop_gradient), rms, "", "rp"),
]


# --- softmax and activations ------------------------------------------------------------------------------------------


def gelu_tanh(x, *, c=0.044715, a=0.7978845608028654, one=1.0):
    return 0.5 * x * (one + jnp.tanh(a * (x + c * x**3)))


def gelu_erf(x, *, a=0.7071067811865476, one=1.0):
    return 0.5 * x * (one + lax.erf(x * a))


def gelu_by_cdf(x):
    return x * norm.cdf(x)


def gelu_past(x, limit):
    return x * jnp.where(x > limit, 1.001, 0.5 * (1 + lax.erf(x * 0.7071067811865476)))


def cdf_below(x, limit):
    return jnp.where(x < limit, 0.0, 0.5 * (1 + lax.erf(x * 0.7071067811865476)))


def gelu_erf_with_erf(x):
    e = lax.erf(x * 0.7071067811865476)
    return 0.5 * x * (1 + e), e


def silu_with_sigmoid(x):
    s = jax.nn.sigmoid(x)
    return x * s, s


ELEMENTWISE = [
    Case("sink in the denominator", "softmax", softmax_with_sink, jax.nn.softmax, None, "r"),
    Case("no maximum subtracted", "softmax", softmax_without_max, jax.nn.softmax, "without the maximum", "r"),
    Case(
        "denominator of another row", "softmax", lambda x: softmax_of_another_row(x[:, :D]), jax.nn.softmax, None, "r"
    ),
    Case(
        "maximum over another axis",
        "softmax",
        lambda x: jnp.exp(x - x.max(1, keepdims=True)) / jnp.exp(x - x.max(1, keepdims=True)).sum(-1, keepdims=True),
        jax.nn.softmax,
        "over another axis",
        "r",
    ),
    Case(
        "maximum of another value",
        "softmax",
        lambda x, y: (
            jnp.exp(x - y.max(-1, keepdims=True)) / jnp.exp(x - y.max(-1, keepdims=True)).sum(-1, keepdims=True)
        ),
        lambda x, y: jax.nn.softmax(x),
        "of another value",
        "rr",
    ),
    Case(
        "over two axes",
        "softmax",
        lambda x: jax.nn.softmax(x, axis=(1, 2)),
        jax.nn.softmax,
        "the sum runs over 2 axes",
        "r",
    ),
    Case("denominator without gradient", "softmax", softmax_stopped, jax.nn.softmax, None, "r"),
    Case("log of it", "softmax", jax.nn.log_softmax, jax.nn.softmax, None, "r"),
    Case(
        "exponent of base 2",
        "softmax",
        lambda x: (
            jnp.exp2(x - x.max(-1, keepdims=True)) / jnp.exp2(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True)
        ),
        jax.nn.softmax,
        None,
        "r",
    ),
    Case("0.0447 for 0.044715", "gelu_tanh", lambda x: gelu_tanh(x, c=0.0447), gelu_tanh, None, "r"),
    Case("0.8 for sqrt(2/pi)", "gelu_tanh", lambda x: gelu_tanh(x, a=0.8), gelu_tanh, None, "r"),
    Case("1.01 for 1", "gelu_tanh", lambda x: gelu_tanh(x, one=1.01), gelu_tanh, None, "r"),
    Case("0.707 for sqrt(1/2)", "gelu_erf", lambda x: gelu_erf(x, a=0.707), gelu_erf, None, "r"),
    Case(
        "erf of another value",
        "gelu_erf",
        lambda x, y: 0.5 * x * (1 + lax.erf(y * np.sqrt(0.5))),
        lambda x, y: gelu_erf(x),
        None,
        "rr",
    ),
    Case(
        "erf of the transposed",
        "gelu_erf",
        lambda x: 0.5 * x * (1 + lax.erf(x.swapaxes(1, 2) * np.sqrt(0.5))),
        gelu_erf,
        None,
        "r",
    ),
    Case(
        "erf without gradient",
        "gelu_erf",
        lambda x: 0.5 * x * (1 + lax.stop_gradient(lax.erf(x * np.sqrt(0.5)))),
        gelu_erf,
        None,
        "r",
    ),
    Case("x past 20 in another way", "gelu_erf", lambda x: gelu_past(x, 20.0), gelu_erf, None, "r"),
    Case("zero for x below -9.5", "gelu_erf", lambda x: x * cdf_below(x, -9.5), gelu_erf, None, "r"),
    Case("cdf of minus |x|", "gelu_erf", lambda x: x * norm.cdf(-jnp.abs(x)), gelu_by_cdf, None, "r"),
    Case(
        "cdf of another scale",
        "gelu_erf",
        lambda x: x * norm.cdf(x, scale=1.01),
        gelu_by_cdf,
        None,
        "r",
    ),
    Case(
        "cdf of another value",
        "gelu_erf",
        lambda x, y: x * norm.cdf(y),
        lambda x, y: gelu_by_cdf(x),
        None,
        "rr",
    ),
    Case("erf returned too", "gelu_erf", gelu_erf_with_erf, gelu_erf, None, "r"),
    Case("quick gelu", "silu", lambda x: x * jax.nn.sigmoid(1.702 * x), jax.nn.silu, None, "r"),
    Case(
        "sigmoid of another value", "silu", lambda x, y: x * jax.nn.sigmoid(y), lambda x, y: jax.nn.silu(x), None, "rr"
    ),
    Case("sigmoid of minus x", "silu", lambda x: x * jax.nn.sigmoid(-x), jax.nn.silu, None, "r"),
    Case("sigmoid returned too", "silu", silu_with_sigmoid, jax.nn.silu, None, "r"),
    Case("mish", "silu", lambda x: x * jnp.tanh(jnp.log1p(jnp.exp(x))), jax.nn.silu, None, "r"),
]


CASES = [*NORMS, *ELEMENTWISE]


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.op}: {c.name}")
def test_near_miss_is_refused_with_its_reason_and_unchanged(check_refused, case):
    check_refused(case.miss, *arguments(case.args), op=case.op, reason=case.reason)


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.op}: {c.name}")
def test_twin_of_near_miss_is_fused(check_fused, case):
    check_fused(case.twin, *arguments(case.args), counts={case.op: 1}, floor_ulps=32)


# --- what must be fused although it looks odd -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "function",
    [
        lambda x, y: rms(x, y[0, :, :1]),
        rms,
        lambda x, y: rms(x, 1.0, factor=2.0),
        lambda x, y: rms(x, y[0, 0, 0]),
    ],
    ids=["of each row", "of each element", "constant", "data-dependent scalar"],
)
def test_factor_that_is_no_scale_stays_outside_of_the_norm(check_fused, function):
    check_fused(function, *arguments("rr"), counts={"rms_norm": 1}, floor_ulps=32)


def test_transposed_norm_is_transposed(check_fused):
    def function(x):
        square = x[:, :B]  # (B, B, D): a lost transpose keeps the shape
        rstd = lax.rsqrt(jnp.mean(jnp.square(square), -1, keepdims=True) + EPS)
        return square.swapaxes(0, 1) * rstd.swapaxes(0, 1)

    check_fused(function, *arguments("r"), counts={})
