"""How long calls take, of every N-th call: `configure(telemetry=N)`, ZENITH_TELEMETRY=N; 0, nothing is wrapped.

JAX returns from a call when the work is enqueued. So a sampled call has two durations: `dispatch`, until the call
returned, and `completion`, until all of its results are there, both from before the call. The second is seen by one
thread that waits, and there is at most one call it waits for, so that it never measures its own backlog; a call that
is sampled meanwhile has its dispatch recorded only. Not recorded: calls that trace or compile, calls inside a trace,
and completions of results that were donated to another call before they were there.
"""

from __future__ import annotations

import dataclasses
import functools as ft
import itertools
import logging
import queue
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import jax
import jax.core

from zenith_jax.telemetry import compiling
from zenith_jax.telemetry.histogram import Accumulator, Histogram

logger = logging.getLogger("zenith_jax")


@dataclasses.dataclass(frozen=True)
class Sample:
    """One sampled call. calls: that the sample stands for. completion: None where it was not seen."""

    function: str
    calls: int
    dispatch: float
    completion: float | None


@dataclasses.dataclass(frozen=True)
class Latency:
    """calls: made, as of the last sampled one, so up to N - 1 more. dispatch, completion: of sampled calls, in seconds.
    skipped: sampled calls whose completion was not seen."""

    function: str
    calls: int
    dispatch: Histogram
    completion: Histogram
    skipped: int


class _Meter:
    def __init__(self, function: str, every: int):
        self.function, self.every = function, every
        self.lock = threading.Lock()
        self.calls = self.skipped = 0
        self.dispatch, self.completion = Accumulator(), Accumulator()

    def add(self, calls: int, dispatch: float, completion: float | None) -> None:
        with self.lock:
            new, self.calls = max(calls - self.calls, 0), max(calls, self.calls)
            self.dispatch.add(dispatch)
            if completion is None:
                self.skipped += 1
            else:
                self.completion.add(completion)
        for listener in tuple(_listeners):
            try:
                listener(Sample(self.function, new, dispatch, completion))
            except Exception:
                logger.exception("a listener to zenith.telemetry's samples raised")

    def snapshot(self) -> Latency:
        with self.lock:
            return Latency(
                self.function, self.calls, self.dispatch.snapshot(), self.completion.snapshot(), self.skipped
            )


_listeners: list[Callable[[Sample], None]] = []
_meters: weakref.WeakSet[_Meter] = weakref.WeakSet()


def latencies() -> list[Latency]:
    """Of each function that is sampled and still alive."""
    return sorted((m.snapshot() for m in list(_meters)), key=lambda latency: latency.function)


def listen_to_samples(listener: Callable[[Sample], None]) -> Callable[[], None]:
    """Calls listener(sample) for each, in the caller's or the waiting thread; returns what ends that."""
    _listeners.append(listener)

    def end() -> None:
        if listener in _listeners:
            _listeners.remove(listener)

    return end


def sampled(jitted: Callable, every: int) -> Callable:
    """`jitted`, every N-th call of which is measured. Its methods (lower, trace, ...) are there too.

    The other calls cost one count and one comparison more.
    """
    name = getattr(jitted, "__qualname__", type(jitted).__name__)
    meter = _Meter(name, every)
    _meters.add(meter)
    count = itertools.count(1).__next__

    @ft.wraps(jitted)
    def call(*args: Any, **kwargs: Any) -> Any:
        n = count()
        if n % every:
            return jitted(*args, **kwargs)
        return _measured(jitted, meter, n, args, kwargs)

    for attribute in ("lower", "trace", "eval_shape", "clear_cache"):
        if hasattr(jitted, attribute):
            setattr(call, attribute, getattr(jitted, attribute))
    return call


def _measured(jitted: Callable, meter: _Meter, n: int, args: tuple, kwargs: dict[str, Any]) -> Any:
    compilations = compiling.compilations()
    started = time.perf_counter()
    results = jitted(*args, **kwargs)
    dispatch = time.perf_counter() - started
    if compiling.compilations() != compilations:
        return results
    leaves = [x for x in jax.tree.leaves(results) if isinstance(x, jax.Array)]
    if any(isinstance(x, jax.core.Tracer) for x in leaves):
        return results
    if not _watcher.watch(meter, n, started, dispatch, leaves):
        meter.add(n, dispatch, None)
    return results


class _Watcher:
    """The thread that waits for results, started by the first sample."""

    def __init__(self) -> None:
        self._slot: queue.SimpleQueue = queue.SimpleQueue()
        self._free = threading.Lock()
        self._thread: threading.Thread | None = None

    def watch(self, meter: _Meter, n: int, started: float, dispatch: float, leaves: list[Any]) -> bool:
        """False where it still waits for another call."""
        if not self._free.acquire(blocking=False):
            return False
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="zenith-telemetry", daemon=True)
            self._thread.start()
        self._slot.put((meter, n, started, dispatch, leaves))
        return True

    def _run(self) -> None:
        while True:
            meter, n, started, dispatch, leaves = self._slot.get()
            try:
                jax.block_until_ready(leaves)
                completion = time.perf_counter() - started
            except Exception:  # donated meanwhile, or the computation failed, which the caller meets
                completion = None
            finally:
                leaves = None
                self._free.release()
            meter.add(n, dispatch, completion)


_watcher = _Watcher()
