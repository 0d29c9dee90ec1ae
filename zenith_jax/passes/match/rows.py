"""What a cross entropy reads of each row of logits, from the op's (lse, picked, total)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from zenith_jax.ops.cross_entropy import as_int32
from zenith_jax.passes.match._match import Order, arranged, restored
from zenith_jax.passes.match.pick import Outside

LSE, LOGIT, LOG_PROBABILITY = "lse", "logit", "log_probability"


@dataclasses.dataclass(frozen=True)
class Result:
    """One value of the program; see Reading and Pick for the fields."""

    kind: str
    on: float
    off: float
    multiplied: bool
    guarded: bool
    order: Order
    shape: tuple[int, ...]
    dtype: str


@dataclasses.dataclass(frozen=True)
class Rows:
    label_order: Order
    outside: Outside
    results: tuple[Result, ...]

    def labels(self, labels: Any, batch: Sequence[int], classes: int) -> Any:
        """The program's labels as the op takes them, one for each row."""
        labels = jnp.broadcast_to(arranged(labels, self.label_order), batch)
        if self.outside is Outside.NEAREST:
            labels = jnp.clip(labels, 0, classes - 1)
        return as_int32(labels, classes)

    def values(self, statistics: Sequence[Any], labels: Any, classes: int) -> tuple[Any, ...]:
        """`results`, each in the program's shape and dtype."""
        lse, picked, total = statistics
        is_class = (labels >= 0) & (labels < classes)
        if self.outside is Outside.NAN:
            picked = jnp.where(is_class, picked, jnp.nan)

        def value(r: Result) -> Any:
            # Of an infinite maximum log_softmax makes inf - inf; logsumexp does not.
            one = lse if r.guarded else jnp.where(jnp.isinf(lse), jnp.nan, lse)
            if r.kind == LSE:
                return one
            logit, of_all = picked, total
            if r.kind == LOG_PROBABILITY:
                # A one-hot label that is no class picks nothing, of a log-probability too.
                logit = picked - (jnp.where(is_class, one, 0) if self.outside is Outside.ZERO else one)
                of_all = total - classes * one
            if not r.on:  # of no label: one that is no class has no part in it
                return r.off * of_all
            result = logit if r.on == 1 else r.on * logit
            if r.off:
                result = result + r.off * of_all
            elif r.multiplied:
                # NaN where a logit of another class is infinite: 0 * inf in the program's sum.
                result = result + 0 * jnp.where(jnp.isfinite(picked), of_all, 0)
            return result

        values = [restored(value(r), r.order, r.shape, r.dtype) for r in self.results]
        # A value that the program computes twice is two results.
        return tuple(jnp.copy(v) if any(v is w for w in values[:i]) else v for i, v in enumerate(values))
