"""Host time of one call: jax.jit with a pytree of 100 parameters, and zenith.compile in its modes.

python benchmarks/call_overhead.py [--leaves 100]: microseconds until a call returns; the model does next to nothing.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import zenith_jax as zenith


def model(params: dict[str, Any], x: jax.Array) -> jax.Array:
    for layer in params.values():
        x = x + layer["weight"][0] + layer["bias"]
    return x


def microseconds(functions: dict[str, Callable[[], Any]], rounds: int = 15, calls: int = 500) -> dict[str, float]:
    """Median over rounds in which each function has its turn."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        jax.block_until_ready(function())
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            for _ in range(calls):
                out = function()
            jax.block_until_ready(out)
            times[name].append((time.perf_counter() - start) / calls * 1e6)
    return {name: statistics.median(each) for name, each in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--leaves", type=int, default=100, help="arrays in the parameters (default 100)")
    parser.add_argument("--size", type=int, default=64, help="rows of a weight (default 64: half of them small)")
    options = parser.parse_args()
    width = 128
    params = {
        f"layer_{i}": {"weight": jnp.ones((options.size, width)), "bias": jnp.ones(width)}
        for i in range(options.leaves // 2)
    }
    x = jnp.ones(width)
    jitted = jax.jit(model)
    functions: dict[str, Callable[[], Any]] = {"jax.jit": lambda: jitted(params, x)}
    aot = jitted.lower(params, x).compile()
    functions["jax.jit, ahead of time"] = lambda: aot(params, x)
    for mode in ("default", "reduce-overhead"):
        compiled = zenith.compile((model, params), x, mode=mode)
        functions[f"zenith.compile, {mode}"] = lambda compiled=compiled: compiled(x)
    print(f"{options.leaves} parameters, {jax.devices()[0].device_kind}, jax {jax.__version__}")
    for name, time_us in microseconds(functions).items():
        print(f"{time_us:8.1f} us  {name}")


if __name__ == "__main__":
    main()
