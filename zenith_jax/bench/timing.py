"""Times of functions that are compared: bursts of calls in turn in one process, medians."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

# A GPU's work is queued: one call in a measurement would be mostly the host's part of it.
QUEUED_SECONDS = 5e-3
# Calls in a row of one function, of which the first is not counted: it finds the caches and the allocator's free pages
# as another function left them, which no user's second call does. gelu(erf) of 16 MiB on 2 Xeon cores: 0.96 ms for
# single calls in turn, 0.79 in a row.
BURST = 6


def interleaved(
    functions: Mapping[str, Callable[[], Any]],
    *,
    runs: int = 20,
    seconds: float = 10.0,
    queued: bool | None = None,
    queued_seconds: float = QUEUED_SECONDS,
    step: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """{name: median time of a call in seconds}, until the device is done, of about `runs` calls and at least 3 rounds.

    The functions are called in bursts, in turn, so that a change of clock or of other load meets all of them, and first
    in both orders, so that compilation and first use of memory are not counted. Stops early after `seconds`. queued: a
    burst is as many calls as take `queued_seconds`, timed as one, for short kernels on a GPU; default: where JAX's
    device is not a CPU.
    `step` is called once for each of the `runs`, also for those that were left out.
    """
    for function in (*functions.values(), *reversed(list(functions.values()))):
        jax.block_until_ready(function())
    if queued is None:
        queued = jax.default_backend() != "cpu"
    calls = {name: _calls(function, queued_seconds) if queued else 1 for name, function in functions.items()}
    times: dict[str, list[float]] = {name: [] for name in functions}
    end = time.perf_counter() + seconds
    counted = 1 if queued else BURST - 1
    for turn in range(max(3, math.ceil(runs / counted))):
        if turn < 3 or time.perf_counter() < end:
            # Each goes first in half of the rounds: what runs second finds warmer caches.
            for name in functions if turn % 2 == 0 else reversed(list(functions)):
                burst = [_time(functions[name], calls[name]) for _ in range(1 if queued else BURST)]
                times[name] += burst[-counted:]
        for _ in range(min(counted, runs - turn * counted)):
            step()
    return {name: statistics.median(values) for name, values in times.items()}


def _time(function: Callable[[], Any], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls - 1):
        function()  # runs after the one before it: a device has one queue
    jax.block_until_ready(function())
    return (time.perf_counter() - start) / calls


def _calls(function: Callable[[], Any], seconds: float) -> int:
    return min(100, math.ceil(seconds / _time(function, 10)))
