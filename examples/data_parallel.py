"""Trains a tiny GPT-2 with its batch over all devices, of one process or several: JAX's own engine, nothing else.

    python examples/data_parallel.py                            # this process, its devices
    python examples/data_parallel.py --processes 2              # two processes here, joined by jax.distributed
    XLA_FLAGS=--xla_force_host_platform_device_count=8 JAX_PLATFORMS=cpu python examples/data_parallel.py

On a cluster a scheduler starts the processes, and `jax.distributed.initialize()` finds the others by itself. The line
for Zenith is `@zenith.jit`: parameters are replicated, the batch is sharded, and gradients are all that is exchanged.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import socket
import subprocess
import sys

import gpt2
import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import zenith_jax as zenith

CONFIG = dataclasses.replace(gpt2.TINY, layers=1, length=64)


def train(steps: int, batch: int) -> None:
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    replicated, by_row = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
    graph, state = nnx.split(gpt2.GPT2(CONFIG, nnx.Rngs(0)))
    optimizer = optax.sgd(0.1)
    optimizer_state = optimizer.init(state)

    def put(array, sharding):
        """Every process has the whole array, and hands over the part of its devices."""
        array = np.asarray(array)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    state, optimizer_state = jax.tree.map(lambda x: put(x, replicated), (state, optimizer_state))

    @zenith.jit
    def train_step(state, optimizer_state, ids):
        loss, gradient = jax.value_and_grad(lambda s: gpt2.next_token_loss(nnx.merge(graph, s), ids))(state)
        updates, optimizer_state = optimizer.update(gradient, optimizer_state, state)
        return optax.apply_updates(state, updates), optimizer_state, loss

    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 256, (batch, CONFIG.length + 1)).astype(np.int32)
    step = train_step.lower(state, optimizer_state, put(tokens, by_row)).compile()
    (record, *_) = zenith.telemetry.records()[-1:]
    if jax.process_index() == 0:
        names = "all-reduce all-gather all-to-all collective-permute reduce-scatter".split()
        text = step.as_text()
        counts = {n: len(re.findall(rf" {n}(?:-start)?\(", text)) for n in names}
        print(f"{jax.process_count()} processes, {jax.device_count()} devices, {record.fused} sites fused")
        print("collectives:", ", ".join(f"{n} {c}" for n, c in counts.items()))
    for i in range(steps):
        state, optimizer_state, loss = step(state, optimizer_state, put(tokens, by_row))
        if jax.process_index() == 0:
            print(f"step {i} loss {float(loss):.6f}", flush=True)


def launch(processes: int, arguments: list[str]) -> int:
    """Runs this file once for each process, and returns the first exit code that is not 0."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{s.getsockname()[1]}"
    command = [sys.executable, __file__, *arguments]
    started = [
        subprocess.Popen(command, env={**os.environ, "RANK": f"{address} {processes} {rank}"})
        for rank in range(processes)
    ]
    return next((code for code in [p.wait() for p in started] if code), 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--no-cost", action="store_true", help="fuse everything that can be, for tests at tiny sizes")
    arguments = parser.parse_args()
    if arguments.processes > 1 and "RANK" not in os.environ:
        return launch(arguments.processes, sys.argv[1:])
    if "RANK" in os.environ:
        address, processes, rank = os.environ["RANK"].split()
        jax.distributed.initialize(address, int(processes), int(rank))
    zenith.configure(use_cost=not arguments.no_cost)
    train(arguments.steps, arguments.batch)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
