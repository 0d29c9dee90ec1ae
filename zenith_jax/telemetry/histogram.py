"""A histogram of durations with fixed bounds: a bisection and two additions an observation."""

from __future__ import annotations

import bisect
import dataclasses

# Seconds. From a dispatch of some microseconds to a training step: 1, 2 and 5 in each decade.
BOUNDS = tuple(m * 10.0**e for e in range(-6, 2) for m in (1, 2, 5))


@dataclasses.dataclass(frozen=True)
class Histogram:
    """counts[i]: of durations at most BOUNDS[i], in seconds, and above the bound before; the last: above all."""

    counts: tuple[int, ...] = (0,) * (len(BOUNDS) + 1)
    total: float = 0.0

    @property
    def count(self) -> int:
        return sum(self.counts)

    @property
    def mean(self) -> float:
        """0 where there are none."""
        return self.total / max(self.count, 1)

    def quantile(self, q: float) -> float:
        """An upper bound of the q-quantile, 0 <= q <= 1: that of its bucket. 0 where there are none."""
        if not 0 <= q <= 1:
            raise ValueError(f"a quantile is asked for as a number from 0 to 1, got {q}")
        rank, seen = q * self.count, 0
        for bound, count in zip((*BOUNDS, float("inf")), self.counts, strict=True):
            seen += count
            if count and seen >= rank:
                return bound
        return 0.0


class Accumulator:
    """The histogram that grows. Its owner locks."""

    def __init__(self) -> None:
        self._counts = [0] * (len(BOUNDS) + 1)
        self._total = 0.0

    def add(self, seconds: float) -> None:
        self._counts[bisect.bisect_left(BOUNDS, seconds)] += 1
        self._total += seconds

    def snapshot(self) -> Histogram:
        return Histogram(tuple(self._counts), self._total)
