"""Times of functions that are compared: interleaved runs in one process, medians."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax


def interleaved(
    functions: Mapping[str, Callable[[], Any]],
    *,
    runs: int = 20,
    seconds: float = 10.0,
    step: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """{name: median time in seconds}, until the device is done, of up to `runs` calls each and at least 3.

    The functions are called in turn, so that a change of clock or of other load meets all of them, and first in both
    orders, so that compilation and first use of memory are not counted. Stops early after `seconds`. `step` is called
    after each of the `runs` rounds, also of those that were left out.
    """
    for function in (*functions.values(), *reversed(list(functions.values()))):
        jax.block_until_ready(function())
    times: dict[str, list[float]] = {name: [] for name in functions}
    end = time.perf_counter() + seconds
    for turn in range(runs):
        if turn < 3 or time.perf_counter() < end:
            # Each goes first in half of the rounds: what runs second finds warmer caches.
            for name in functions if turn % 2 == 0 else reversed(list(functions)):
                start = time.perf_counter()
                jax.block_until_ready(functions[name]())
                times[name].append(time.perf_counter() - start)
        step()
    return {name: statistics.median(values) for name, values in times.items()}
