"""Attention on a GPU: zenith.ops.attention against cuDNN through jax.nn, forward and forward with backward.

    python benchmarks/h100/attention.py --json FILE

Batch x length is 16384 positions and heads x head size 2048 features, as in FlashAttention's tables, unless a case says
otherwise. Contenders take turns in one process, medians, random data. Rates count two matrix products forward and five
backward, a causal attention half of them and a window the pairs inside of it: what has to be computed, not what either
side does compute.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools as ft
import json
import pathlib
import sys

import jax
from rich.console import Console

import zenith_jax as zenith
from zenith_jax.bench.machine import kernels_missing, machine
from zenith_jax.bench.timing import interleaved

POSITIONS, FEATURES = 16384, 2048


@dataclasses.dataclass(frozen=True)
class Case:
    """b batch, h query heads, k key/value heads, s length, d query/key and e value features; keys up to `left` before
    the query's own position, causal, if given."""

    b: int
    h: int
    k: int
    s: int
    d: int
    e: int
    causal: bool
    left: int | None = None

    def text(self) -> str:
        heads = f"h{self.h}" + f"/{self.k}" * (self.k != self.h)
        size = f"d{self.d}" + f"/{self.e}" * (self.e != self.d)
        mask = "causal" if self.causal else "full"
        return f"b{self.b} {heads} s{self.s} {size} {mask}" + (f" window {self.left}" if self.left is not None else "")

    def flops(self) -> float:
        """Of the forward pass."""
        pairs = float(self.s) * self.s / (2 if self.causal else 1)
        if self.left is not None:
            pairs = float(self.s) * (self.left + 1) - self.left * (self.left + 1) / 2
        return 2.0 * self.b * self.h * pairs * (self.d + self.e)


def standard(s: int, d: int, causal: bool) -> Case:
    h = FEATURES // d
    return Case(POSITIONS // s, h, h, s, d, d, causal)


def cases() -> list[Case]:
    return [
        *(
            standard(s, d, causal)
            for d in (64, 128)
            for causal in (True, False)
            for s in (512, 1024, 2048, 4096, 8192, 16384)
        ),
        Case(4, 16, 4, 4096, 128, 128, True),
        Case(8, 12, 12, 1024, 64, 64, True),
        Case(4, 16, 16, 4096, 96, 96, True),
        Case(4, 16, 16, 4096, 192, 128, True),
        Case(4, 16, 16, 4096, 192, 128, False),
        Case(4, 8, 8, 4096, 256, 256, True),
        Case(1, 16, 16, 32768, 128, 128, True, left=1024),
    ]


def contenders(case: Case) -> dict:
    window = {} if case.left is None else {"local_window_size": (case.left, 0)}
    cudnn = ft.partial(jax.nn.dot_product_attention, is_causal=case.causal, implementation="cudnn", **window)
    if case.d != case.e:  # refused by jax.nn: what a user can do is pad the values
        padding = [(0, 0)] * 3 + [(0, case.d - case.e)]
        cudnn = lambda q, k, v, f=cudnn: f(q, k, jax.numpy.pad(v, padding))[..., : case.e]  # noqa: E731
    return {"zenith": ft.partial(zenith.ops.attention, is_causal=case.causal, **window), "cuDNN": cudnn}


def measured(case: Case, gradient: bool, dtype: str, runs: int, seconds: float) -> dict:
    shapes = (
        (case.b, case.s, case.h, case.d),
        (case.b, case.s, case.k, case.d),
        (case.b, case.s, case.k, case.e),
        (case.b, case.s, case.h, case.e),
    )
    query, key, value, dout = (jax.random.normal(jax.random.key(i), shape, dtype) for i, shape in enumerate(shapes))
    arguments = (query, key, value, dout) if gradient else (query, key, value)
    functions, missing = {}, {}
    for name, function in contenders(case).items():

        def both(q, k, v, g, function=function):
            out, vjp = jax.vjp(function, q, k, v)
            return out, vjp(g)

        compiled = jax.jit(both if gradient else function)
        try:
            jax.block_until_ready(compiled(*arguments))
        except (RuntimeError, ValueError, NotImplementedError) as error:  # cuDNN does not take the shape
            missing[name] = str(error).partition("\n")[0]
        else:
            functions[name] = ft.partial(compiled, *arguments)
    times = interleaved(functions, runs=runs, seconds=seconds)
    work = case.flops() * (3.5 if gradient else 1)
    return {
        "case": case.text(), "pass": "fwd+bwd" if gradient else "fwd", "ms": {n: t * 1e3 for n, t in times.items()},
        "TFLOP/s": {n: work / t / 1e12 for n, t in times.items()}, "missing": missing,
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="WORD", default="", help="cases whose text contains it")
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=0.5, help="at most so long for a case, but 3 rounds")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE")
    options = parser.parse_args(arguments)
    if jax.default_backend() != "gpu":
        print(f"attention.py needs a GPU; JAX sees {jax.devices()[0].device_kind} only", file=sys.stderr)
        return 2
    if reason := kernels_missing():
        print(f"attention.py needs zenith's CUDA kernels: {reason}", file=sys.stderr)
        return 2
    here, console = machine(), Console(width=140, highlight=False)
    console.print(f"zenith {zenith.__version__}, {options.dtype}: {here.text()}")
    rows = []
    for case in cases():
        if options.only not in case.text():
            continue
        for gradient in (False, True):
            row = measured(case, gradient, options.dtype, options.runs, options.seconds)
            rows.append(row)
            rates = "  ".join(f"{n} {row['ms'][n]:7.3f} ms {row['TFLOP/s'][n]:4.0f}" for n in row["ms"])
            both = len(row["ms"]) == 2
            ratio = f"  {row['ms']['cuDNN'] / row['ms']['zenith']:.2f} x" if both else f"  {row['missing']}"
            console.print(f"{row['case']:32} {row['pass']:8} {rates}{ratio}", soft_wrap=True)
    if options.json is not None:
        content = {
            "what": "attention under jax.jit, median", "zenith": zenith.__version__, "dtype": options.dtype,
            "machine": dataclasses.asdict(here), "cases": rows,
        }  # fmt: skip
        options.json.write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
