"""`zenith run FILE.zenith`: a compiled model on inputs of an .npz file, or on random ones.

  zenith run encoder.zenith --inputs batch.npz --output result.npz
  zenith run encoder.zenith --bench 2

Exit codes: 0 it ran; 1 the file is damaged, for another platform or version, or the run failed; 2 the command line or
the inputs are wrong.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import sys
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (__doc__ or "").split("\n", 1)[1]
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("file", metavar="FILE.zenith", type=pathlib.Path)
    parser.add_argument("--inputs", metavar="FILE.npz", type=pathlib.Path, help="arrays by the names of the inputs")
    parser.add_argument("--output", metavar="FILE.npz", type=pathlib.Path, help="write the outputs, by their names")
    parser.add_argument("--bench", metavar="SECONDS", type=float, default=0, help="also time it")
    parser.add_argument("--json", action="store_true", help="print outputs' statistics and times as JSON")


def main(arguments: argparse.Namespace) -> int:
    import numpy as np

    import zenith_jax as zenith
    from zenith_jax.compiled.model import random_inputs
    from zenith_jax.errors import InputError, ZenithError

    def failed(error: object, code: int) -> int:
        print(f"zenith run: {error}", file=sys.stderr)
        return code

    if not arguments.file.is_file():
        return failed(f"there is no file {arguments.file}", 2)
    try:
        model = zenith.load(arguments.file)
    except ZenithError as error:
        return failed(error, 1)
    if arguments.inputs is None:
        arrays: list[Any] = random_inputs(model.inputs, {n: sizes[-1] for n, sizes in model.dynamic.items()})
    else:
        try:
            with np.load(arguments.inputs, allow_pickle=False) as file:
                given = dict(file)
        except (OSError, ValueError) as error:
            return failed(f"{arguments.inputs} is no readable .npz file: {error}", 2)
        missing = [s.name for s in model.inputs if s.name not in given]
        if missing:
            return failed(f"{arguments.inputs} holds {sorted(given)}, the inputs {missing} are missing", 2)
        arrays = [given[s.name] for s in model.inputs]
    try:
        model(*model.interface.input_structure.filled(arrays))  # checks the inputs, with the words of a call
        results = [np.asarray(x) for x in model.flat_call(arrays)]
    except InputError as error:
        return failed(error, 2)
    outputs = {s.name: x for s, x in zip(model.outputs, results, strict=True)}
    if arguments.output is not None:
        try:
            np.savez(arguments.output, **outputs)  # pyright: ignore[reportArgumentType]
        except OSError as error:
            return failed(error, 1)
    facts: dict[str, Any] = dict(file=str(arguments.file), outputs={n: _statistics(x) for n, x in outputs.items()})
    if arguments.bench:
        facts["benchmark"] = dataclasses.asdict(model.benchmark(seconds=arguments.bench))
    if arguments.json:
        print(json.dumps(facts, indent=1))
    else:
        for name, values in facts["outputs"].items():
            print(f"{name}: " + ", ".join(f"{k} {v}" for k, v in values.items()))
        if arguments.bench:
            print(", ".join(f"{k} {v:.4g}" for k, v in facts["benchmark"].items()))
    return 0


def _statistics(x: Any) -> dict[str, Any]:
    import numpy as np

    values = x.astype(np.float64) if x.size else np.zeros(1)
    numbers = dict(min=values.min(), mean=values.mean(), max=values.max())
    return dict(dtype=str(x.dtype), shape=list(x.shape), **{k: float(f"{v:.6g}") for k, v in numbers.items()})
