"""What is in a model."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from zenith_jax.errors import ZenithError
from zenith_jax.onnx_command.common import Action, UsageError, as_function, console, hint, inputs_for, loaded, table


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--explain", action="store_true", help="also what zenith.jit fuses, site by site")


def _inspect(arguments: argparse.Namespace) -> tuple[dict[str, Any], int]:
    model = loaded(arguments)
    sizes: dict[str, list[int]] = {}
    for array in (*model.params.values(), *model.constants.values()):
        count_bytes = sizes.setdefault(str(array.dtype), [0, 0, 0])
        for place, more in enumerate((1, array.size, array.nbytes)):
            count_bytes[place] += more
    found: dict[str, Any] = {
        "model": str(arguments.model),
        "opset": model.opset,
        **model.program.metadata,
        "inputs": [_described(i, i.name in model.static_inputs) for i in model.inputs],
        "outputs": [_described(o) for o in model.outputs],
        "weights": {d: dict(zip(("arrays", "elements", "bytes"), v, strict=True)) for d, v in sizes.items()},
        "nodes": dict(model.node_counts().most_common()),
        "unsupported": model.unsupported(),
    }
    if arguments.explain:
        found["explain"] = _explained(model, inputs_for(model, arguments), arguments)
    return found, 1 if found["unsupported"] else 0


def _described(info: Any, is_static: bool = False) -> dict[str, Any]:
    return {"name": info.name, "type": str(info.type), "static": is_static}


def _explained(model: Any, inputs: Mapping[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    import zenith_jax as zenith

    function, traced = as_function(model, inputs)
    try:
        report = zenith.explain(function)({**model.params, **model.constants}, traced)
    except ZenithError as error:
        raise UsageError(f"{error}{hint(model, arguments)}") from error
    return {**report.as_dict(), "text": str(report)}


def _show_inspect(found: dict[str, Any]) -> None:
    out = console()
    origin = f"opset {found['opset']}, IR {found['ir_version']}, by {found['producer'] or 'unknown'}"
    out.print(f"[bold]{found['model']}[/]  {origin}", highlight=False)
    ends = table("", "name", "type")
    for end, infos in (("in", found["inputs"]), ("out", found["outputs"])):
        for i in infos:
            ends.add_row(end + (", static" if i["static"] else ""), i["name"], i["type"])
    out.print(ends)
    weights = table("weights", "arrays", "elements", "MB")
    for dtype, w in found["weights"].items():
        weights.add_row(dtype, str(w["arrays"]), f"{w['elements']:,}", f"{w['bytes'] / 1e6:.1f}")
    out.print(weights)
    total = sum(found["nodes"].values())
    out.print(f"{total} nodes: " + ", ".join(f"{n} {c}" for n, c in found["nodes"].items()), highlight=False)
    if found["unsupported"]:
        out.print("[red]not computed:[/] " + ", ".join(f"{n} {c}" for n, c in found["unsupported"].items()))
    if "explain" in found:
        out.print(found["explain"]["text"], highlight=False, markup=False)


ACTION = Action(
    "what is in a model: inputs, weights, nodes, and what Zenith does not compute",
    "zenith onnx inspect model.onnx --explain --dim batch=1 --dim length=128",
    _arguments,
    _inspect,
    _show_inspect,
)
