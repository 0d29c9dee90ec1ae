"""Whether a model gives what ONNX Runtime gives."""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np

from zenith_jax.onnx_command.common import Action, console, inputs_for, loaded, outputs, table
from zenith_jax.onnx_command.runtime import reference, session

RTOL = 1e-3  # of each output's largest element; float32 sums in another order, through many layers


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rtol", type=float, default=RTOL, help=f"of an output's largest element ({RTOL})")


def _check(arguments: argparse.Namespace) -> tuple[dict[str, Any], int]:
    model = loaded(arguments)
    runtime = session(arguments)
    inputs = inputs_for(model, arguments)
    results = outputs(model, inputs, arguments)
    expected = reference(runtime, inputs)
    names = [o.name for o in model.outputs]
    rows = [_compared(n, r, e, arguments.rtol) for n, r, e in zip(names, results, expected, strict=True)]
    agrees = all(row["agrees"] for row in rows)
    return {"agrees": agrees, "rtol": arguments.rtol, "outputs": rows}, 0 if agrees else 1


def _compared(name: str, result: Any, expected: Any, rtol: float) -> dict[str, Any]:
    """The largest difference, and relative to the largest element. Infinities and NaN must stand at the same places."""
    row: dict[str, Any] = {"name": name, "agrees": False}
    if isinstance(result, list) or isinstance(expected, list):
        return row | {"problem": "a sequence: not compared"}
    if result.shape != np.shape(expected):
        return row | {"problem": f"shape {result.shape}, ONNX Runtime {np.shape(expected)}"}
    row["type"] = f"{result.dtype}{list(result.shape)}"
    if result.dtype.kind in "OUS":
        return row | {"agrees": bool((result == expected).all())}
    a, b = (np.asarray(v, np.float64) for v in (result, expected))
    finite = np.isfinite(b)
    if not np.array_equal(a[~finite], b[~finite], equal_nan=True):
        return row | {"problem": "NaN or infinity at other places"}
    error = float(np.abs(a[finite] - b[finite]).max(initial=0))
    largest = float(np.abs(b)[finite].max(initial=0))
    relative = error / largest if largest else error
    return row | {"max_error": error, "relative": relative, "agrees": relative <= rtol}


def _show_check(found: dict[str, Any]) -> None:
    rows = table("output", "type", "largest difference", "of the largest element", "")
    for row in found["outputs"]:
        numbers = [f"{row[k]:.3g}" if k in row else "" for k in ("max_error", "relative")]
        verdict = "[green]agrees[/]" if row["agrees"] else f"[red]differs[/] {row.get('problem', '')}"
        rows.add_row(row["name"], row.get("type", ""), *numbers, verdict)
    out = console()
    out.print(rows)
    out.print(f"against ONNX Runtime, tolerance {found['rtol']} of an output's largest element")


ACTION = Action(
    "whether a model gives what ONNX Runtime gives",
    "zenith onnx check model.onnx --inputs sample.npz --rtol 1e-3",
    _arguments,
    _check,
    _show_check,
)
