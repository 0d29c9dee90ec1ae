"""Each metric that the Grafana dashboard asks for is exported: by the real server, or by OpenTelemetry's exporter."""

from __future__ import annotations

import json
import pathlib
import re

import jax
import jax.numpy as jnp
import pytest
from serving_models import Client, metrics_with, rows

import zenith_jax as zenith

FOLDER = pathlib.Path(__file__).parents[2] / "examples" / "monitoring"


def asked():
    """Names of metrics and of labels in the dashboard's queries."""
    dashboard = json.loads((FOLDER / "grafana-dashboard.json").read_text())
    queries = [t["expr"] for p in dashboard["panels"] for t in p["targets"]]
    queries += [v["query"] for v in dashboard["templating"]["list"] if v["type"] == "query"]
    names, labels = set(), set()
    for query in queries:
        plain = re.sub(r"\{[^}]*\}|\[[^]]*\]|\$\w+", "", query)
        for group in re.findall(r"by \(([^)]*)\)", plain):
            labels |= {label.strip() for label in group.split(",")}
        names |= set(re.findall(r"\b(?:nv|zenith)_\w+", re.sub(r"by \([^)]*\)", "", plain)))
    return names, labels


def test_the_dashboard_is_well_formed():
    dashboard = json.loads((FOLDER / "grafana-dashboard.json").read_text())
    ids = [p["id"] for p in dashboard["panels"]]
    assert len(set(ids)) == len(ids) == 12
    assert all(p["title"] and p["targets"] for p in dashboard["panels"])


def test_its_metrics_of_the_server_are_exported(served):
    with Client(served.server, "http") as client:
        client.infer("mlp", x=rows(3))
    text = metrics_with(served.server, r"zenith_executions_total\{")
    exported = set(re.findall(r"^(\w+)\{", text, re.MULTILINE))
    names, labels = asked()
    names = {n for n in names if not n.startswith(("zenith_compile", "zenith_call"))}
    assert len(names) > 8 and names <= exported, names - exported
    labels = {label for label in labels if not label.startswith("zenith_") and label != "le"}
    assert labels <= set(re.findall(r'(\w+)="', text))


def test_its_metrics_of_an_application_are_exported():
    prometheus = pytest.importorskip("opentelemetry.exporter.prometheus", reason="OpenTelemetry's exporter is missing")
    from opentelemetry.sdk.metrics import MeterProvider
    from prometheus_client import REGISTRY, generate_latest

    from zenith_jax.telemetry import sampling

    provider = MeterProvider(metric_readers=[prometheus.PrometheusMetricReader()])
    end = zenith.telemetry.to_opentelemetry(provider)
    try:
        with zenith.configured(use_cost=False):
            zenith.jit(lambda x: jax.nn.softmax(x * 2))(jnp.ones((4, 64)))
        sampling._Meter("f", 1).add(1, 1e-4, 1e-3)
        text = generate_latest(REGISTRY).decode()
    finally:
        end()
        provider.shutdown()
    exported = set(re.findall(r"^(\w+)(?:\{| )", text, re.MULTILINE))
    names, labels = asked()
    names = {n for n in names if n.startswith(("zenith_compile", "zenith_call"))}
    assert len(names) == 4 and names <= exported, names - exported
    assert {label for label in labels if label.startswith("zenith_")} <= set(re.findall(r'(\w+)="', text))


def test_the_scrape_configuration_names_the_servers_default_port():
    text = (FOLDER / "prometheus.yml").read_text()
    assert re.findall(r'targets: \["([^"]+)"\]', text) == ["127.0.0.1:8002", "127.0.0.1:9464"]
