"""`zenith compile FILE.py:NAME | MODEL.onnx`: a model as one .zenith file.

NAME is a function, a module or a pair (function, params) of the file; its example arguments come from --args or from
NAME_args() or example_args() in the file, as for `zenith explain`. An ONNX file that declares its shapes needs none.

  zenith compile model.py:encoder --args "i32[8,128]" --dynamic batch=1,8,64 -o encoder.zenith
  zenith compile model.onnx --mode reduce-overhead

Exit codes: 0 written; 1 the model cannot be compiled or the file not written; 2 the command line is wrong.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from typing import Any

from zenith_jax.explain_command import UsageError, located, parsed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from zenith_jax.compiled.precision import PRECISIONS
    from zenith_jax.compiled.program import MODES

    parser.description = (__doc__ or "").split("\n", 1)[1]
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("target", metavar="FILE.py:NAME|MODEL")
    parser.add_argument("--args", metavar="SPECS", help='shapes of the inputs: "f32[2,128,256], i32[4]"')
    parser.add_argument("-o", "--output", metavar="FILE", type=pathlib.Path, help="default: the model's name + .zenith")
    parser.add_argument("--mode", choices=MODES, default="default")
    parser.add_argument("--precision", choices=[p for p in PRECISIONS if p], help="default: the model's own")
    parser.add_argument(
        "--dynamic",
        metavar="NAME=SIZES",
        action="append",
        default=[],
        help="a dimension of several sizes: batch=1,8,64",
    )
    parser.add_argument("--platform", choices=("cpu", "cuda"), action="append", help="repeat for several")
    parser.add_argument("--json", action="store_true", help="print what was written as JSON")


def main(arguments: argparse.Namespace) -> int:
    import zenith_jax as zenith
    from zenith_jax.errors import ZenithError

    try:
        model, inputs = _located(arguments.target, arguments.args)
        dynamic = dict(_sizes(text) for text in arguments.dynamic)
        output = arguments.output or pathlib.Path(_stem(arguments.target)).with_suffix(".zenith")
    except UsageError as error:
        print(f"zenith compile: {error}", file=sys.stderr)
        return 2
    try:
        compiled = zenith.compile(
            model, *inputs, mode=arguments.mode, precision=arguments.precision, dynamic=dynamic or None
        )
        compiled.save(output, platforms=arguments.platform)
    except (ZenithError, OSError) as error:
        print(f"zenith compile: {error}", file=sys.stderr)
        return 1
    facts = dict(
        file=str(output),
        bytes=output.stat().st_size,
        framework=compiled.framework,
        mode=compiled.mode,
        precision=compiled.precision,
        dynamic=compiled.dynamic,
        inputs=[vars(s) for s in compiled.inputs],
        outputs=[vars(s) for s in compiled.outputs],
        fused=compiled.report.counts(),
    )
    if arguments.json:
        print(json.dumps(facts, indent=1))
    else:
        print(f"{output}: {facts['bytes']} bytes, {compiled.framework} model {compiled.name}")
        print("  in   " + ", ".join(map(str, compiled.inputs)))
        print("  out  " + ", ".join(map(str, compiled.outputs)))
        print("  " + str(compiled.report).partition("\n")[0])
    return 0


def _located(target: str, specs: str | None) -> tuple[Any, tuple[Any, ...]]:
    """The model and its example inputs. Raises UsageError."""
    if ".py:" in target:
        return located(target, specs)
    if not pathlib.Path(target).exists():
        raise UsageError(f"there is no file {target}; expected FILE.py:NAME, MODEL.onnx or another model's path")
    return target, parsed(specs) if specs is not None else ()


def _stem(target: str) -> str:
    return target.rpartition(":")[2].replace(".", "_") if ".py:" in target else pathlib.Path(target).stem


def _sizes(text: str) -> tuple[str, tuple[int, ...]]:
    name, _, sizes = text.partition("=")
    try:
        return name, tuple(int(n) for n in sizes.split(","))
    except ValueError:
        raise UsageError(f"--dynamic takes NAME=SIZES such as batch=1,8,64, got {text!r}") from None
