"""Programs that look like attention and are another function: refused, with the reason, and unchanged in value.

Each stands beside a twin that differs in the one thing and must match, so that no refusal is for another cause.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from near_miss import (
    Case,
    N,
    arguments,
    quantised,
    softmax_of_another_row,
    softmax_stopped,
    softmax_with_shift_of_sink,
    softmax_with_sink,
    softmax_without_max,
)

import zenith_jax as zenith


def attend(q, k, v, *, logits=lambda x: x, softmax=jax.nn.softmax, probabilities=lambda p: p, scale=0.4):
    """(b, h, n, d) attention with a hook at each step."""
    x = logits(jnp.einsum("bhtd,bhsd->bhts", q, k) * scale)
    return jnp.einsum("bhts,bhsd->bhtd", probabilities(softmax(x)), v)


def plain(q, k, v, *rest):
    del rest
    return attend(q, k, v)


def masked(q, k, v, m, fill=-jnp.inf, **hooks):
    return attend(q, k, v, logits=lambda x: jnp.where(m, x, fill), **hooks)


def softmax_with_column(x, sink, *, columns=1, first=False, kept=None):
    column = jnp.broadcast_to(sink[:, :, None, None], (*x.shape[:-1], columns))
    p = jax.nn.softmax(jnp.concatenate([column, x] if first else [x, column], axis=-1), axis=-1)
    return p[..., kept or (slice(1, None) if first else slice(0, -columns))]


def softmax_with_addend(x, sink, *, top=jnp.maximum, shift=lambda m: m):
    sink = sink[:, :, None, None]
    m = top(x.max(-1, keepdims=True), sink)
    e = jnp.exp(x - m)
    return e / (e.sum(-1, keepdims=True) + jnp.exp(sink - shift(m)))


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


CASES = [
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
        "bias below the cap",
        "attention",
        lambda q, k, v, m: attend(q, k, v, logits=lambda x: 2 * jnp.tanh((x + m) / 2)),
        lambda q, k, v, m: attend(q, k, v, logits=lambda x: 2 * jnp.tanh(x / 2) + m),
        "between the product of query and key and the cap",
        "xxxm",
    ),
    Case(
        "mask below the cap",
        "attention",
        lambda q, k, v, m: attend(q, k, v, logits=lambda x: 2 * jnp.tanh(jnp.where(m, x, -1e30) / 2)),
        lambda q, k, v, m: attend(q, k, v, logits=lambda x: jnp.where(m, jnp.tanh(x) * 2, -1e30)),
        "between the product of query and key and the cap",
        "xxxm",
    ),
    Case(
        "capped twice",
        "attention",
        lambda q, k, v: attend(q, k, v, logits=lambda x: 2 * jnp.tanh(jnp.tanh(x) / 2)),
        lambda q, k, v: attend(q, k, v, logits=lambda x: -jnp.tanh(x / -2) * 3),
        "between the product of query and key and the cap",
        "xxx",
    ),
    Case(
        "cap that depends on data",
        "attention",
        lambda q, k, v, h: attend(q, k, v, logits=lambda x: jnp.tanh(x) * h[:, :, None, None]),
        lambda q, k, v, h: attend(q, k, v, logits=jnp.tanh),
        "the scale of the logits depends on data",
        "xxxh",
    ),
    Case(
        "two columns as sinks",
        "attention",
        lambda q, k, v, h: attend(q, k, v, softmax=lambda x: softmax_with_column(x, h, columns=2)),
        lambda q, k, v, h: attend(q, k, v, softmax=lambda x: softmax_with_column(x, h)),
        None,
        "xxxh",
    ),
    Case(
        "a key is dropped, not the sink",
        "attention",
        lambda q, k, v, h: attend(q, k, v, softmax=lambda x: softmax_with_column(x, h, kept=slice(1, None))),
        lambda q, k, v, h: attend(q, k, v, softmax=lambda x: softmax_with_column(x, h, first=True)),
        "not the one that was added",
        "xxxh",
    ),
    Case(
        "maximum without the sink",
        "attention",
        lambda q, k, v, h: attend(q, k, v, softmax=lambda x: softmax_with_addend(x, h, top=lambda m, s: m)),
        lambda q, k, v, h: attend(q, k, v, softmax=lambda x: softmax_with_addend(x, h)),
        "leaves out the sink",
        "xxxh",
    ),
    Case(
        "sink of another maximum",
        "attention",
        lambda q, k, v, h: attend(q, k, v, softmax=lambda x: softmax_with_addend(x, h, shift=lambda m: m + 0.5)),
        lambda q, k, v, h: attend(q, k, v, softmax=lambda x: softmax_with_addend(x, jnp.zeros_like(h))),
        None,
        "xxxh",
    ),
    Case(
        "NaN made 1 and not 0",
        "attention",
        lambda q, k, v, m: masked(q, k, v, m, probabilities=lambda p: jnp.where(jnp.isnan(p), 1, p)),
        lambda q, k, v, m: masked(q, k, v, m, probabilities=lambda p: jnp.where(jnp.isnan(p), 0, p)),
        "stands between the softmax and its product",
        "xxxm",
    ),
    Case(
        "NaN of another value made 0",
        "attention",
        lambda q, k, v, m: masked(q, k, v, m, probabilities=lambda p: jnp.where(jnp.isnan(p * p), 0, p)),
        lambda q, k, v, m: masked(q, k, v, m, probabilities=lambda p: jnp.where(jnp.isfinite(p), p, 0)),
        "",
        "xxxm",
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
