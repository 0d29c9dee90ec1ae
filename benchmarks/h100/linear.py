"""Linear layers on a GPU: zenith.ops.linear, XLA's code for the same formula, torch.compile, and the product alone.

    python benchmarks/h100/linear.py --json FILE

Each function is compiled alone; calls are queued, contenders take turns, medians. torch.compile runs after them, in the
same process, by CUDA events. The bar of an epilogue is the product alone, XLA's (cuBLAS), of the same run.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools as ft
import json
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

import zenith_jax as zenith
from zenith_jax.bench.machine import kernels_missing, machine
from zenith_jax.bench.timing import interleaved
from zenith_jax.ops.linear import ACTIVATIONS

SHAPES = (  # rows, k, n
    (16384, 768, 3072), (8192, 768, 3072), (8192, 3072, 768), (4096, 1024, 4096), (8192, 4096, 4096), (2048, 768, 3072),
)  # fmt: skip
EPILOGUES = (
    "none", "residual", "relu", "silu", "gelu_erf", "gelu_tanh", "gelu_erf gradient", "gelu_tanh gradient",
)  # fmt: skip
CONTENDERS = ("zenith.ops", "XLA", "product", "torch.compile")
TORCH_EPILOGUES = ("gelu_erf", "gelu_tanh", "silu", "relu")


def as_written(x: Any, w: Any, bias: Any, residual: Any = None, *, activation: str) -> Any:
    y = ACTIVATIONS[activation](x @ w + bias)
    return y if residual is None else y + residual


def gradient(function: Callable[..., Any], cotangent: Any, *primals: Any) -> Any:
    out, vjp = jax.vjp(function, *primals)
    return out, vjp(cotangent)


def measured(rows: int, k: int, n: int, epilogue: str, dtype: str, runs: int) -> dict[str, float]:
    """Milliseconds of the contenders."""
    shapes = ((rows, k), (k, n), (n,), (rows, n))
    keys = jax.random.split(jax.random.key(0), len(shapes) + 1)
    scale = (1, k**-0.5, 1, 1)
    arrays = [jax.random.normal(a, s, dtype) * c for a, s, c in zip(keys, shapes, scale, strict=False)]
    arguments = arrays if epilogue == "residual" else arrays[:3]
    activation = epilogue.removesuffix(" gradient")
    activation = activation if activation in ACTIVATIONS else "none"
    functions = {
        "zenith.ops": ft.partial(zenith.ops.linear, activation=activation),
        "XLA": ft.partial(as_written, activation=activation),
    }
    product: Callable[..., Any] = lambda x, w, *_: x @ w  # noqa: E731
    if epilogue.endswith("gradient"):
        arguments = [jax.random.normal(keys[-1], (rows, n), dtype), *arguments]
        functions = {name: ft.partial(gradient, f) for name, f in functions.items()}
        product = lambda dy, x, w, *_: (x @ w, dy @ w.T, x.T @ dy)  # noqa: E731
    compiled = {name: jax.jit(f) for name, f in {**functions, "product": product}.items()}
    times = interleaved({name: ft.partial(f, *arguments) for name, f in compiled.items()}, runs=runs, seconds=1.0)
    return {name: s * 1e3 for name, s in times.items()}


def torch_compiled(rows: int, k: int, n: int, epilogue: str, dtype: str) -> float | None:
    """Milliseconds of torch.compile's code; None without PyTorch and a GPU that it sees."""
    try:
        import torch
    except ImportError:
        return None
    if not torch.cuda.is_available():
        return None
    functional = torch.nn.functional
    activation = {
        "gelu_erf": functional.gelu, "gelu_tanh": ft.partial(functional.gelu, approximate="tanh"),
        "silu": functional.silu, "relu": functional.relu,
    }[epilogue]  # fmt: skip
    x, w, b = (torch.randn(s, device="cuda", dtype=getattr(torch, dtype)) for s in ((rows, k), (n, k), (n,)))
    compiled = torch.compile(lambda x, w, b: activation(functional.linear(x, w, b)))
    for _ in range(5):
        compiled(x, w, b)
    times = []
    for _ in range(7):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(20):
            compiled(x, w, b)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 20)
    return sorted(times)[3]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--shapes", type=int, default=len(SHAPES), help="the first so many")
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--torch", action="store_true", help="torch.compile too, at the first shape")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE")
    options = parser.parse_args(arguments)
    console = Console(width=140)
    if jax.default_backend() != "gpu":
        print(f"linear.py needs a GPU; JAX sees {jax.devices()[0].device_kind} only", file=sys.stderr)
        return 2
    if reason := kernels_missing():
        print(f"linear.py needs zenith's CUDA kernels: {reason}", file=sys.stderr)
        return 2
    here = machine()
    console.print(f"zenith {zenith.__version__}: {here.text()}", highlight=False)
    table = Table(title=f"linear layers with bias, {options.dtype}: ms", title_justify="left")
    for column in ("rows x k x n", "epilogue", *CONTENDERS, "of product", "of XLA"):
        table.add_column(column, justify="left" if column == "epilogue" else "right")
    found = []
    for index, (rows, k, n) in enumerate(SHAPES[: options.shapes]):
        for epilogue in EPILOGUES:
            ms = measured(rows, k, n, epilogue, options.dtype, options.runs)
            if options.torch and index == 0 and epilogue in TORCH_EPILOGUES:
                seen = torch_compiled(rows, k, n, epilogue, options.dtype)
                ms |= {} if seen is None else {"torch.compile": seen}
            found.append({"rows": rows, "k": k, "n": n, "epilogue": epilogue, "ms": ms})
            ours = ms["zenith.ops"]
            cells = [f"{ms[name]:.4f}" if name in ms else "" for name in CONTENDERS]
            ratios = (f"{ours / ms['product']:.2f}", f"{ms['XLA'] / ours:.2f} x")
            table.add_row(f"{rows} x {k} x {n}", epilogue, *cells, *ratios)
    console.print(table)
    if options.json is not None:
        content = {
            "what": "a linear layer with bias under jax.jit, median; product: x @ w alone, with its gradient's two",
            "zenith": zenith.__version__, "dtype": options.dtype, "machine": dataclasses.asdict(here), "cases": found,
        }  # fmt: skip
        options.json.write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
