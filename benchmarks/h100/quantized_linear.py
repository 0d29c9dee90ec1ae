"""Linear layers of int8 and int4 weights and few rows on a GPU: zenith.ops.quantized_linear, XLA's code for the same
formula, and XLA's product with bfloat16 weights.

    python benchmarks/h100/quantized_linear.py --json FILE
    python benchmarks/h100/quantized_linear.py --shapes 4 --rows 1 4 8 16

Each function is compiled alone and takes its weights in turn from copies that are together larger than the second-level
cache, all copies in one program; contenders take turns, medians. The bars: 2.2 times the bfloat16 product's speed for
int8, 3.2 times for int4 in groups of 128.
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
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

import zenith_jax as zenith
from zenith_jax.bench.machine import kernels_missing, machine
from zenith_jax.bench.timing import interleaved

SHAPES = ((4096, 4096), (4096, 14336), (14336, 4096), (8192, 8192))  # k, n
ROWS = (1, 4, 8, 16)
GROUP = 128
BYTES = 160 << 20  # of all copies of the weights; the second-level cache has 50 MB
FEWEST = 32  # copies, a layer each, as many as a model has: between programs the device waits for microseconds
PRODUCT = "bfloat16 product"
FORMATS = ("int8", "int8 (n, k)", "int4", "int4 (n, k)")


def as_written(x: Any, w: Any, scale: Any, *, transposed: bool) -> Any:
    """Of one scale a feature, behind the product; of groups, before it."""
    w = w.T if transposed else w
    k, n = w.shape
    if scale.ndim == 1:
        return (x @ w.astype(x.dtype)) * scale
    groups = scale.shape[0]
    return x @ (w.astype(x.dtype).reshape(groups, k // groups, n) * scale[:, None]).reshape(k, n)


def in_turn(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function of x and each of the weights, which come together, so that a call's launches follow each other."""

    def all_of_them(x: Any, weights: Any) -> Any:
        results = []
        for w in weights:
            results.append(function(x, *w))
            x = jax.lax.optimization_barrier((x, results[-1]))[0]  # one after the other
        return jnp.stack(results)  # a kernel more: with 16 rows up to 1 us of a layer, whoever computes it

    return jax.jit(all_of_them)


def copies_of(make: Callable[[Any], tuple[Any, ...]], size_bytes: float) -> list[tuple[Any, ...]]:
    made = jax.jit(make)
    return [made(jax.random.key(i)) for i in range(max(FEWEST, math.ceil(BYTES / size_bytes)))]


def weights_of(k: int, n: int) -> dict[str, list[tuple[Any, ...]]]:
    """{format: copies of a layer's weights, integers with their scale}."""

    def bfloat16(key: Any) -> tuple[Any, ...]:
        return (jax.random.normal(key, (k, n), jnp.bfloat16) * k**-0.5,)

    weights = {PRODUCT: copies_of(bfloat16, 2 * k * n)}
    for name in FORMATS:
        is_4_bit, transposed = name.startswith("int4"), name.endswith("(n, k)")
        dtype, low = (jnp.int4, -8) if is_4_bit else (jnp.int8, -128)

        def make(key: Any, dtype=dtype, low=low, is_4_bit=is_4_bit, transposed=transposed) -> tuple[Any, Any]:
            w = jax.random.randint(key, (n, k) if transposed else (k, n), low, -low).astype(dtype)
            scale = jax.random.uniform(key, (k // GROUP, n) if is_4_bit else (n,), jnp.bfloat16) / -low
            return w, scale

        weights[name] = copies_of(make, k * n / (2 if is_4_bit else 1))
    return weights


def measured(rows: int, weights: dict[str, list[tuple[Any, ...]]], runs: int, seconds: float) -> dict[str, float]:
    """Microseconds of a layer by each contender."""
    x = jax.random.normal(jax.random.key(0), (rows, weights[PRODUCT][0][0].shape[0]), jnp.bfloat16)
    calls = {PRODUCT: ft.partial(in_turn(lambda x, w: x @ w), x, weights[PRODUCT])}
    copies = {PRODUCT: len(weights[PRODUCT])}
    for name in FORMATS:
        transposed = name.endswith("(n, k)")
        contenders = {"ours": zenith.ops.quantized_linear, "XLA": as_written}
        for who, function in contenders.items():
            calls[f"{name}, {who}"] = ft.partial(in_turn(ft.partial(function, transposed=transposed)), x, weights[name])
            copies[f"{name}, {who}"] = len(weights[name])
    times = interleaved(calls, runs=runs, seconds=seconds)
    return {name: 1e6 * s / copies[name] for name, s in times.items()}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.3)
    parser.add_argument("--shapes", type=int, default=2, help="how many of the shapes, default 2")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE")
    options = parser.parse_args(arguments)
    console = Console(width=160)
    if jax.default_backend() != "gpu":
        print(f"quantized_linear.py needs a GPU; JAX sees {jax.devices()[0].device_kind} only", file=sys.stderr)
        return 2
    if reason := kernels_missing():
        print(f"quantized_linear.py needs zenith's CUDA kernels: {reason}", file=sys.stderr)
        return 2
    here = machine()
    console.print(f"zenith {zenith.__version__}: {here.text()}", highlight=False)
    table = Table(title=f"bfloat16 x, int8 of one scale a feature, int4 in groups of {GROUP}: us", title_justify="left")
    found = []
    for k, n in SHAPES[: options.shapes]:
        weights = weights_of(k, n)
        for rows in options.rows:
            us = measured(rows, weights, options.runs, options.seconds)
            if not found:
                for column in ("rows x k x n", *us, "int8 of bfloat16", "int4 of bfloat16"):
                    table.add_column(column, justify="right")
            found.append({"rows": rows, "k": k, "n": n, "us": us})
            product = us[PRODUCT]
            ratios = (f"{product / us[f'{name}, ours']:.2f} x" for name in ("int8", "int4"))
            table.add_row(f"{rows} x {k} x {n}", *(f"{t:.2f}" for t in us.values()), *ratios)
    console.print(table)
    if options.json is not None:
        content = {
            "what": "a linear layer of quantised weights under jax.jit, median; weights not in the cache",
            "zenith": zenith.__version__, "group": GROUP, "machine": dataclasses.asdict(here), "cases": found,
        }  # fmt: skip
        options.json.write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
