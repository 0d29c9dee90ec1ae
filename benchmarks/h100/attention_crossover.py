"""Attention at sizes where XLA's plain code may be as fast, on a GPU: what passes/choose/'s limits come from.

    python benchmarks/h100/attention_crossover.py --json FILE

Calls in a chain, each the next one's query, so that what is timed is the device's work and not the host's; error
against float32 products of full precision.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools as ft
import json
import math
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

import zenith_jax as zenith
from zenith_jax.bench.machine import kernels_missing, machine
from zenith_jax.bench.timing import interleaved

# Batch, length, heads, head size.
SHAPES = [
    (1, 128, 12, 64), (8, 128, 12, 64), (1, 512, 12, 64), (32, 128, 12, 64), (1, 1024, 16, 64), (8, 512, 12, 64),
    (4, 2048, 16, 64), (8, 128, 8, 128), (8, 512, 12, 128), (4, 2048, 16, 128), (4, 1024, 8, 256),
]  # fmt: skip
DTYPES = ("bfloat16", "float32")
CHAIN = 8


def plain(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    logits = jnp.einsum("bthd,bshd->bhts", query, key) / math.sqrt(query.shape[-1])
    weights = jax.nn.softmax(logits.astype(jnp.float32)).astype(query.dtype)
    return jnp.einsum("bhts,bshd->bthd", weights, value)


# float32 in TensorFloat-32 on both sides, as XLA's default is.
CONTENDERS: dict[str, Callable[..., jax.Array]] = {
    "xla": plain,
    "zenith": ft.partial(zenith.ops.attention, allow_tf32=True),
}


def chained(attention: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    def run(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        for _ in range(CHAIN):
            query = attention(query, key, value)
        return query

    return run


def with_gradient(function: Callable[..., jax.Array]) -> Callable[..., Any]:
    return jax.grad(lambda *qkv: jnp.square(function(*qkv).astype(jnp.float32)).sum(), argnums=(0, 1, 2))


def measured(shape: tuple[int, ...], dtype: str, seconds: float) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    qkv = [jnp.asarray(rng.normal(size=shape), dtype) for _ in range(3)]
    with jax.default_matmul_precision("highest"):
        exact = np.asarray(jax.jit(plain)(*(x.astype(jnp.float32) for x in qkv)))
    row: dict[str, Any] = {"shape": shape, "dtype": dtype}
    for name, transformed in (("forward_us", lambda f: f), ("gradient_us", with_gradient)):
        jitted = {c: jax.jit(transformed(chained(f))) for c, f in CONTENDERS.items()}
        times = interleaved({c: lambda f=f: f(*qkv) for c, f in jitted.items()}, seconds=seconds)
        row[name] = {c: s / CHAIN * 1e6 for c, s in times.items()}
    row["error"] = {
        c: float(np.abs(np.asarray(jax.jit(f)(*qkv), np.float32) - exact).max()) for c, f in CONTENDERS.items()
    }
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=int, default=len(SHAPES), help="the first so many")
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="repeat for several; default: all")
    parser.add_argument("--seconds", type=float, default=0.5, help="of measuring each pair")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE")
    options = parser.parse_args()
    console = Console(width=120)
    if missing := kernels_missing():
        console.print(missing, style="red")
        return 1
    here = machine()
    console.print(f"zenith {zenith.__version__}: {here.text()}", highlight=False)
    work = [(shape, dtype) for dtype in options.dtype or DTYPES for shape in SHAPES[: options.shapes]]
    rows = [measured(*one, options.seconds) for one in track(work, "timing", console=console, transient=True)]
    table = Table("b s h d", "dtype", title="attention, XLA / Zenith, us a call", title_justify="left")
    for column in ("forward", "forward + backward", "error"):
        table.add_column(column, justify="right")
    for row in rows:
        times = [row[name] for name in ("forward_us", "gradient_us")]
        texts = [f"{t['xla']:.1f} / {t['zenith']:.1f}  {t['xla'] / t['zenith']:.2f} x" for t in times]
        errors = f"{row['error']['xla']:.1e} / {row['error']['zenith']:.1e}"
        table.add_row(" ".join(map(str, row["shape"])), row["dtype"], *texts, errors)
    console.print(table)
    if options.json is not None:
        content = {"zenith": zenith.__version__, "machine": dataclasses.asdict(here), "rows": rows}
        options.json.write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
