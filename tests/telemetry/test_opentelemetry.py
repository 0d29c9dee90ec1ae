"""Metrics and spans as an application with OpenTelemetry's SDK sees them, by Prometheus too."""

from __future__ import annotations

import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

import zenith_jax as zenith
from zenith_jax.telemetry import otel, sampling

pytest.importorskip("opentelemetry.sdk", reason="opentelemetry-sdk, which an application brings, is not installed")
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter


def block(x):
    y = jax.nn.softmax(x * 2)
    return (y - y.mean(-1, keepdims=True)) / jnp.sqrt(y.var(-1, keepdims=True, ddof=1) + 1e-5)


@pytest.fixture
def exported():
    """(points by metric name, spans), of a compilation and two samples."""
    reader, exporter = InMemoryMetricReader(), InMemorySpanExporter()
    tracers = TracerProvider()
    tracers.add_span_processor(SimpleSpanProcessor(exporter))
    end = zenith.telemetry.to_opentelemetry(MeterProvider(metric_readers=[reader]), tracers)
    try:
        with zenith.configured(use_cost=False):
            zenith.jit(block)(jnp.ones((4, 64)))
        meter = sampling._Meter("f", 8)
        meter.add(8, 1e-4, 2e-3)
        meter.add(16, 1e-4, None)
    finally:
        end()
    sampling._Meter("f", 8).add(8, 1.0, 1.0)  # nobody listens any more
    scopes = [s for r in reader.get_metrics_data().resource_metrics for s in r.scope_metrics]
    metrics = {m.name: m for s in scopes for m in s.metrics}
    return metrics, exporter.get_finished_spans()


def test_metrics(exported):
    metrics, _ = exported
    assert {name: (m.unit, m.description) for name, m in metrics.items()} == otel.METRICS
    points = {name: list(m.data.data_points) for name, m in metrics.items()}
    phases = {p.attributes["zenith.compile.phase"]: p for p in points["zenith.compile.duration"]}
    assert set(phases) == {"trace", "rewrite", "lower", "compile"}
    assert all(p.count == 1 and p.sum > 0 and len(p.explicit_bounds) == 12 for p in phases.values())
    sites = {
        (p.attributes["zenith.op"], p.attributes["zenith.outcome"]): p.value for p in points["zenith.compile.sites"]
    }
    assert sites == {("softmax", "fused"): 1, ("norm", "refused"): 1}
    (calls,) = points["zenith.call.count"]
    assert calls.value == 16
    assert [p.count for p in points["zenith.call.dispatch.duration"]] == [2]
    assert [p.sum for p in points["zenith.call.duration"]] == [pytest.approx(2e-3)]
    attributes = {k for ps in points.values() for p in ps for k in p.attributes}
    assert attributes == {"zenith.compile.phase", "zenith.op", "zenith.outcome"}


def test_spans(exported):
    _, spans = exported
    (whole,) = [s for s in spans if s.name == "zenith.compile"]
    parts = {s.name: s for s in spans if s is not whole}
    assert set(parts) == {f"zenith.compile.{p}" for p in ("trace", "lower", "compile")}
    assert all(s.parent.span_id == whole.context.span_id for s in parts.values())
    assert whole.attributes["code.function.name"] == "block"
    assert (whole.attributes["zenith.sites.fused"], whole.attributes["zenith.sites.refused"]) == (1, 1)
    assert sum(s.end_time - s.start_time for s in parts.values()) == whole.end_time - whole.start_time > 0
    (event,) = whole.events
    assert event.attributes["source"].startswith(__file__)


def test_without_the_package_the_error_names_the_command():
    script = (
        "import sys; sys.modules['opentelemetry'] = None\n"
        "import zenith_jax as zenith\n"
        "try: zenith.telemetry.to_opentelemetry()\n"
        "except zenith.errors.ZenithError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert "pip install 'zenith-jax[telemetry]'" in done.stdout, done.stderr


def test_importing_zenith_does_not_import_it():
    script = "import sys, zenith_jax; print([m for m in sys.modules if m.startswith('opentelemetry')])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr
