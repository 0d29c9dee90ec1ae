"""What sampling costs a call: CPU time of the calling thread, of a function that does nearly nothing.

python benchmarks/telemetry_overhead.py
"""

from __future__ import annotations

import statistics
import time

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

import zenith_jax as zenith
from zenith_jax.bench.machine import machine

CALLS, ROUNDS = 5_000, 31


def main() -> None:
    x = jnp.ones(8)
    functions = {"jax.jit": jax.jit(lambda x: x + 1), "zenith.jit": zenith.jit(lambda x: x + 1)}
    for every in (1024, 64):
        with zenith.configured(telemetry=every):
            functions[f"zenith.jit, every {every}th call sampled"] = zenith.jit(lambda x: x + 1)
    times: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function(x)
    for _ in range(ROUNDS):
        for name, function in functions.items():
            start = time.thread_time()
            for _ in range(CALLS):
                function(x)
            times[name].append((time.thread_time() - start) / CALLS * 1e6)
    table = Table("one call of x + 1", "us, median", "us, shortest")
    for name, found in times.items():
        table.add_row(name, f"{statistics.median(found):.2f}", f"{min(found):.2f}")
    console = Console()
    console.print(machine().text(), highlight=False)
    console.print(table)


if __name__ == "__main__":
    main()
