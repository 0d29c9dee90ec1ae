"""Programs that look like a pattern and are another function: refused, with the reason, and unchanged in value.

Each stands beside a twin that differs in the one thing and must match, so that no refusal is for another cause.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name

import zenith_jax as zenith

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


# --- attention --------------------------------------------------------------------------------------------------------


def attend(q, k, v, *, logits=lambda x: x, softmax=jax.nn.softmax, probabilities=lambda p: p, scale=0.4):
    """(b, h, n, d) attention with a hook at each step."""
    x = logits(jnp.einsum("bhtd,bhsd->bhts", q, k) * scale)
    return jnp.einsum("bhts,bhsd->bhtd", probabilities(softmax(x)), v)


def plain(q, k, v, *rest):
    del rest
    return attend(q, k, v)


def masked(q, k, v, m, fill=-jnp.inf):
    return attend(q, k, v, logits=lambda x: jnp.where(m, x, fill))


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


def dropout(p):
    keep = jax.random.bernoulli(jax.random.key(0), 0.5, p.shape)
    return jnp.where(keep, p / 0.5, 0.0)


def with_probabilities(q, k, v):
    kept = []
    out = attend(q, k, v, probabilities=lambda p: kept.append(p) or p)
    return out, kept[0]


def with_logits(q, k, v):
    kept = []
    out = attend(q, k, v, logits=lambda x: kept.append(x) or x)
    return out, kept[0].max()


ATTENTION = [
    Case(
        "softmax over the queries",
        "attention",
        lambda q, k, v: attend(q, k, v, softmax=lambda x: jax.nn.softmax(x, axis=-2)),
        plain,
        "another axis than the product with value",
        "xxx",
    ),
    Case(
        "softmax over the heads",
        "attention",
        lambda q, k, v: attend(q, k, v, softmax=lambda x: jax.nn.softmax(x, axis=1)),
        plain,
        "another axis than the product with value",
        "xxx",
    ),
    Case(
        "mask after the softmax",
        "attention",
        lambda q, k, v, m: attend(q, k, v, probabilities=lambda p: jnp.where(m, p, 0.0)),
        masked,
        "stands between the softmax and its product",
        "xxxm",
    ),
    Case(
        "mask multiplied after the softmax",
        "attention",
        lambda q, k, v, m: attend(q, k, v, probabilities=lambda p: p * m),
        masked,
        "multiplied by something before it is used",
        "xxxm",
    ),
    Case(
        "dropout on the probabilities",
        "attention",
        lambda q, k, v: attend(q, k, v, probabilities=dropout),
        plain,
        "stands between the softmax and its product",
        "xxx",
    ),
    Case("probabilities returned too", "attention", with_probabilities, plain, "used elsewhere too", "xxx"),
    Case("logits used too", "attention", with_logits, plain, "used elsewhere too", "xxx"),
    Case(
        "named attention weights",
        "attention",
        lambda q, k, v: attend(q, k, v, probabilities=lambda p: checkpoint_name(p, "weights")),
        plain,
        None,
        "xxx",
    ),
    Case(
        "scale that depends on data",
        "attention",
        lambda q, k, v, c: attend(q, k, v, logits=lambda x: x * c),
        plain,
        "the scale of the logits depends on data",
        "xxxc",
    ),
    Case(
        "temperature of each head",
        "attention",
        lambda q, k, v, h: attend(q, k, v, logits=lambda x: x * h[:, :, None, None]),
        plain,
        "the scale of the logits depends on data",
        "xxxh",
    ),
    Case(
        "soft cap on the logits",
        "attention",
        lambda q, k, v: attend(q, k, v, logits=lambda x: 5 * jnp.tanh(x / 5)),
        plain,
        "`tanh` stands between",
        "xxx",
    ),
    Case(
        "fill not low enough",
        "attention",
        lambda q, k, v, m: masked(q, k, v, m, fill=-20.0),
        lambda q, k, v, m: masked(q, k, v, m, fill=-1e9),
        "not low enough to vanish",
        "xxxm",
    ),
    Case(
        "fill that is scaled up to nothing",
        "attention",
        lambda q, k, v, m: attend(q, k, v, logits=lambda x: jnp.where(m, x, -1e9) * 1e-8),
        lambda q, k, v, m: attend(q, k, v, logits=lambda x: jnp.where(m, x, -jnp.inf) * 1e-8),
        "not low enough to vanish",
        "xxxm",
    ),
    Case(
        "positive fill",
        "attention",
        lambda q, k, v, m: masked(q, k, v, m, fill=1e9),
        masked,
        "not low enough to vanish",
        "xxxm",
    ),
    Case(
        "fill is an array",
        "attention",
        lambda q, k, v, m: attend(q, k, v, logits=lambda x: jnp.where(m, x, k.sum())),
        masked,
        "not one constant",
        "xxxm",
    ),
    Case(
        "bias after a finite mask",
        "attention",
        lambda q, k, v, m: attend(
            q, k, v, logits=lambda x: jnp.where(m, x, -1e9) + jnp.sin(x[..., :1, :1] * 0) + jnp.arange(N)
        ),
        lambda q, k, v, m: attend(q, k, v, logits=lambda x: jnp.where(m, x + jnp.arange(N), -1e9)),
        "",
        "xxxm",
    ),
    Case(
        "two different finite fills",
        "attention",
        lambda q, k, v, m: attend(
            q, k, v, logits=lambda x: jnp.where(m, jnp.where(x.swapaxes(-1, -2) > 0, x, -1e9), -1e12)
        ),
        lambda q, k, v, m: attend(q, k, v, logits=lambda x: jnp.where(m, jnp.where(m.swapaxes(-1, -2), x, -1e9), -1e9)),
        "",
        "xxxm",
    ),
    Case(
        "sink in the denominator",
        "attention",
        lambda q, k, v: attend(q, k, v, softmax=softmax_with_sink),
        plain,
        None,
        "xxx",
    ),
    Case(
        "softmax without its maximum",
        "attention",
        lambda q, k, v: attend(q, k, v, softmax=softmax_without_max),
        plain,
        "without the maximum",
        "xxx",
    ),
    Case(
        "maximum joined with a constant",
        "attention",
        lambda q, k, v: attend(q, k, v, softmax=softmax_with_shift_of_sink),
        plain,
        "not the maximum",
        "xxx",
    ),
    Case(
        "denominator of another row",
        "attention",
        lambda q, k, v: attend(q, k, v, softmax=softmax_of_another_row),
        plain,
        None,
        "xxx",
    ),
    Case(
        "denominator without gradient",
        "attention",
        lambda q, k, v: attend(q, k, v, softmax=softmax_stopped),
        plain,
        None,
        "xxx",
    ),
    Case(
        "logits without gradient",
        "attention",
        lambda q, k, v: attend(q, k, v, logits=lax.stop_gradient),
        plain,
        "`stop_gradient` stands between",
        "xxx",
    ),
    Case(
        "probabilities scaled",
        "attention",
        lambda q, k, v: attend(q, k, v, probabilities=lambda p: 2 * p),
        plain,
        "",
        "xxx",
    ),
    Case(
        "logits quantised to 8 bits",
        "attention",
        lambda q, k, v: attend(q, k, v, logits=quantised),
        plain,
        "`convert_element_type` stands between",
        "xxx",
    ),
    Case(
        "products of two features",
        "attention",
        lambda q, k, v: jnp.einsum("bhts,bhsd->bhtd", jax.nn.softmax(jnp.einsum("bgtd,bgsd->bts", q, k))[:, None], v),
        plain,
        "contracts 2 axes",
        "xxx",
    ),
    Case(
        "logits of one product with itself transposed added",
        "attention",
        lambda q, k, v: attend(q, k, v, logits=lambda x: x + x.swapaxes(-1, -2)),
        plain,
        "both sides",
        "xxx",
    ),
]


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


NORMS = [
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
    Case("all over another axis", "layer_norm", lambda x, s: normalise(x, s, axis=1), layer_norm, "", "rp"),
    Case(
        "norm over two axes",
        "layer_norm",
        lambda x, s: (x - x.mean((1, 2), keepdims=True)) * lax.rsqrt(x.var((1, 2), keepdims=True) + EPS) * s,
        layer_norm,
        "the mean runs over 2 axes",
        "rp",
    ),
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
    Case("erf returned too", "gelu_erf", gelu_erf_with_erf, gelu_erf, None, "r"),
    Case("quick gelu", "silu", lambda x: x * jax.nn.sigmoid(1.702 * x), jax.nn.silu, None, "r"),
    Case(
        "sigmoid of another value", "silu", lambda x, y: x * jax.nn.sigmoid(y), lambda x, y: jax.nn.silu(x), None, "rr"
    ),
    Case("sigmoid of minus x", "silu", lambda x: x * jax.nn.sigmoid(-x), jax.nn.silu, None, "r"),
    Case("sigmoid returned too", "silu", silu_with_sigmoid, jax.nn.silu, None, "r"),
    Case("mish", "silu", lambda x: x * jnp.tanh(jnp.log1p(jnp.exp(x))), jax.nn.silu, None, "r"),
]

CASES = [*ATTENTION, *NORMS, *ELEMENTWISE]


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.op}: {c.name}")
def test_near_miss_is_refused_with_its_reason_and_unchanged(check_refused, case):
    check_refused(case.miss, *arguments(case.args), op=case.op, reason=case.reason)


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.op}: {c.name}")
def test_twin_of_near_miss_is_fused(check_fused, case):
    check_fused(case.twin, *arguments(case.args), counts={case.op: 1}, floor_ulps=32)


# --- what must be fused although it looks odd -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "permuted",
    [
        lambda q, k, v: attend(q, k.swapaxes(2, 3), v),
        lambda q, k, v: attend(q, k, v.swapaxes(2, 3)),
        lambda q, k, v: attend(q, k.swapaxes(0, 1), v),
        lambda q, k, v: attend(q.swapaxes(2, 3), k, v.swapaxes(0, 1)),
    ],
    ids=["key: features as positions", "value: features as positions", "key: heads as batch", "query and value"],
)
def test_permuted_operand_is_read_as_it_is_permuted(check_fused, permuted):
    check_fused(permuted, *arguments("xxx"), counts={"attention": 1}, floor_ulps=32)


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


def test_mask_that_differs_per_query_block_is_a_mask_tensor(check_fused):
    q, k, v, m = arguments("xxxm")

    def function(q, k, v, m):
        blocks = [jnp.where(m[:, :, i : i + 3], 1, 0) for i in (0, 3)]
        allowed = jnp.concatenate([blocks[0], blocks[1][:, :, ::-1]], axis=2) > 0
        return attend(q, k, v, logits=lambda x: jnp.where(allowed, x, -jnp.inf))

    report = check_fused(function, q, k, v, m, counts={"attention": 1})
    assert "mask" in report.fused[0].detail and "causal" not in report.fused[0].detail


def test_fully_masked_rows_keep_the_meaning_of_their_fill(check_fused):
    q, k, v, m = arguments("xxxm")
    m = m.at[0, 1, 2].set(False)
    for fill in (-1e9, float(np.finfo(np.float32).min)):
        check_fused(lambda q, k, v, m, fill=fill: masked(q, k, v, m, fill=fill), q, k, v, m, counts={"attention": 1})
    # Values only: with -inf, XLA's gradient by value is NaN; the kernel's by query and key are too.
    fused, unfused = zenith.jit(masked)(q, k, v, m), jax.jit(masked)(q, k, v, m)
    assert np.isnan(unfused[0, 1, 2]).all()
    np.testing.assert_allclose(fused, unfused, rtol=1e-5, atol=1e-6)


def test_fill_that_overflows_on_its_way_is_an_infinite_one(check_fused):
    q, k, v, m = arguments("xxxm")
    m = m.at[0, 1, 2].set(False)
    lowest = float(np.finfo(np.float32).min)

    def function(q, k, v, m):
        return attend(q, k, v, logits=lambda x: jnp.where(m, x, lowest) * 2)

    assert zenith.explain(function)(q, k, v, m).counts() == {"attention": 1}
    fused, unfused = zenith.jit(function)(q, k, v, m), jax.jit(function)(q, k, v, m)
    assert np.isnan(unfused[0, 1, 2]).all()
    np.testing.assert_allclose(fused, unfused, rtol=1e-5, atol=1e-6)


def test_positions_in_a_wrapping_dtype_are_no_band(check_fused):
    q, k, v = arguments("xxx")

    def function(q, k, v):
        allowed = lax.broadcasted_iota(jnp.uint8, (N, N), 0) - lax.broadcasted_iota(jnp.uint8, (N, N), 1) < 3
        return attend(q, k, v, logits=lambda x: jnp.where(allowed, x, -jnp.inf))

    report = check_fused(function, q, k, v, counts={"attention": 1})
    assert "mask" in report.fused[0].detail
