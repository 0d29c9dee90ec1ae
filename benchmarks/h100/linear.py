"""Linear layers on a GPU: zenith.ops.linear, XLA's code for the same formula, torch.compile, and the product alone.

    python benchmarks/h100/linear.py --json FILE

Each function is compiled alone; calls are queued, contenders take turns, medians. torch.compile runs after them, in the
same process, by CUDA events. The bar of an epilogue is the product alone, XLA's (cuBLAS), of the same run.

Few rows take less time than the host needs for a call: there CHAIN layers of square weights, one behind another, are
one program, also under zenith.jit, which chooses (zenith_jax/passes/choose/); times are those of a layer.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools as ft
import itertools
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
    "none", "residual", "relu", "silu", "gelu_erf", "gelu_tanh",
    "silu gradient", "gelu_erf gradient", "gelu_tanh gradient",
    "silu gate", "gelu_tanh gate", "gelu_erf gate", "silu gate gradient",
)  # fmt: skip
CONTENDERS = ("zenith.ops", "XLA", "product", "torch.compile")
FEW_ROWS, WIDTHS, CHAIN = (1, 16, 128, 512, 1024, 2048), (1024, 4096), 16
CHAIN_ACTIVATIONS = ("none", "gelu_erf", "gelu_tanh", "silu")
CHAIN_CONTENDERS = ("zenith.ops", "XLA", "zenith.jit", "product")
TORCH_EPILOGUES = ("gelu_erf", "gelu_tanh", "silu", "relu")


def as_written(x: Any, w: Any, bias: Any, residual: Any = None, *, activation: str) -> Any:
    y = ACTIVATIONS[activation](x @ w + bias)
    return y if residual is None else y + residual


def gated_as_written(x: Any, w_gate: Any, w_value: Any, *, activation: str) -> Any:
    return ACTIVATIONS[activation](x @ w_gate) * (x @ w_value)


def gradient(function: Callable[..., Any], cotangent: Any, *primals: Any) -> Any:
    out, vjp = jax.vjp(function, *primals)
    return out, vjp(cotangent)


def products(x: Any, *arrays: Any, weights: int) -> list[Any]:
    return [x @ w for w in arrays[:weights]]


def products_of_gradient(dy: Any, x: Any, *arrays: Any, weights: int) -> list[Any]:
    ys = products(x, *arrays, weights=weights)
    cotangents = [dy, *ys[1:]]  # another one for each product, or XLA would compute it once
    return [*ys, *(d @ w.T for d, w in zip(cotangents, arrays, strict=False)), *(x.T @ d for d in cotangents)]


def measured(rows: int, k: int, n: int, epilogue: str, dtype: str, runs: int) -> dict[str, float]:
    """Milliseconds of the contenders."""
    gated = "gate" in epilogue.split()
    shapes = ((rows, k), (k, n), (k, n)) if gated else ((rows, k), (k, n), (n,), (rows, n))
    keys = jax.random.split(jax.random.key(0), len(shapes) + 1)
    scales = (1, *(k**-0.5 if s == (k, n) else 1 for s in shapes[1:]))
    arrays = [jax.random.normal(a, s, dtype) * c for a, s, c in zip(keys, shapes, scales, strict=False)]
    arguments = arrays if epilogue == "residual" else arrays[:3]
    activation = epilogue.split()[0]
    activation = activation if activation in ACTIVATIONS else "none"
    functions = {
        "zenith.ops": ft.partial(zenith.ops.gated_linear if gated else zenith.ops.linear, activation=activation),
        "XLA": ft.partial(gated_as_written if gated else as_written, activation=activation),
    }
    product = ft.partial(products, weights=1 + gated)
    if epilogue.endswith("gradient"):
        arguments = [jax.random.normal(keys[-1], (rows, n), dtype), *arguments]
        functions = {name: ft.partial(gradient, f) for name, f in functions.items()}
        product = ft.partial(products_of_gradient, weights=1 + gated)
    compiled = {name: jax.jit(f) for name, f in {**functions, "product": product}.items()}
    times = interleaved({name: ft.partial(f, *arguments) for name, f in compiled.items()}, runs=runs, seconds=1.0)
    return {name: s * 1e3 for name, s in times.items()}


def measured_chain(rows: int, width: int, activation: str, dtype: str, runs: int) -> dict[str, float]:
    """Milliseconds of one of CHAIN layers, (rows, width) to (rows, width)."""
    keys = jax.random.split(jax.random.key(0), 2 * CHAIN + 1)
    x = jax.random.normal(keys[-1], (rows, width), dtype)
    weights = [jax.random.normal(key, (width, width), dtype) * width**-0.5 for key in keys[:CHAIN]]
    biases = [jax.random.normal(key, (width,), dtype) for key in keys[CHAIN:-1]]

    def chain(layer: Callable[..., Any]) -> Callable[..., Any]:
        return lambda x, weights, biases: ft.reduce(lambda x, p: layer(x, *p), zip(weights, biases, strict=True), x)

    written = chain(ft.partial(as_written, activation=activation))
    compiled = {
        "zenith.ops": jax.jit(chain(ft.partial(zenith.ops.linear, activation=activation))),
        "XLA": jax.jit(written), "zenith.jit": zenith.jit(written), "product": jax.jit(chain(lambda x, w, _: x @ w)),
    }  # fmt: skip
    calls = {name: ft.partial(f, x, weights, biases) for name, f in compiled.items()}
    times = interleaved(calls, runs=runs, seconds=1.0)
    return {name: s * 1e3 / CHAIN for name, s in times.items()}


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
    parser.add_argument("--epilogues", nargs="*", choices=EPILOGUES, default=EPILOGUES)
    parser.add_argument("--chain", nargs="*", choices=ACTIVATIONS, default=CHAIN_ACTIVATIONS, help="of few rows")
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
        for epilogue in options.epilogues:
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
    table = Table(title=f"one of {CHAIN} layers with bias, {options.dtype}: ms", title_justify="left")
    for column in ("rows", "width", "activation", *CHAIN_CONTENDERS, "zenith.jit of XLA"):
        table.add_column(column, justify="left" if column == "activation" else "right")
    few = []
    for rows, width, activation in itertools.product(FEW_ROWS, WIDTHS, options.chain):
        ms = measured_chain(rows, width, activation, options.dtype, options.runs)
        few.append({"rows": rows, "width": width, "activation": activation, "ms": ms})
        cells = [f"{ms[name]:.4f}" for name in CHAIN_CONTENDERS]
        table.add_row(str(rows), str(width), activation, *cells, f"{ms['XLA'] / ms['zenith.jit']:.2f} x")
    console.print(table)
    if options.json is not None:
        content = {
            "what": "a linear layer with bias, or a gate and its value, under jax.jit, median; product: x @ w alone, "
            "with its gradient's two",
            "zenith": zenith.__version__, "dtype": options.dtype, "machine": dataclasses.asdict(here), "cases": found,
            "chain": CHAIN, "layers_of_few_rows": few,
        }  # fmt: skip
        options.json.write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
