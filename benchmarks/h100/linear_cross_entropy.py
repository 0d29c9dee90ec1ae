"""Linear layer and cross entropy: value and gradients in time and memory, ours against jax.jit and torch.compile.

    python benchmarks/h100/linear_cross_entropy.py --json FILE     # bfloat16, the shapes in docs/performance.md
    python benchmarks/h100/linear_cross_entropy.py --shape 1024x256x8192 --dtype float32

A shape is tokens x features x classes. The loss is the mean over all tokens; gradients are those of x and w. All run
the same plain function, zenith.jit with its cost rule off. Extra memory is what XLA's compiled program allocates
besides arguments and results, and torch's peak beyond them. The floor is three products at the speed of a single one.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools as ft
import importlib.util
import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

import zenith_jax as zenith
from zenith_jax.bench.machine import machine
from zenith_jax.bench.timing import interleaved

SHAPES = ("8192x768x50304", "8192x4096x128256")
MEBIBYTE = 2**20


def loss(x: Any, w: Any, labels: Any) -> Any:
    """As it is written: logits in the dtype of x, the rest in float32."""
    logits = (x @ w).astype(jnp.float32)
    picked = jnp.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - picked)


value_and_grad = jax.value_and_grad(loss, (0, 1))


def in_jax(decorate: Callable, arguments: Any) -> tuple[Callable[[], Any], int, Any]:
    compiled = decorate(value_and_grad).lower(*arguments).compile()
    extra = compiled.memory_analysis().temp_size_in_bytes
    return ft.partial(compiled, *arguments), extra, compiled(*arguments)


def in_torch(arguments: Any) -> tuple[Callable[[], Any], int, Any]:
    import torch

    x, w, labels = (torch.from_dlpack(a) for a in arguments)
    x, w, labels = x.detach().requires_grad_(), w.detach().requires_grad_(), labels.long()

    def loss(x: Any, w: Any, labels: Any) -> Any:
        return torch.nn.functional.cross_entropy((x @ w).float(), labels)

    compiled = torch.compile(loss)

    def run() -> Any:
        value = compiled(x, w, labels)
        return value, *torch.autograd.grad(value, (x, w))

    def timed() -> Any:
        out = run()
        torch.cuda.synchronize()
        return out[0].detach()

    results = run()
    del results
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = run()
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - before - sum(g.nbytes for g in results[1:])
    return timed, extra, results


def error(found: Any, expected: Any) -> float:
    """Of the gradients, relative to the largest of each."""
    pairs = [(np.asarray(f, np.float64), np.asarray(e, np.float64)) for f, e in zip(found[1], expected[1], strict=True)]
    return max(float(np.abs(f - e).max() / np.abs(e).max()) for f, e in pairs)


def measured(shape: str, dtype: str, runs: int, seconds: float) -> dict[str, Any]:
    n, d, v = map(int, shape.split("x"))
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (n, d), dtype)
    w = (jax.random.normal(keys[1], (d, v), jnp.float32) / d**0.5).astype(dtype)
    arguments = (x, w, jax.random.randint(keys[2], (n,), 0, v))
    with zenith.configured(use_cost=False):
        contenders = {"zenith.jit": in_jax(zenith.jit, arguments), "jax.jit": in_jax(jax.jit, arguments)}
        if jax.default_backend() == "gpu" and importlib.util.find_spec("torch"):
            contenders["torch.compile"] = in_torch(arguments)
        functions = {name: run for name, (run, _, _) in contenders.items()}
        product = jax.jit(jnp.matmul)
        functions["one product"] = ft.partial(product, x, w)
        times = interleaved(functions, runs=runs, seconds=seconds)
    return dict(
        shape=shape,
        dtype=dtype,
        milliseconds={name: t * 1e3 for name, t in times.items()},
        floor_milliseconds=3e3 * times["one product"],
        extra_mebibytes={name: extra / MEBIBYTE for name, (_, extra, _) in contenders.items()},
        logits_mebibytes=n * v * jnp.dtype(dtype).itemsize / MEBIBYTE,
        difference=error(contenders["zenith.jit"][2], contenders["jax.jit"][2]),
    )


def table(rows: list[dict[str, Any]]) -> Table:
    result = Table(title="linear + cross entropy, value and gradients: ms, and MiB beyond arguments and results")
    for column in ("", "zenith.jit", "jax.jit", "torch.compile", "3 products", "logits", "difference"):
        result.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        times, extra = row["milliseconds"], row["extra_mebibytes"]
        result.add_row(
            f"{row['shape']} {row['dtype']}",
            *(
                f"{times[name]:.3f}, {extra[name]:.0f}" if name in times else "-"
                for name in ("zenith.jit", "jax.jit", "torch.compile")
            ),
            f"{row['floor_milliseconds']:.3f}",
            f"{row['logits_mebibytes']:.0f}",
            f"{row['difference']:.1e}",
        )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shape", action="append", help="tokens x features x classes; may be given several times")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.2)
    parser.add_argument("--json", type=pathlib.Path)
    options = parser.parse_args()
    rows = [measured(s, options.dtype, options.runs, options.seconds) for s in options.shape or SHAPES]
    Console(width=150).print(table(rows))
    if options.json is not None:
        options.json.write_text(json.dumps(dict(machine=dataclasses.asdict(machine()), rows=rows), indent=1))


if __name__ == "__main__":
    main()
