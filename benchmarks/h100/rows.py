"""Ops along rows, by width, against the speed of a copy: norms, softmax, cross entropy, activations.

    python benchmarks/h100/rows.py --json FILE [--only layer_norm] [--dtype float32]

Arrays of 2^26 elements, 128 MiB in bfloat16: an H100's L2 cache holds 50 MB. Of a copy's speed: the bytes that the op
must move, each argument and result once, by its time. "backward" alone begins with what the forward pass kept, as in
training; XLA would choose what it keeps by itself, so that it is compared in one program with the forward pass.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools as ft
import json
import pathlib
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import zenith_jax as zenith
from zenith_jax.bench import cases as written
from zenith_jax.bench.machine import kernels_missing, machine
from zenith_jax.bench.timing import interleaved

ELEMENTS = 1 << 26
WIDTHS = 256, 1024, 4096, 16384, 65536


@dataclasses.dataclass(frozen=True)
class Op:
    """zenith, xla: functions of `arrays` arrays of rows, then `parameters` vectors, then labels if they are asked for.

    forward, backward: arrays of rows that must be read or written. labels: the op is a loss of logits, which its
    gradient overwrites: they are made in the program, as by a product, by a copy, which is counted.
    """

    name: str
    zenith: Callable[..., Any]
    xla: Callable[..., Any]
    forward: int
    backward: int
    arrays: int = 1
    parameters: int = 0
    labels: bool = False
    widths: tuple[int, ...] = WIDTHS

    def arguments(self, width: int, dtype: str) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
        """What it is differentiated in, and the rest."""
        key = iter(jax.random.split(jax.random.key(0), self.arrays + self.parameters + 1))
        shape = ELEMENTS // width, width
        arrays = [jax.random.normal(next(key), shape, dtype) for _ in range(self.arrays)]
        parameters = [jax.random.normal(next(key), (width,), dtype) for _ in range(self.parameters)]
        rest = (jax.random.randint(next(key), shape[:1], 0, width),) if self.labels else ()
        return (*arrays, *parameters), rest


def add_rms_norm(x: Any, residual: Any, scale: Any) -> Any:
    total = x + residual
    return written.rms_norm(total, scale), total


def cross_entropy(logits: Any, labels: Any) -> Any:
    wide = logits.astype(jnp.float32)
    return jax.nn.logsumexp(wide, -1) - jnp.take_along_axis(wide, labels[:, None], -1)[:, 0]


def ops() -> list[Op]:
    o = zenith.ops
    activation = ft.partial(Op, forward=2, backward=3, widths=(4096,))
    return [
        Op("layer_norm", o.layer_norm, written.layer_norm, 2, 3, parameters=2),
        Op("rms_norm", o.rms_norm, written.rms_norm, 2, 3, parameters=1),
        Op("add_layer_norm", o.add_layer_norm, written.add_layer_norm, 4, 4, arrays=2, parameters=2),
        Op("add_rms_norm", o.add_rms_norm, add_rms_norm, 4, 4, arrays=2, parameters=1),
        Op("softmax", o.softmax, jax.nn.softmax, 2, 3),
        Op("cross_entropy", o.cross_entropy, cross_entropy, 1, 4, labels=True),
        activation("gelu(erf)", ft.partial(o.gelu, approximate=False), written.gelu_erf),
        activation("gelu(tanh)", ft.partial(o.gelu, approximate=True), written.gelu_tanh),
        activation("silu", o.silu, jax.nn.silu),
    ]


@dataclasses.dataclass(frozen=True)
class Row:
    """us: of "forward", "backward" (zenith's only) and "both", by contender. of_copy: of the first two."""

    op: str
    width: int
    us: dict[str, dict[str, float]]
    of_copy: dict[str, dict[str, float]]


Program = Callable[[], Any]


def compiled(function: Callable[..., Any], *arguments: Any) -> Program:
    return ft.partial(jax.jit(function).lower(*arguments).compile(), *arguments)


def programs(op: Op, width: int, dtype: str) -> dict[str, dict[str, Program]]:
    """{"forward", "backward" or "both": {contender: a call}}. Compiled side by side: most of the benchmark's time."""
    arguments, rest = op.arguments(width, dtype)

    def made(tree: Any, one: Any) -> Any:
        logits = lambda a: op.labels and a.ndim == 2 and a.dtype == one.dtype  # noqa: E731
        return jax.tree.map(lambda a: jax.lax.optimization_barrier(a * one) if logits(a) else a, tree)

    # The gradient of a sum is one array; a second result for it would be a copy.
    gradients = lambda vjp, dy: (lambda g: (g[0], *g[op.arrays :]))(vjp(dy))  # noqa: E731
    one = jnp.ones((), dtype)
    found: dict[str, dict[str, Future[Program]]] = {"forward": {}, "backward": {}, "both": {}}
    with ThreadPoolExecutor() as compilers:
        for name, function in (("zenith", op.zenith), ("XLA", op.xla)):

            def forward(*xs: Any, function: Callable[..., Any] = function) -> Any:
                return function(*xs, *rest)

            def both(one: Any, dy: Any, *xs: Any, forward: Callable[..., Any] = forward) -> Any:
                y, vjp = jax.vjp(forward, *made(xs, one))
                return y, gradients(vjp, dy)

            def backward(one: Any, dy: Any, vjp: Any) -> Any:
                return gradients(made(vjp, one), dy)

            cotangents = jax.tree.map(lambda y: jnp.full(y.shape, 0.5, y.dtype), jax.eval_shape(forward, *arguments))
            found["forward"][name] = compilers.submit(compiled, forward, *arguments)
            found["both"][name] = compilers.submit(compiled, both, one, cotangents, *arguments)
            if name == "zenith":
                kept = jax.jit(lambda *xs, forward=forward: jax.vjp(forward, *xs)[1])(*arguments)
                found["backward"][name] = compilers.submit(compiled, backward, one, cotangents, kept)
    return {part: {name: call.result() for name, call in calls.items()} for part, calls in found.items()}


def copy_rate(dtype: str) -> float:
    """Bytes a second, read and written, of a copy of an array of rows."""
    x = jnp.ones(ELEMENTS, dtype)
    seconds = interleaved({"copy": compiled(lambda x: x * jnp.asarray(2, dtype), x)}, runs=15, seconds=1)["copy"]
    return 2 * x.nbytes / seconds


def measured(op: Op, width: int, dtype: str, copy: float, seconds: float) -> Row:
    moved = {part: arrays * ELEMENTS * jnp.dtype(dtype).itemsize for part, arrays in _parts(op)}
    us, of_copy = {}, {}
    for part, calls in programs(op, width, dtype).items():
        times = interleaved(calls, runs=9, seconds=seconds)
        us[part] = {name: s * 1e6 for name, s in times.items()}
        if part in moved:
            of_copy[part] = {name: moved[part] / s / copy for name, s in times.items()}
    return Row(op.name, width, us, of_copy)


def _parts(op: Op) -> tuple[tuple[str, int], ...]:
    return ("forward", op.forward), ("backward", op.backward)


def table(rows: list[Row], dtype: str, copy: float) -> Table:
    result = Table(title=f"{dtype}, {ELEMENTS >> 20} Mi elements: us, and of a copy's {copy / 1e12:.2f} TB/s")
    for column in ("", "width", "forward", "of copy", "XLA", "of copy", "backward", "of copy", "both", "XLA", "speed"):
        result.add_column(column, justify="right" if column else "left", no_wrap=True)
    for r in rows:
        forward, both = r.us["forward"], r.us["both"]
        result.add_row(
            r.op, str(r.width), f"{forward['zenith']:.0f}", f"{r.of_copy['forward']['zenith']:.2f}",
            f"{forward['XLA']:.0f}", f"{r.of_copy['forward']['XLA']:.2f}",
            f"{r.us['backward']['zenith']:.0f}", f"{r.of_copy['backward']['zenith']:.2f}",
            f"{both['zenith']:.0f}", f"{both['XLA']:.0f}", f"{both['XLA'] / both['zenith']:.2f} x",
        )  # fmt: skip
    return result


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="WORD", default="", help="ops whose name contains it")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--seconds", type=float, default=0.3, help="at most so long for a comparison, but 3 turns")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE")
    options = parser.parse_args(arguments)
    if jax.default_backend() != "gpu":
        print(f"rows.py needs a GPU; JAX sees {jax.devices()[0].device_kind} only", file=sys.stderr)
        return 2
    if reason := kernels_missing():
        print(f"rows.py needs zenith's CUDA kernels: {reason}", file=sys.stderr)
        return 2
    console = Console(width=None if sys.stdout.isatty() else 120)
    here, copy = machine(), copy_rate(options.dtype)
    console.print(f"zenith {zenith.__version__}: {here.text()}", highlight=False)
    cases = [(op, width) for op in ops() if options.only in op.name for width in op.widths]
    rows = []
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("", total=len(cases))
        for op, width in cases:
            progress.update(task, description=f"{op.name} {width}")
            rows.append(measured(op, width, options.dtype, copy, options.seconds))
            progress.advance(task)
    console.print(table(rows, options.dtype, copy))
    if options.json is not None:
        content = {
            "what": "one op under jax.jit, median", "zenith": zenith.__version__, "dtype": options.dtype,
            "machine": dataclasses.asdict(here), "elements": ELEMENTS, "copy_bytes_per_second": copy,
            "cases": [dataclasses.asdict(row) for row in rows],
        }  # fmt: skip
        options.json.write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
