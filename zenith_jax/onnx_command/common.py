"""What the actions of `zenith onnx` share: the model, its inputs, tables."""

from __future__ import annotations

import argparse
import ast
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from zenith_jax.errors import ZenithError


class UsageError(Exception):
    """What is wrong with the command line, with what to write instead."""


@dataclasses.dataclass(frozen=True)
class Action:
    """add_arguments: options of its own. run: what `--json` prints, and the exit code. show: prints that for people."""

    summary: str
    example: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], tuple[dict[str, Any], int]]
    show: Callable[[dict[str, Any]], None]


def inputs_for(model: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """An array for each input of the model. Raises UsageError."""
    names = {i.name for i in model.inputs}
    given = _given(arguments)
    if unknown := sorted(set(given) - names):
        raise UsageError(f"the model has no inputs {unknown}; it has {', '.join(str(i) for i in model.inputs)}")
    sizes = _sizes(arguments.dim, model)
    rng = np.random.default_rng(arguments.seed)
    return {i.name: _as(i, given[i.name]) if i.name in given else _random(i, model, sizes, rng) for i in model.inputs}


def _pairs(options: Sequence[str], what: str) -> dict[str, str]:
    pairs = [option.rpartition("=") if what == "--dim" else option.partition("=") for option in options]
    if wrong := [o for o, (name, _, value) in zip(options, pairs, strict=True) if not name or not value]:
        raise UsageError(f"{what} is NAME={'N' if what == '--dim' else 'VALUE'}, not {wrong[0]!r}")
    return {name: value for name, _, value in pairs}


def _given(arguments: argparse.Namespace) -> dict[str, Any]:
    given: dict[str, Any] = {}
    try:
        if arguments.inputs:
            with np.load(arguments.inputs) as file:
                given.update(file)
        for name, value in _pairs(arguments.input, "--input").items():
            given[name] = np.load(value) if value.endswith(".npy") else ast.literal_eval(value)
    except (OSError, ValueError, SyntaxError) as error:
        raise UsageError(f"an input cannot be read: {error}; --input takes NAME=FILE.npy or NAME=LITERAL") from error
    return given


def _dimensions(info: Any) -> list[int | str]:
    """Sizes and symbols; a dimension that has no symbol is called by the input and its place, as in `x.2`."""
    return [f"{info.name}.{i}" if d is None else d for i, d in enumerate(info.shape or ())]


def _symbols(model: Any) -> list[str]:
    return sorted({d for i in model.inputs for d in _dimensions(i) if isinstance(d, str)})


def _sizes(options: Sequence[str], model: Any) -> dict[str, int]:
    sizes = {}
    for name, value in _pairs(options, "--dim").items():
        if name not in (symbols := _symbols(model)):
            raise UsageError(f"--dim {name}={value}: the symbolic dimensions are {', '.join(symbols) or 'none'}")
        if not value.isdecimal():
            raise UsageError(f"--dim {name}={value}: {value!r} is no size")
        sizes[name] = int(value)
    return sizes


def _as(info: Any, value: Any) -> Any:
    return value if isinstance(value, np.ndarray) or info.dtype is None else np.asarray(value, info.dtype)


def _random(info: Any, model: Any, sizes: Mapping[str, int], rng: np.random.Generator) -> Any:
    """Normal floats; integers and booleans are 0 and 1, which are also ids of tokens and masks."""
    if info.name in model.static_inputs or info.type.kind != "tensor" or info.dtype is None or info.dtype == object:
        why = "decides a shape or a branch" if info.name in model.static_inputs else f"is a {info.type}"
        raise UsageError(f"input {info.name!r} {why} and cannot be random: give it, --input {info.name}=...")
    shape = tuple(d if isinstance(d, int) else sizes.get(d, 1) for d in _dimensions(info))
    if info.dtype.kind in "iub":
        return rng.integers(0, 2, shape).astype(info.dtype)
    return rng.standard_normal(shape, np.float32).astype(info.dtype)


def loaded(arguments: argparse.Namespace) -> Any:
    from zenith_jax.frontends import onnx

    return onnx.load(arguments.model)


def hint(model: Any, arguments: argparse.Namespace) -> str:
    """What to try where a run failed on random inputs."""
    free = [s for s in _symbols(model) if s not in _sizes(arguments.dim, model)]
    return f" (dimensions not given were 1: --dim {' --dim '.join(f'{s}=N' for s in free)})" if free else ""


def outputs(model: Any, inputs: Mapping[str, Any], arguments: argparse.Namespace) -> list[Any]:
    try:
        return [np.asarray(v) if not isinstance(v, list) else [np.asarray(e) for e in v] for v in model(**inputs)]
    except ZenithError as error:
        raise UsageError(f"{error}{hint(model, arguments)}") from error


def as_function(model: Any, inputs: Mapping[str, Any]) -> tuple[Callable[..., Any], dict[str, Any]]:
    """The model as a function of weights and traced inputs, and those inputs; the others are bound."""
    bound = {k: v for k, v in inputs.items() if k in model.static_inputs or np.asarray(v).dtype == object}
    traced = {k: v for k, v in inputs.items() if k not in bound}
    return lambda weights, traced: model.apply(weights, **traced, **bound), traced


def console() -> Any:
    from rich.console import Console

    return Console()


def table(*columns: str) -> Any:
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in columns:
        numeric = column in ("min", "mean", "max", "arrays", "elements", "MB") or column.endswith("ms")
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    return table
