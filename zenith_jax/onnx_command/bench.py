"""How fast a model is, beside ONNX Runtime and jax.jit."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

from zenith_jax.bench.timing import interleaved
from zenith_jax.errors import ZenithError
from zenith_jax.onnx_command.common import Action, UsageError, as_function, console, hint, inputs_for, loaded, table
from zenith_jax.onnx_command.runtime import reference, session


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--runs", type=int, default=20, metavar="N", help="timed calls of each (default 20)")
    parser.add_argument("--at-least", type=float, metavar="X", help="exit with 1 below X times ONNX Runtime's speed")


def _bench(arguments: argparse.Namespace) -> tuple[dict[str, Any], int]:
    import jax

    import zenith_jax as zenith

    if arguments.runs < 1:
        raise UsageError(f"--runs {arguments.runs}: at least 1")
    start = time.perf_counter()
    runtime = session(arguments)
    runtime_load = time.perf_counter() - start
    start = time.perf_counter()
    model = loaded(arguments)
    load = time.perf_counter() - start
    inputs = inputs_for(model, arguments)
    function, traced = as_function(model, inputs)
    # On the device, as a server keeps its weights; inputs are converted at each call, as ONNX Runtime's are.
    weights = {**model.params, **model.constants}
    calls: dict[str, Callable[[], Any]] = {"ONNX Runtime": lambda: reference(runtime, inputs)}
    first = {}
    for name, compiled in (("zenith.jit", zenith.jit(function)), ("jax.jit", jax.jit(function))):
        calls[name] = lambda compiled=compiled: jax.block_until_ready(compiled(weights, traced))
    for name, call in calls.items():
        start = time.perf_counter()
        try:
            call()
        except ZenithError as error:
            raise UsageError(f"{error}{hint(model, arguments)}") from error
        first[name] = time.perf_counter() - start
    medians = interleaved(calls, runs=arguments.runs)
    report = zenith.explain(function)(weights, traced)
    speed = medians["ONNX Runtime"] / medians["zenith.jit"]
    rows = [
        {"by": n, "load_ms": 1e3 * (runtime_load if n == "ONNX Runtime" else load), "first_ms": 1e3 * first[n]}
        | {"median_ms": 1e3 * medians[n]}
        for n in ("zenith.jit", "jax.jit", "ONNX Runtime")
    ]
    found = {
        "runs": arguments.runs,
        "rows": rows,
        "speed": speed,
        "fused": report.counts(),
        "device": str(jax.devices()[0]),
    }
    return found, 1 if arguments.at_least is not None and speed < arguments.at_least else 0


def _show_bench(found: dict[str, Any]) -> None:
    rows = table("", "load, ms", "first call, ms", "median, ms")
    for row in found["rows"]:
        rows.add_row(row["by"], *(f"{row[k]:.2f}" for k in ("load_ms", "first_ms", "median_ms")))
    out = console()
    out.print(rows)
    fused = ", ".join(f"{op} {count}" for op, count in found["fused"].items()) or "nothing"
    out.print(f"{found['speed']:.2f} times ONNX Runtime's speed on {found['device']}; fused: {fused}", highlight=False)


ACTION = Action(
    "how fast a model is: zenith.jit, jax.jit and ONNX Runtime in turn",
    "zenith onnx bench model.onnx --dim batch=8 --runs 50 --at-least 1.0",
    _arguments,
    _bench,
    _show_bench,
)
