"""The ops on a GPU, one by one: zenith.ops against XLA's code for the same formula and, for attention, cuDNN.

    python benchmarks/h100/kernels.py --json FILE

Each function and its gradient is compiled alone by jax.jit; calls are queued, contenders take turns, medians. The
arrays of the row-wise ops are larger than an H100's L2 cache of 50 MB together. Rates count the work that the formula
needs at least: matrix products, of a causal attention half; or each array read or written once.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools as ft
import json
import math
import pathlib
import sys
from collections.abc import Callable
from typing import Any, Literal

import jax
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import zenith_jax as zenith
from zenith_jax.bench import cases as written
from zenith_jax.bench.machine import kernels_missing, machine
from zenith_jax.bench.timing import interleaved

CONTENDERS = ("zenith.ops", "XLA", "cuDNN")


@dataclasses.dataclass(frozen=True)
class Case:
    """shapes: of the arguments. work: of the forward pass. gradient: what is timed next, the gradient in all arguments,
    alone or after a forward pass whose result is wanted too; gradient_work: that."""

    name: str
    functions: dict[str, Callable[..., Any]]
    shapes: tuple[tuple[int, ...], ...]
    unit: Literal["TFLOP/s", "TB/s"]
    work: float
    gradient_work: float
    gradient: Literal["gradient", "fwd+bwd"]


def attention(b: int, h: int, s: int, d: int, causal: bool) -> Case:
    flops = 4.0 * b * h * s * s * d * (0.5 if causal else 1)  # two products; the gradient has five more
    xla, cudnn = (
        ft.partial(jax.nn.dot_product_attention, is_causal=causal, implementation=name) for name in ("xla", "cudnn")
    )
    return Case(
        f"attention b{b} h{h} s{s} d{d}" + " causal" * causal,
        {"zenith.ops": ft.partial(zenith.ops.attention, is_causal=causal), "XLA": xla, "cuDNN": cudnn},
        ((b, s, h, d),) * 3,
        "TFLOP/s",
        flops,
        3.5 * flops,
        "fwd+bwd",
    )


def rows(name: str, ours: Callable, xla: Callable, n: int, d: int, *, arrays: int = 1, parameters: int = 0) -> Case:
    """`arrays` arrays of (n, d) in and as many out."""
    size = 2.0 * n * d
    return Case(
        f"{name} {n}x{d}",
        {"zenith.ops": ours, "XLA": xla},
        ((n, d),) * arrays + ((d,),) * parameters,
        "TB/s",
        2 * arrays * size,
        # Arguments and cotangents are read; of a sum's two equal gradients one is written.
        (2 * arrays + 1) * size,
        "gradient",
    )


def cases() -> list[Case]:
    o = zenith.ops
    return [
        attention(8, 12, 1024, 64, True),
        *(attention(4, 16, 4096, d, causal) for d in (64, 128) for causal in (True, False)),
        rows("layer_norm", o.layer_norm, written.layer_norm, 32768, 768, parameters=2),
        rows("layer_norm", o.layer_norm, written.layer_norm, 8192, 4096, parameters=2),
        rows("add_layer_norm", o.add_layer_norm, written.add_layer_norm, 32768, 768, arrays=2, parameters=2),
        rows("softmax", o.softmax, jax.nn.softmax, 32768, 1024),
        rows("gelu(erf)", ft.partial(o.gelu, approximate=False), written.gelu_erf, 32768, 1024),
        rows("gelu(tanh)", ft.partial(o.gelu, approximate=True), written.gelu_tanh, 32768, 1024),
    ]


def with_gradient(case: Case, function: Callable[..., Any]) -> Callable[..., Any]:
    def gradient(cotangent: Any, *primals: Any) -> Any:
        out, vjp = jax.vjp(function, *primals)
        return (out, vjp(cotangent)) if case.gradient == "fwd+bwd" else vjp(cotangent)

    return gradient


@dataclasses.dataclass(frozen=True)
class Row:
    """seconds: of the contenders that ran. missing: why others did not."""

    label: str
    seconds: dict[str, float]
    missing: dict[str, str]
    unit: str
    work: float

    def rate(self, name: str) -> float:
        return self.work / self.seconds[name] / 1e12


def measured(case: Case, gradient: bool, dtype: str, runs: int, seconds: float) -> Row:
    keys = jax.random.split(jax.random.key(0), len(case.shapes))
    arguments = tuple(jax.random.normal(k, s, dtype) for k, s in zip(keys, case.shapes, strict=True))
    functions, missing = {}, {}
    if gradient:
        outs = jax.eval_shape(case.functions["zenith.ops"], *arguments)
        cotangent = jax.tree.map(lambda y: jax.random.normal(jax.random.key(1), y.shape, y.dtype), outs)
        arguments = (cotangent, *arguments)
    for name, function in case.functions.items():
        compiled = jax.jit(with_gradient(case, function) if gradient else function)
        try:
            jax.block_until_ready(compiled(*arguments))
        except (RuntimeError, ValueError) as error:  # cuDNN is not there, or does not take the shape
            missing[name] = str(error).partition("\n")[0]
        else:
            functions[name] = ft.partial(compiled, *arguments)
    times = interleaved(functions, runs=runs, seconds=seconds)
    label = f"{case.name} {case.gradient}" if gradient else case.name
    return Row(label, times, missing, case.unit, case.gradient_work if gradient else case.work)


def table(rows: list[Row], dtype: str) -> Table:
    result = Table(title=f"one op, {dtype}: ms, and {' or '.join(dict.fromkeys(r.unit for r in rows))}")
    result.add_column("")
    for column in (*CONTENDERS, "of XLA", "of cuDNN"):
        result.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        cells = [
            f"{row.seconds[name] * 1e3:.3f} {row.rate(name):6.{0 if row.unit == 'TFLOP/s' else 2}f}"
            if name in row.seconds
            else "-"
            for name in CONTENDERS
        ]
        ours = row.seconds.get("zenith.ops", math.nan)
        speeds = [f"{row.seconds[name] / ours:.2f} x" if name in row.seconds else "" for name in CONTENDERS[1:]]
        result.add_row(row.label, *cells, *speeds)
    return result


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="WORD", default="", help="cases whose name contains it")
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=1.0, help="at most so long for a case, but 3 runs")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE")
    options = parser.parse_args(arguments)
    console = Console()
    if jax.default_backend() != "gpu":
        print(f"kernels.py needs a GPU; JAX sees {jax.devices()[0].device_kind} only", file=sys.stderr)
        return 2
    if reason := kernels_missing():
        print(f"kernels.py needs zenith's CUDA kernels: {reason}", file=sys.stderr)
        return 2
    here = machine()
    console.print(f"zenith {zenith.__version__}: {here.text()}", highlight=False)

    chosen = [case for case in cases() if options.only in case.name]
    found = []
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("", total=2 * len(chosen))
        for case in chosen:
            for gradient in (False, True):
                progress.update(task, description=case.name)
                found.append(measured(case, gradient, options.dtype, options.runs, options.seconds))
                progress.advance(task)
    console.print(table(found, options.dtype))
    for row in found:
        for name, reason in row.missing.items():
            console.print(f"{name} does not run {row.label}: {reason}", highlight=False, soft_wrap=True)
    if options.json is not None:
        content = {
            "what": "one op under jax.jit, median", "zenith": zenith.__version__, "dtype": options.dtype,
            "machine": dataclasses.asdict(here),
            "cases": [
                {
                    "case": row.label, "unit": row.unit, "ms": {n: s * 1e3 for n, s in row.seconds.items()},
                    "rate": {n: row.rate(n) for n in row.seconds}, "missing": row.missing,
                }
                for row in found
            ],
        }  # fmt: skip
        options.json.write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
