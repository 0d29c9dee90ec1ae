"""A training step of stock Flax GPT-2 124M, jax.jit against zenith.jit in one run: time, fused sites, gradient error.

    python benchmarks/h100/gpt2_train_step.py --json FILE     # on a GPU; needs flax and optax
    python benchmarks/h100/gpt2_train_step.py --tiny          # anywhere, to see that it runs

The step is jax.value_and_grad inside the jitted function, in bfloat16. Gradients of both, at a smaller batch, are
compared with those of the same parameters in float32 with full-precision products, unfused: by
|g - g32| / |g32| for each parameter, Euclidean norms.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import zenith_jax as zenith
from zenith_jax.bench.machine import kernels_missing, machine
from zenith_jax.bench.timing import interleaved

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "examples"))
import gpt2

JITS: dict[str, Callable[..., Any]] = {"jax.jit": jax.jit, "zenith.jit": zenith.jit}


def training_step(config: gpt2.Config) -> tuple[Callable[..., Any], Any]:
    """(step(state, ids) -> (loss, gradient), state)."""
    graph, state = nnx.split(gpt2.GPT2(config, nnx.Rngs(0)))

    def step(state: Any, ids: jax.Array) -> Any:
        return jax.value_and_grad(lambda s: gpt2.next_token_loss(nnx.merge(graph, s), ids))(state)

    return step, state


def token_ids(config: gpt2.Config, batch: int) -> jax.Array:
    shape = (batch, config.length + 1)
    return jnp.asarray(np.random.default_rng(0).integers(0, config.vocabulary, shape), jnp.int32)


def gradient_errors(config: gpt2.Config, batch: int) -> dict[str, dict[str, float]]:
    """{jit: {parameter: relative error of its gradient}}."""
    step, state = training_step(config)
    exact_step, _ = training_step(dataclasses.replace(config, dtype=jnp.float32))
    ids = token_ids(config, batch)
    with jax.default_matmul_precision("highest"):
        _, exact = jax.jit(exact_step)(jax.tree.map(lambda x: x.astype(jnp.float32), state), ids)
    exact = _by_name(exact)
    errors = {}
    for name, jit in JITS.items():
        _, gradient = jit(step)(state, ids)
        errors[name] = {
            path: float(np.linalg.norm(g - exact[path]) / np.linalg.norm(exact[path]))
            for path, g in _by_name(gradient).items()
            # A bias added to every key shifts all logits of a query alike: its gradient is zero but for rounding.
            if "key.bias" not in path
        }
    return errors


def _by_name(gradient: Any) -> dict[str, np.ndarray]:
    return {
        ".".join(map(str, path)): np.asarray(leaf.get_value(), np.float64) for path, leaf in nnx.to_flat_state(gradient)
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="2 layers of 128 features, 128 tokens, bfloat16")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--gradient-batch", type=int, default=1, help="for the comparison with float32")
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE")
    options = parser.parse_args(arguments)
    config = dataclasses.replace(gpt2.TINY, dtype=jnp.bfloat16) if options.tiny else gpt2.SMALL
    console = Console()
    here = machine()
    console.print(f"zenith {zenith.__version__}: {here.text()}", highlight=False)
    if reason := kernels_missing():
        console.print(f"zenith's kernels cannot run here: {reason}", style="red", highlight=False)

    step, state = training_step(config)
    ids = token_ids(config, options.batch)
    report = zenith.explain(step)(state, ids)
    functions = {name: jit(step) for name, jit in JITS.items()}
    temporary = {name: _temporary_mebibytes(f.lower(state, ids).compile()) for name, f in functions.items()}
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("timing, in turn", total=options.runs)
        seconds = interleaved(
            {name: lambda f=f: f(state, ids) for name, f in functions.items()},
            runs=options.runs, seconds=120, queued=False, step=lambda: progress.advance(task),
        )  # fmt: skip
    errors = gradient_errors(config, options.gradient_batch)

    size = f"{config.layers} layers of {config.features}, b{options.batch} s{config.length} bfloat16"
    table = Table(title=f"GPT-2 training step, {size}", title_justify="left")
    for column in ("", "median step", "speed", "temporary memory", "gradient error", "worst"):
        table.add_column(column, justify="right" if column else "left")
    worsts: list[str] = []
    for name in JITS:
        values = errors[name]
        worst = max(values, key=values.__getitem__)
        worsts.append(f"{name} {worst}")
        table.add_row(
            name, f"{seconds[name] * 1e3:.2f} ms", f"{seconds['jax.jit'] / seconds[name]:.2f} x",
            f"{temporary[name]:.0f} MiB", f"{np.median(list(values.values())):.1e}", f"{values[worst]:.1e}",
        )  # fmt: skip
    console.print(table)
    console.print(
        f"gradient error: median over parameters; worst: {', '.join(worsts)}", highlight=False, soft_wrap=True
    )
    reasons = {site.reason for site in report.refused}
    console.print("fused: " + ", ".join(f"{n} {op}" for op, n in report.counts().items()), highlight=False)
    console.print(
        f"left to XLA: {len(report.refused)} sites: {'; '.join(sorted(reasons))}", highlight=False, soft_wrap=True
    )

    if options.json is not None:
        content = {
            "what": f"GPT-2 training step, {size}", "zenith": zenith.__version__, "machine": dataclasses.asdict(here),
            "median_ms": {name: s * 1e3 for name, s in seconds.items()}, "temporary_mebibytes": temporary,
            "fused": report.counts(), "left_to_xla": sorted(reasons),
            "gradient_error_batch": options.gradient_batch, "gradient_error": errors,
        }  # fmt: skip
        options.json.write_text(json.dumps(content, indent=1) + "\n")
    fused, plain = errors["zenith.jit"], errors["jax.jit"]
    # Both are bfloat16 with sums in another order: a fused gradient may be as far off as twice the plain one's error.
    # Gradients of query and key are differences dp - delta that nearly cancel at initialisation; delta is made from the
    # output as rounded to bfloat16, as in every flash attention (torch's is as far off): 10 roundings are let pass.
    wrong = [path for path, error in fused.items() if not error <= max(2 * plain[path], 10 * 2**-8)]
    for path in wrong:
        console.print(f"gradient of {path}: error {fused[path]:.1e}, unfused {plain[path]:.1e}", style="red")
    return 1 if wrong else 0


def _temporary_mebibytes(compiled: Any) -> float:
    analysis = compiled.memory_analysis()
    return getattr(analysis, "temp_size_in_bytes", 0) / 2**20


if __name__ == "__main__":
    raise SystemExit(main())
