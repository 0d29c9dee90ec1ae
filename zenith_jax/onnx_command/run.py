"""What a model gives."""

from __future__ import annotations

import argparse
import pathlib
from typing import Any

import numpy as np

from zenith_jax.onnx_command.common import Action, console, inputs_for, loaded, outputs, table


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--save", metavar="FILE.npz", type=pathlib.Path, help="write the outputs by name")


def _run(arguments: argparse.Namespace) -> tuple[dict[str, Any], int]:
    model = loaded(arguments)
    inputs = inputs_for(model, arguments)
    results = outputs(model, inputs, arguments)
    names = [o.name for o in model.outputs]
    if arguments.save is not None:
        arrays: dict[str, Any] = {n: v for n, v in zip(names, results, strict=True) if isinstance(v, np.ndarray)}
        np.savez(arguments.save, **arrays)
    return {
        "inputs": [_summary(n, v) for n, v in inputs.items()],
        "outputs": [_summary(n, v) for n, v in zip(names, results, strict=True)],
    }, 0


def _summary(name: str, value: Any) -> dict[str, Any]:
    if isinstance(value, list):
        return {"name": name, "type": f"sequence of {len(value)}"}
    array = np.asarray(value)
    summary = {"name": name, "type": f"{array.dtype}{list(array.shape)}"}
    if (array.size and array.dtype.kind in "fiub") or array.dtype.kind == "V":
        wide = array.astype(np.float64)
        summary |= {"min": float(wide.min()), "mean": float(wide.mean()), "max": float(wide.max())}
    return summary


def _show_run(found: dict[str, Any]) -> None:
    rows = table("", "name", "type", "min", "mean", "max")
    for end in ("inputs", "outputs"):
        for value in found[end]:
            numbers = [f"{value[k]:.5g}" if k in value else "" for k in ("min", "mean", "max")]
            rows.add_row(end.removesuffix("puts"), value["name"], value["type"], *numbers)
    console().print(rows)


ACTION = Action(
    "run a model on your inputs or on random ones",
    "zenith onnx run model.onnx --input x=x.npy --input sr=16000 --save out.npz",
    _arguments,
    _run,
    _show_run,
)
