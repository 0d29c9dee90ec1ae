"""Trains GPT-2 on the source of Python's standard library, byte by byte.

    python examples/train_gpt2_nnx.py --tiny           # less than a minute on two CPU cores
    python examples/train_gpt2_nnx.py                  # 124 million parameters: for a GPU
    python examples/train_gpt2_nnx.py --tiny --plain   # the same with jax.jit

The one line for Zenith is `@jit` on train_step: jax.value_and_grad stays where it is, inside of it.
"""

from __future__ import annotations

import argparse
import functools as ft
import pathlib
import sysconfig
import time
from collections.abc import Iterator

import gpt2
import jax
import numpy as np
import optax
from flax import nnx

import zenith_jax as zenith


def batches(batch: int, length: int) -> Iterator[np.ndarray]:
    """(batch, length + 1) bytes from random places of the standard library."""
    folder = pathlib.Path(sysconfig.get_paths()["stdlib"])
    text = b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))
    data, rng = np.frombuffer(text, np.uint8), np.random.default_rng(0)
    while True:
        starts = rng.integers(0, len(data) - length - 1, batch)
        yield data[starts[:, None] + np.arange(length + 1)].astype(np.int32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="2 layers of 128 features, 128 bytes")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--plain", action="store_true", help="jax.jit instead of zenith.jit")
    arguments = parser.parse_args()
    config = gpt2.TINY if arguments.tiny else gpt2.SMALL
    jit = jax.jit if arguments.plain else zenith.jit

    graph, state = nnx.split(gpt2.GPT2(config, nnx.Rngs(0)))
    optimizer = optax.adamw(1e-3 if arguments.tiny else 3e-4)
    optimizer_state = optimizer.init(state)

    @ft.partial(jit, donate_argnums=(0, 1))
    def train_step(state, optimizer_state, ids):
        loss, gradient = jax.value_and_grad(lambda s: gpt2.next_token_loss(nnx.merge(graph, s), ids))(state)
        updates, optimizer_state = optimizer.update(gradient, optimizer_state, state)
        return optax.apply_updates(state, updates), optimizer_state, loss

    print(f"{sum(x.size for x in jax.tree.leaves(state)) / 1e6:.1f} million parameters on {jax.devices()[0]}")
    if not arguments.plain:
        print(zenith.explain(train_step)(state, optimizer_state, next(batches(arguments.batch, config.length))))
    data = batches(arguments.batch, config.length)
    start = time.perf_counter()
    for step in range(1, arguments.steps + 1):
        state, optimizer_state, loss = train_step(state, optimizer_state, next(data))
        if step == 1:
            loss.block_until_ready()
            print(f"compiled in {time.perf_counter() - start:.1f} s")
            start = time.perf_counter()
        if step % max(1, arguments.steps // 5) == 0:
            loss.block_until_ready()
            per_step = (time.perf_counter() - start) / max(1, step - 1)
            print(f"step {step}: loss {float(loss):.3f}, {per_step * 1e3:.1f} ms a step", flush=True)


if __name__ == "__main__":
    main()
