"""What zenith.jit costs beside jax.jit: calls of a trivial function, tracing a 12-layer GPT-2 training step,
and rewriting 1, 10 and 100 unrolled layers.

    python benchmarks/overhead.py

Bars: calls per second within 3 % of jax.jit's; tracing and rewriting in at most 1.5 x the time of jax.jit's trace.
"""

from __future__ import annotations

import dataclasses
import pathlib
import statistics
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from rich.console import Console
from rich.table import Table

import zenith_jax as zenith
from zenith_jax.bench.machine import machine
from zenith_jax.passes.rewrite import Context, rewrite

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "examples"))
import gpt2

JITS: dict[str, Callable] = {"jax.jit": jax.jit, "zenith.jit": zenith.jit}
CALLS, ROUNDS = 20_000, 11


def call_microseconds() -> dict[str, float]:
    """Median over rounds, the two interleaved; process time, so that other programs count less."""
    x = jnp.ones(4)
    functions = {name: jit(lambda x: x + 1) for name, jit in JITS.items()}
    for function in functions.values():
        function(x)
    times: dict[str, list[float]] = {name: [] for name in JITS}
    for _ in range(ROUNDS):
        for name, function in functions.items():
            start = time.process_time()
            for _ in range(CALLS):
                function(x)
            times[name].append((time.process_time() - start) / CALLS * 1e6)
    return {name: statistics.median(t) for name, t in times.items()}


def trace_seconds() -> dict[str, float]:
    """Shortest of five traces of value_and_grad of 12 layers, each of a fresh function."""
    config = dataclasses.replace(gpt2.TINY, layers=12)
    graph, state = nnx.split(gpt2.GPT2(config, nnx.Rngs(0)))
    ids = jnp.zeros((2, config.length + 1), jnp.int32)

    def once(jit: Callable) -> float:
        def step(state, ids):
            return jax.value_and_grad(lambda s: gpt2.next_token_loss(nnx.merge(graph, s), ids))(state)

        start = time.process_time()
        jit(step).trace(state, ids)
        return time.process_time() - start

    return {name: min(once(jit) for _ in range(6)) for name, jit in JITS.items()}


def rewriting_milliseconds() -> dict[int, float]:
    """Rewriting alone, by number of unrolled GPT-2 layers: shortest of three."""
    found = {}
    for layers in (1, 10, 100):
        config = dataclasses.replace(gpt2.TINY, layers=layers)
        graph, state = nnx.split(gpt2.GPT2(config, nnx.Rngs(0)))
        ids = jnp.zeros((2, config.length), jnp.int32)
        jaxpr = jax.make_jaxpr(lambda s, i, graph=graph: nnx.merge(graph, s)(i))(state, ids)
        times = []
        for _ in range(3):
            start = time.process_time()
            rewrite(jaxpr, Context("cpu", use_cost=False))
            times.append((time.process_time() - start) * 1e3)
        found[layers] = min(times)
    return found


def main() -> None:
    console = Console()
    console.print(machine().text(), highlight=False)
    table = Table("", *JITS, "ratio")
    for name, unit, values in (
        ("call of x + 1", "us", call_microseconds()),
        ("trace of a 12-layer GPT-2 training step", "s", trace_seconds()),
    ):
        plain, fused = values.values()
        table.add_row(f"{name}, {unit}", f"{plain:.3f}", f"{fused:.3f}", f"{fused / plain:.3f}")
    console.print(table)
    table = Table("layers", "rewriting, ms", "ms a layer")
    for layers, ms in rewriting_milliseconds().items():
        table.add_row(str(layers), f"{ms:.1f}", f"{ms / layers:.2f}")
    console.print(table)


if __name__ == "__main__":
    main()
