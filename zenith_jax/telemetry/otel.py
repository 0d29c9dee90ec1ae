"""Records and samples as OpenTelemetry metrics and spans. Uses the API alone: the application chooses the SDK.

Names of functions, files and shapes are attributes of spans, never of metrics, where each would be a new time series.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from zenith_jax.errors import ZenithError
from zenith_jax.telemetry import compiling, sampling
from zenith_jax.telemetry.record import COMPILED, PHASES, Record
from zenith_jax.telemetry.sampling import Sample

SCOPE = "zenith_jax"
# name -> (unit, description). Buckets of durations are advice to the SDK, whose own suit milliseconds.
METRICS = {
    "zenith.compile.duration": ("s", "Time of one phase of a compilation: trace, rewrite, lower, compile"),
    "zenith.compile.sites": ("{site}", "Sites of compiled programs, fused or left to XLA"),
    "zenith.compile.saved": ("By", "Bytes of inner values that fused sites keep from memory, an upper bound"),
    "zenith.call.count": ("{call}", "Calls of functions that are sampled"),
    "zenith.call.dispatch.duration": ("s", "Time until a sampled call returned, its work enqueued"),
    "zenith.call.duration": ("s", "Time until the results of a sampled call were there"),
}
COMPILE_BOUNDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
CALL_BOUNDS = (1e-5, 3e-5, 1e-4, 3e-4, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3)


def to_opentelemetry(meter_provider: Any = None, tracer_provider: Any = None) -> Callable[[], None]:
    """Sends compilations and sampled calls to OpenTelemetry from now on; returns what ends that.

    The providers default to those that the application has set globally; without an SDK they do nothing. Needs the
    package opentelemetry-api: pip install 'zenith-jax[telemetry]'.
    """
    try:
        from opentelemetry import metrics, trace  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ZenithError(
            "zenith.telemetry.to_opentelemetry needs opentelemetry-api: pip install 'zenith-jax[telemetry]'"
        ) from error
    meter = metrics.get_meter(SCOPE, meter_provider=meter_provider)
    tracer = trace.get_tracer(SCOPE, tracer_provider=tracer_provider)

    def instrument(create: Callable, name: str, **more: Any) -> Any:
        unit, description = METRICS[name]
        return create(name, unit=unit, description=description, **more)

    def histogram(name: str, bounds: tuple[float, ...]) -> Any:
        return instrument(meter.create_histogram, name, explicit_bucket_boundaries_advisory=bounds)

    durations = histogram("zenith.compile.duration", COMPILE_BOUNDS)
    sites = instrument(meter.create_counter, "zenith.compile.sites")
    saved = instrument(meter.create_counter, "zenith.compile.saved")
    calls = instrument(meter.create_counter, "zenith.call.count")
    dispatches = histogram("zenith.call.dispatch.duration", CALL_BOUNDS)
    completions = histogram("zenith.call.duration", CALL_BOUNDS)

    def on_record(record: Record) -> None:
        if record.stage != COMPILED:
            return
        for phase, seconds in record.seconds.items():
            more = {"zenith.compile.cache": record.cache} if phase == "compile" and record.cache else {}
            durations.record(seconds, {"zenith.compile.phase": phase, **more})
        for site in record.sites:
            sites.add(1, {"zenith.op": site.op, "zenith.outcome": "fused" if site.fused else "refused"})
        saved.add(record.bytes_saved)
        _span(trace, tracer, record)

    def on_sample(sample: Sample) -> None:
        calls.add(sample.calls)
        dispatches.record(sample.dispatch)
        if sample.completion is not None:
            completions.record(sample.completion)

    ends = (compiling.listen(on_record), sampling.listen_to_samples(on_sample))

    def end() -> None:
        for stop in ends:
            stop()

    return end


def _span(trace: Any, tracer: Any, record: Record) -> None:
    """A span of the compilation with one of each phase, made when it is over and dated back."""
    phases = [p for p in PHASES if p in record.seconds and p != "rewrite"]  # rewrite lies inside trace
    start = int(record.time * 1e9)
    attributes = {
        "code.function.name": record.function,
        "zenith.program": record.program,
        "zenith.platform": record.platform,
        "zenith.compile.cache": record.cache,
        "zenith.sites.fused": record.fused,
        "zenith.sites.refused": record.refused,
    }
    with contextlib.ExitStack() as stack:
        span = tracer.start_span("zenith.compile", start_time=start, attributes=attributes)
        stack.enter_context(trace.use_span(span, end_on_exit=False))
        for site in record.sites:
            if not site.fused:
                span.add_event("zenith.refused", {"zenith.op": site.op, "reason": site.reason, "source": site.source})
        for phase in phases:
            child = tracer.start_span(f"zenith.compile.{phase}", start_time=start)
            start += int(record.seconds[phase] * 1e9)
            child.end(end_time=start)
    span.end(end_time=start)
