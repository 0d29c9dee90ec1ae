"""From the start of a rewriting to the end of XLA's compilation: how a Record comes to be.

`rewriting(function, platform)` opens a draft, `clock(name)` and `found(sites)` fill it. What JAX does afterwards is
known from `jax.monitoring`, whose events come at compilations only: a call of a compiled function costs nothing here.

Which compilation a rewriting belongs to: JAX reports a trace when it ends, in the thread that traced, with its
duration, so rewritings of this thread that began since are part of it. The end of a lowering has the program's name
and duration: its trace is the latest of that name that had ended when it began. A compilation follows a lowering.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax.monitoring

from zenith_jax.report import Site
from zenith_jax.telemetry.record import COMPILED, REWRITTEN, Record

logger = logging.getLogger("zenith_jax")

CAPACITY = 256  # records kept
_TRACE = "/jax/core/compile/jaxpr_trace_duration"
_LOWER = "/jax/core/compile/jaxpr_to_mlir_module_duration"
_COMPILE = "/jax/core/compile/backend_compile_duration"
_CACHE = {"/jax/compilation_cache/cache_hits": "hit", "/jax/compilation_cache/cache_misses": "miss"}
# JAX times with a clock of its own; a rewriting begins some microseconds after the trace that it is part of.
_CLOCKS_DIFFER = 2e-4

_ids = itertools.count(1)
_lock = threading.Lock()
_records: collections.OrderedDict[int, Record] = collections.OrderedDict()
_listeners: list[Callable[[Record], None]] = []


_Trace = tuple[float, list[int]]  # when it ended, the records in it


class _Programs:
    """By the name of a program: which records its latest traces hold, and which its latest lowering."""

    def __init__(self) -> None:
        self._traces: collections.OrderedDict[str, collections.deque[tuple[float, list[int]]]] = (
            collections.OrderedDict()
        )
        self._lowered: dict[str, list[int]] = {}

    def traced(self, program: str, ids: list[int]) -> None:
        traces = self._traces.setdefault(program, collections.deque(maxlen=16))
        traces.append((time.perf_counter(), ids))
        self._traces.move_to_end(program)
        while len(self._traces) > CAPACITY:
            forgotten, _ = self._traces.popitem(last=False)
            self._lowered.pop(forgotten, None)

    def lowered(self, program: str, since: float) -> list[int] | None:
        """None where there is no trace of it."""
        for ended, ids in reversed(self._traces.get(program, collections.deque())):
            if ended <= since:
                self._lowered[program] = ids
                return ids
        return None

    def compiled(self, program: str) -> list[int] | None:
        return self._lowered.get(program)


_everywhere = _Programs()  # for a program that is traced in one thread and compiled in another


class _Thread(threading.local):
    def __init__(self) -> None:
        self.draft: _Draft | None = None
        self.recent: collections.deque[tuple[float, int]] = collections.deque(maxlen=CAPACITY)
        self.programs = _Programs()
        self.cache = ""
        self.compilations = 0


_thread = _Thread()


@dataclasses.dataclass
class _Draft:
    sites: list[Site] = dataclasses.field(default_factory=list)
    passes: dict[str, float] = dataclasses.field(default_factory=lambda: collections.defaultdict(float))
    rewrite: float = 0.0
    error: str = ""


# --- reading ----------------------------------------------------------------------------------------------------------


def records() -> list[Record]:
    """The latest records, at most CAPACITY, the oldest first."""
    with _lock:
        return list(_records.values())


def clear() -> None:
    """Forgets all records."""
    with _lock:
        _records.clear()


def listen(listener: Callable[[Record], None]) -> Callable[[], None]:
    """Calls listener(record) at each stage a record reaches, in the thread that compiles; returns what ends that.

    A listener that raises is logged, and harms nothing else.
    """
    _listeners.append(listener)

    def end() -> None:
        with contextlib.suppress(ValueError):
            _listeners.remove(listener)

    return end


# --- writing ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def rewriting(function: Any, platform: str) -> Iterator[None]:
    """Around the trace and the rewriting of `function`; inside another one, as nested differentiation is, part of it.

    Leaves no record where tracing raises.
    """
    if _thread.draft is not None:
        yield
        return
    draft = _thread.draft = _Draft()
    started, wall = time.perf_counter(), time.time()
    try:
        yield
    finally:
        _thread.draft = None
    record = Record(
        id=next(_ids),
        stage=REWRITTEN,
        function=getattr(function, "__qualname__", type(function).__name__),
        program="",
        platform=platform,
        time=wall,
        sites=tuple(dataclasses.replace(s, measure=None) for s in draft.sites),
        seconds=dict(trace=time.perf_counter() - started, rewrite=draft.rewrite),
        passes=dict(draft.passes),
        error=draft.error,
    )
    _thread.recent.append((started, record.id))
    _keep(record)


def resume(since: float) -> None:
    """Inside a trace: rewritings of this thread that began since then, in an earlier trace, are part of this one."""
    now = time.perf_counter()
    for index, (started, id) in enumerate(_thread.recent):
        if started >= since:
            _thread.recent[index] = (now, id)


@contextlib.contextmanager
def rewrite_clock() -> Iterator[None]:
    """Around Zenith's own part of a trace."""
    started = time.perf_counter()
    try:
        yield
    finally:
        if _thread.draft is not None:
            _thread.draft.rewrite += time.perf_counter() - started


@contextlib.contextmanager
def clock(name: str) -> Iterator[None]:
    """Around one pass; passes do not nest."""
    draft = _thread.draft
    if draft is None:
        yield
        return
    started = time.perf_counter()
    try:
        yield
    finally:
        draft.passes[name] += time.perf_counter() - started


def clocked(items: Iterable[Any], name: Callable[[Any], str]) -> Iterator[Any]:
    """Each item, with what the loop does with it under the clock `name(item)`."""
    for item in items:
        with clock(name(item)):
            yield item


def found(sites: Iterable[Site]) -> None:
    if _thread.draft is not None:
        _thread.draft.sites.extend(sites)


def failed(error: BaseException) -> None:
    if _thread.draft is not None:
        _thread.draft.error = f"{type(error).__name__}: {error}"


def compilations() -> int:
    """How many traces and compilations this thread has ended: a call during which it changed was not only a call."""
    return _thread.compilations


def _keep(record: Record) -> None:
    with _lock:
        _records[record.id] = record
        while len(_records) > CAPACITY:
            _records.popitem(last=False)
    for listener in tuple(_listeners):
        try:
            listener(record)
        except Exception:
            logger.exception("a listener to zenith.telemetry raised")


# --- what jax.monitoring says -----------------------------------------------------------------------------------------


def _on_duration(event: str, duration_secs: float, **tags: Any) -> None:
    if event not in (_TRACE, _LOWER, _COMPILE):
        return
    try:
        _ON_DURATION[event](_program(tags), duration_secs)
    except Exception:  # a record may be lost, the program that is being compiled may not
        logger.exception("zenith.telemetry could not record %s", event)


def _program(tags: dict[str, Any]) -> str:
    name = str(tags.get("fun_name", ""))
    return name[4:-1] if name.startswith("jit(") and name.endswith(")") else name


def _on_trace(program: str, seconds: float) -> None:
    _thread.compilations += 1
    since = time.perf_counter() - seconds - _CLOCKS_DIFFER
    ids = [id for started, id in _thread.recent if started >= since]
    with _lock:
        _thread.programs.traced(program, ids)
        _everywhere.traced(program, ids)
        for record in (_records[id] for id in ids if id in _records):
            _records[record.id] = dataclasses.replace(
                record, program=program, seconds={**record.seconds, "trace": seconds}
            )


def _on_lowering(program: str, seconds: float) -> None:
    since = time.perf_counter() - seconds + _CLOCKS_DIFFER
    for record in _first(lambda programs: programs.lowered(program, since)):
        with _lock:
            _records[record.id] = dataclasses.replace(record, seconds={**record.seconds, "lower": seconds})


def _on_compilation(program: str, seconds: float) -> None:
    cache, _thread.cache = _thread.cache, ""
    _thread.compilations += 1
    for record in _first(lambda programs: programs.compiled(program)):
        done = dataclasses.replace(
            record, stage=COMPILED, program=program, cache=cache, seconds={**record.seconds, "compile": seconds}
        )
        logger.info("%s", done, extra={"zenith": done})
        _keep(done)


_ON_DURATION = {_TRACE: _on_trace, _LOWER: _on_lowering, _COMPILE: _on_compilation}


def _on_event(event: str, **_: Any) -> None:
    _thread.cache = _CACHE.get(event, _thread.cache)


def _first(answer: Callable[[_Programs], list[int] | None]) -> list[Record]:
    """The records that this thread's programs answer with, or else those of all threads."""
    with _lock:
        ids = answer(_thread.programs)
        if ids is None:
            ids = answer(_everywhere) or []
        return [_records[id] for id in ids if id in _records]


jax.monitoring.register_event_duration_secs_listener(_on_duration)
jax.monitoring.register_event_listener(_on_event)
