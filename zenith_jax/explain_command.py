"""`zenith explain FILE.py:FUNCTION`: the report of a function without writing a program for it.

Where its arguments come from, in this order: `--args "f32[2,128,256], i32[4]"`; a function `FUNCTION_args()` of the
file; a function `example_args()` of the file. Both return the tuple of arguments: arrays, pytrees of them (models and
parameters too), `jax.ShapeDtypeStruct`s, Python values. Nothing is computed, unless with --measure.

  zenith explain model.py:apply --args "f32[2,128,256], i32[4]" --measure

Exit codes: 0 explained; 1 with --strict where a site is left to XLA; 2 the file, the function or its arguments are
wrong, or the function raised.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import pathlib
import re
import sys
import traceback
from collections.abc import Callable
from typing import Any

DTYPES = dict(
    f16="float16", bf16="bfloat16", f32="float32", f64="float64", i8="int8", i16="int16", i32="int32", i64="int64",
    u8="uint8", u16="uint16", u32="uint32", u64="uint64", bool="bool",
)  # fmt: skip
ARGUMENT = re.compile(r"\s*(\w+)\[([\d,\s]*)\]\s*(?:,|$)")


class UsageError(Exception):
    """What is wrong with the command line, with what to write instead."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (__doc__ or "").split("\n", 1)[1]
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("target", metavar="FILE.py:FUNCTION", help="FUNCTION may be dotted: model.apply")
    parser.add_argument("--args", metavar="SPECS", help='shapes of the arguments: "f32[2,128,256], i32[4]"')
    parser.add_argument("--grad", action="store_true", help="explain the gradient of sum(FUNCTION) by all float arrays")
    parser.add_argument("--platform", choices=("cpu", "cuda"), help="for which kernels are chosen; default: this JAX's")
    parser.add_argument("--no-cost", action="store_true", help="also fuse where XLA is known to be as fast")
    parser.add_argument("--measure", action="store_true", help="run each fused site, fused and unfused")
    parser.add_argument("--html", metavar="FILE", type=pathlib.Path, help="write the report as a page")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--strict", action="store_true", help="exit with 1 where a site is left to XLA")


def main(arguments: argparse.Namespace) -> int:
    try:
        function, values = load(arguments.target, arguments.args)
    except UsageError as error:
        print(f"zenith explain: {error}", file=sys.stderr)
        return 2
    import zenith_jax as zenith

    try:
        with zenith.configured(
            platform=arguments.platform or zenith.config().platform,
            use_cost=zenith.config().use_cost and not arguments.no_cost,
        ):
            subject = gradient(function) if arguments.grad else function
            report = zenith.explain(subject, measure=arguments.measure)(*values)
    except Exception:
        traceback.print_exc()
        print(f"zenith explain: {arguments.target} raised when it was traced, see above", file=sys.stderr)
        return 2
    if arguments.html is not None:
        arguments.html.write_text(report.html(), encoding="utf-8")
    if arguments.json:
        print(json.dumps(report.as_dict(), indent=1))
    else:
        from rich.console import Console

        console = Console()
        console.print(report if report.sites else str(report))
    return 1 if arguments.strict and report.refused else 0


def load(target: str, specs: str | None) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The function and its arguments. Raises UsageError."""
    function, values = located(target, specs)
    if not callable(function):
        raise UsageError(f"{target} is no function but {type(function).__name__}")
    return function, values


def located(target: str, specs: str | None) -> tuple[Any, tuple[Any, ...]]:
    """What FILE.py:NAME names, and the arguments for it. Raises UsageError."""
    file, _, name = target.rpartition(":")
    path = pathlib.Path(file)
    if not file or not name:
        raise UsageError(f"expected FILE.py:FUNCTION, got {target!r}")
    if not path.is_file():
        raise UsageError(f"there is no file {file}")
    module = _imported(path)
    function: Any = module
    for part in name.split("."):
        if not hasattr(function, part):
            known = sorted(n for n, v in vars(module).items() if callable(v) and not n.startswith("_"))
            raise UsageError(f"{file} has no {name}; it has {', '.join(known)}")
        function = getattr(function, part)
    if specs is not None:
        return function, parsed(specs)
    for candidate in (f"{name.replace('.', '_')}_args", "example_args"):
        if hasattr(module, candidate):
            given = getattr(module, candidate)()
            return function, given if isinstance(given, tuple) else (given,)
    raise UsageError(
        f'no arguments for {name}: give --args "f32[2,128], i32[4]", or define {name.replace(".", "_")}_args() or '
        f"example_args() in {file}, which returns their tuple"
    )


def _imported(path: pathlib.Path) -> Any:
    sys.path.insert(0, str(path.resolve().parent))  # its own imports, as python FILE.py would find them
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        traceback.print_exc()
        raise UsageError(f"{path} could not be imported: {type(error).__name__}: {error}") from error
    return module


def parsed(specs: str) -> tuple[Any, ...]:
    """ "f32[2,128], i32[]" as shapes and dtypes. Raises UsageError."""
    import jax

    found, position = [], 0
    while position < len(specs.rstrip()):
        match = ARGUMENT.match(specs, position)
        if match is None or match[1] not in DTYPES:
            raise UsageError(
                f'--args is a list such as "f32[2,128], i32[4], f32[]", not {specs!r}; dtypes are {", ".join(DTYPES)}'
            )
        found.append(jax.ShapeDtypeStruct(tuple(int(n) for n in match[2].split(",") if n.strip()), DTYPES[match[1]]))
        position = match.end()
    return tuple(found)


def gradient(function: Callable[..., Any]) -> Callable[..., Any]:
    """(*args) -> gradients of the sum of all that `function` returns, by every float array among the arguments."""
    import jax
    import jax.numpy as jnp

    def differentiated(*args: Any) -> Any:
        leaves, structure = jax.tree.flatten(args)
        floats = [i for i, x in enumerate(leaves) if hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating)]

        def total(values: list[Any]) -> Any:
            full = list(leaves)
            for i, value in zip(floats, values, strict=True):
                full[i] = value
            results = jax.tree.leaves(function(*jax.tree.unflatten(structure, full)))
            return sum(jnp.sum(r) for r in results if jnp.issubdtype(r.dtype, jnp.floating))

        return jax.grad(total)([leaves[i] for i in floats])

    return differentiated
