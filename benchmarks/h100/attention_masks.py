"""Attention with masks, biases and caches on a GPU: zenith.ops.attention against cuDNN through jax.nn.

    python benchmarks/h100/attention_masks.py --json FILE

Both sides get the same arrays. Where zenith takes numbers (lengths, segments, a window) and jax.nn an array, cuDNN gets
the array: that is what a user of jax.nn writes. Contenders take turns in one process, medians, random data. Decoding
counts the bytes of keys and values; "copy" is x + 1 over 2 GiB, read and written, in the same run. The plain cases are
attention.py's.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools as ft
import json
import math
import pathlib
import re
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console

import zenith_jax as zenith
from zenith_jax.bench.machine import kernels_missing, machine
from zenith_jax.bench.timing import interleaved

CACHES_BYTES = 600_000_000  # of all caches of one program

cudnn = ft.partial(jax.nn.dot_product_attention, implementation="cudnn")


@dataclasses.dataclass(frozen=True)
class Case:
    """b batch, t queries, s keys, h query heads, k key/value heads, d features."""

    name: str
    b: int
    t: int
    s: int
    h: int
    k: int
    d: int
    arrays: Callable[[Case], dict[str, Any]] = lambda case: {}
    zenith: Callable[..., dict[str, Any]] = lambda **arrays: arrays  # arrays -> arguments of zenith.ops.attention
    cudnn: Callable[..., dict[str, Any]] = lambda **arrays: arrays  # and of jax.nn
    gradient: bool = True

    def text(self) -> str:
        length = f"s{self.s}" if self.t == self.s else f"t{self.t} s{self.s}"
        return f"b{self.b} h{self.h}/{self.k} {length} d{self.d} {self.name}"


def bias_of(case: Case) -> dict[str, Any]:
    return {"bias": jax.random.normal(jax.random.key(9), (1, case.h, case.t, case.s), jnp.bfloat16)}


def mask_of(case: Case) -> dict[str, Any]:
    return {"mask": jax.random.bernoulli(jax.random.key(9), 0.7, (case.b, 1, case.t, case.s))}


def lengths_of(case: Case) -> dict[str, Any]:
    return {"lengths": jnp.linspace(case.s / 4, case.s, case.b).astype(jnp.int32)}


def padding_of(case: Case) -> dict[str, Any]:
    """Of examples that are a quarter to all of the length: for each key, as most models have it."""
    return {"mask": (jnp.arange(case.s) < lengths_of(case)["lengths"][:, None])[:, None, None]}


def triangle_of(case: Case) -> dict[str, Any]:
    return {"mask": jnp.tril(jnp.ones((case.t, case.s), bool))[None, None]}


def blocks_of(case: Case) -> dict[str, Any]:
    segments = segments_of(case)["segments"]
    return {"mask": segments[:, None, :, None] == segments[:, None, None]}


def segments_of(case: Case) -> dict[str, Any]:
    return {"segments": jnp.broadcast_to(jnp.arange(case.s) * 8 // case.s, (case.b, case.s))}


def within(case: Case, lengths: Any) -> Any:
    return for_each_query(case, (jnp.arange(case.s) < lengths[:, None])[:, None, None])


def for_each_query(case: Case, mask: Any) -> Any:
    return jnp.broadcast_to(mask, (case.b, 1, case.t, case.s))


def windowed(s: int, left: int) -> Any:
    distance = jnp.arange(s)[:, None] - jnp.arange(s)
    return ((distance >= 0) & (distance <= left))[None, None]


def cases() -> list[Case]:
    padded = dict(
        arrays=lengths_of,
        zenith=lambda lengths: {"key_lengths": lengths},
    )
    packed = Case(
        "8 segments", 4, 4096, 4096, 16, 16, 128, segments_of,
        lambda segments: {"query_segments": segments, "key_segments": segments},
        lambda segments: {"mask": segments[:, None, :, None] == segments[:, None, None]},
    )  # fmt: skip
    lengths = Case("lengths", 4, 4096, 4096, 16, 16, 128, **padded)
    window = Case(
        "window 1024, written as a mask", 1, 16384, 16384, 16, 16, 128,
        zenith=lambda: {"is_causal": True, "local_window_size": (1024, 0)},
        cudnn=lambda: {"mask": windowed(16384, 1024)},
    )  # fmt: skip
    return [
        *(Case("bias", 4, 4096, 4096, h, h, d, bias_of) for h, d in ((16, 128), (32, 64))),
        *(Case("mask", 4, 4096, 4096, h, h, d, mask_of) for h, d in ((16, 128), (32, 64))),
        Case("bias", 64, 512, 512, 12, 12, 64, bias_of),
        *(
            # cuDNN does not take a mask with a query axis of 1.
            dataclasses.replace(case, cudnn=lambda mask, case=case: {"mask": for_each_query(case, mask)})
            for case in (Case("padding mask", b, s, s, h, h, d, padding_of)
                         for b, s, h, d in ((4, 4096, 16, 128), (4, 4096, 32, 64), (64, 512, 12, 64)))
        ),
        Case("causal mask, an array", 4, 4096, 4096, 16, 16, 128, triangle_of),
        Case("mask of 8 segments", 4, 4096, 4096, 16, 16, 128, blocks_of),
        packed,
        dataclasses.replace(lengths, cudnn=lambda lengths, case=lengths: {"mask": within(case, lengths)}),
        window,
        *(
            Case("decoding", b, t, s, h, k, 128, gradient=False)
            for b, t, s, h, k in ((1, 1, 131072, 32, 8), (1, 1, 16384, 32, 8), (64, 1, 8192, 32, 8),
                                  (64, 1, 2048, 32, 32), (8, 4, 32768, 32, 8))
        ),
    ]  # fmt: skip


def in_turn(function: Callable[..., Any], query: Any, caches: Any) -> Any:
    """A program over all caches, one after the other."""
    results = []
    for key, value in caches:
        results.append(function(query, key, value))
        query = jax.lax.optimization_barrier((query, results[-1]))[0]
    return results


def decoded(case: Case, runs: int, seconds: float) -> dict:
    """Several caches in a program: one of 67 MB is read in less time than the host takes for a call, and lies in the
    second-level cache for half."""
    shapes = [(case.b, n, heads, case.d) for n, heads in ((case.t, case.h), (case.s, case.k), (case.s, case.k))]
    made = jax.jit(lambda key, shape: jax.random.normal(key, shape, jnp.bfloat16), static_argnums=1)
    query = made(jax.random.key(0), shapes[0])
    bytes_of_cache = 2 * 2 * math.prod(shapes[1])
    copies = max(1, CACHES_BYTES // bytes_of_cache)
    caches = [[made(jax.random.key(2 * i + j), shapes[1]) for j in range(2)] for i in range(copies)]
    contenders = {
        "zenith": zenith.ops.attention,
        "cuDNN": cudnn,
        "XLA": ft.partial(jax.nn.dot_product_attention, implementation="xla"),
    }
    functions = {n: ft.partial(jax.jit(ft.partial(in_turn, f)), query, caches) for n, f in contenders.items()}
    times = interleaved(functions, runs=runs, seconds=seconds)
    return {
        "case": case.text(), "pass": "fwd", "ms": {n: t / copies * 1e3 for n, t in times.items()},
        "GB/s of keys and values": {n: copies * bytes_of_cache / t / 1e9 for n, t in times.items()}, "missing": {},
    }  # fmt: skip


def measured(case: Case, gradient: bool, runs: int, seconds: float) -> dict:
    shapes = [(case.b, n, heads, case.d) for n, heads in ((case.t, case.h), (case.s, case.k), (case.s, case.k))]
    query, key, value = (jax.random.normal(jax.random.key(i), x, jnp.bfloat16) for i, x in enumerate(shapes))
    arrays = case.arrays(case)
    contenders = {
        "zenith": lambda q, k, v, x: zenith.ops.attention(q, k, v, **case.zenith(**x)),
        "cuDNN": lambda q, k, v, x: cudnn(q, k, v, **case.cudnn(**x)),
        "XLA": lambda q, k, v, x: jax.nn.dot_product_attention(q, k, v, implementation="xla", **case.cudnn(**x)),
    }
    if case.t == case.s > 1024:
        del contenders["XLA"]
    functions, missing = {}, {}
    for name, function in contenders.items():

        def both(q, k, v, x, function=function):
            out, vjp = jax.vjp(lambda *a: function(*a, x), q, k, v)
            return out, vjp(out)

        compiled = jax.jit(both if gradient else function)
        try:
            jax.block_until_ready(compiled(query, key, value, arrays))
        except (RuntimeError, ValueError, NotImplementedError) as error:  # cuDNN does not take the shape
            missing[name] = str(error).partition("\n")[0][:200]
        else:
            functions[name] = ft.partial(compiled, query, key, value, arrays)
    times = interleaved(functions, runs=runs, seconds=seconds)
    return {
        "case": case.text(), "pass": "fwd+bwd" if gradient else "fwd", "ms": {n: t * 1e3 for n, t in times.items()},
        "GB/s of keys and values": {n: (key.nbytes + value.nbytes) / t / 1e9 for n, t in times.items()},
        "missing": missing,
    }  # fmt: skip


def copy_rate() -> float:
    x = jnp.zeros((1 << 30,), jnp.bfloat16)
    copy = ft.partial(jax.jit(lambda x: x + 1), x)
    return 2 * x.nbytes / interleaved({"copy": copy}, runs=9, seconds=1)["copy"] / 1e9


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="REGEX", default="", help="cases in whose text it is found")
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=0.5, help="at most so long for a case, but 3 rounds")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE")
    options = parser.parse_args(arguments)
    if jax.default_backend() != "gpu":
        print(f"attention_masks.py needs a GPU; JAX sees {jax.devices()[0].device_kind} only", file=sys.stderr)
        return 2
    if reason := kernels_missing():
        print(f"attention_masks.py needs zenith's CUDA kernels: {reason}", file=sys.stderr)
        return 2
    here, console = machine(), Console(width=140, highlight=False)
    rate = copy_rate()
    console.print(f"zenith {zenith.__version__}, bfloat16: {here.text()}; copy {rate:.0f} GB/s")
    rows = []
    for case in cases():
        if re.search(options.only, case.text()) is None:
            continue
        for gradient in (False, True)[: 1 + case.gradient]:
            if case.gradient:
                row = measured(case, gradient, options.runs, options.seconds)
            else:
                row = decoded(case, options.runs, options.seconds)
            rows.append(row)
            text = "  ".join(f"{n} {t:8.3f} ms" for n, t in row["ms"].items())
            if not case.gradient:
                text += f"  zenith {row['GB/s of keys and values']['zenith'] / rate:.0%} of copy"
            console.print(f"{row['case']:44} {row['pass']:8} {text}  {row['missing'] or ''}", soft_wrap=True)
    if options.json is not None:
        content = {
            "what": "attention with masks, biases and caches under jax.jit, median", "zenith": zenith.__version__,
            "machine": dataclasses.asdict(here), "copy GB/s": rate, "cases": rows,
        }  # fmt: skip
        options.json.write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
