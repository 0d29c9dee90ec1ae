"""Helpers of the rewriter's tests: what was fused, and fused against unfused in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numerics import assert_error_ratio, in_float64

import zenith_jax as zenith
from zenith_jax.passes import rewrite
from zenith_jax.passes.match import conv


@pytest.fixture(autouse=True)
def without_cost() -> Iterator[None]:
    """Fuse wherever a kernel is right: sizes in tests are below those where it pays."""
    with zenith.configured(use_cost=False):
        yield


def is_float(x: Any) -> bool:
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating)


def value_and_gradients(function: Callable[..., Any]) -> Callable[..., Any]:
    """(results, gradients of their weighted sum by every float array among the arguments), traced as one."""

    def both(*args: Any) -> Any:
        leaves, structure = jax.tree.flatten(args)
        floats = [i for i, leaf in enumerate(leaves) if is_float(leaf)]

        def loss(values: Sequence[Any]) -> tuple[Any, Any]:
            full = list(leaves)
            for i, value in zip(floats, values, strict=True):
                full[i] = value
            results = function(*jax.tree.unflatten(structure, full))
            return sum(_weighted_sum(r) for r in jax.tree.leaves(results)), results

        (_, results), gradients = jax.value_and_grad(loss, has_aux=True)([leaves[i] for i in floats])
        return results, gradients

    return both


def _weighted_sum(x: Any) -> Any:
    """Unequal weights, so that gradients of normalised values are not zero."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    weights = jnp.cos(0.7 * jnp.arange(x.size, dtype=wide.dtype)).reshape(x.shape)
    return jnp.sum(jnp.where(jnp.isfinite(wide), wide, 0) * weights)


def counted(report: zenith.Report, expected: dict[str, int]) -> dict[str, int]:
    """Of linear layers and convolutions only where some are expected: which dtypes have a kernel is the device's."""
    optional = {"linear", "conv"} - set(expected)
    return {name: count for name, count in report.counts().items() if name not in optional}


@pytest.fixture
def check_fused() -> Callable[..., zenith.Report]:
    """check_fused(f, *args, counts): what is fused, in f and in its gradient; values and gradients as unfused ones.

    oracle: for a module that casts to a narrow dtype inside, the same in float32.
    """

    def check(
        function: Callable[..., Any],
        *args: Any,
        counts: dict[str, int],
        gradient_counts: dict[str, int] | None = None,
        floor_ulps: float = 8.0,
        floor_dtype: Any = None,
        oracle: Callable[..., Any] | None = None,
    ) -> zenith.Report:
        report = zenith.explain(function)(*args)
        assert counted(report, counts) == counts, str(report)
        both = value_and_gradients(function)
        gradient_report = zenith.explain(both)(*args)
        expected_counts = counts if gradient_counts is None else gradient_counts
        assert counted(gradient_report, expected_counts) == expected_counts, str(gradient_report)
        # 8 ulps of the largest value: the fused sums run in another order than XLA's.
        expected = in_float64(value_and_gradients(oracle or function))(*args)
        fused, plain = jax.jit(zenith.fuse(both))(*args), jax.jit(both)(*args)
        assert_error_ratio(
            fused,
            plain,
            expected,
            floor_ulps=floor_ulps,
            floor_dtype=floor_dtype,
            cancelling="attention" in counts,
        )
        return report

    return check


@pytest.fixture
def check_refused() -> Callable[..., zenith.Report]:
    """check_refused(f, *args, op, reason): no site of `op` is fused, the report says why
    (reason or advice holds that text), values are unchanged."""

    def check(function: Callable[..., Any], *args: Any, op: str, reason: str | None) -> zenith.Report:
        report = zenith.explain(function)(*args)
        assert op not in report.counts(), str(report)
        if reason is None:
            assert not [s for s in report.refused if s.op == op], str(report)
        else:
            said = [f"{s.reason}; {s.advice}" for s in report.refused]
            assert any(reason in text for text in said), f"neither reason nor advice has {reason!r} in\n{report}"
        if not report.fused:  # the same program, so the same values and gradients
            assert str(jax.make_jaxpr(zenith.fuse(function))(*args)) == str(jax.make_jaxpr(function)(*args))
            return report
        both = value_and_gradients(function)
        assert_error_ratio(
            jax.jit(zenith.fuse(both))(*args), jax.jit(both)(*args), in_float64(both)(*args), floor_ulps=8.0
        )
        return report

    return check


@pytest.fixture
def without_conv(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions as where no kernel takes them, whatever their size."""
    monkeypatch.setattr(rewrite, "MATCHERS", tuple(m for m in rewrite.MATCHERS if m is not conv.match))


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20260103)
