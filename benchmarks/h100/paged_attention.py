"""A decoding step from a paged cache on a GPU: zenith's kernel against gathering the pages, and against JAX's Pallas
kernel.

    python benchmarks/h100/paged_attention.py --json FILE

The pages of all sequences are a random permutation of the pool. Several caches in a program, one after the other, as in
attention_masks.py; contenders take turns in one process, medians, random data. Bytes are those of the keys and values
that the sequences' lengths ask for; "copy" is x + 1 over 2 GiB, read and written, in the same run.

  zenith           zenith.ops.paged_attention
  zenith.fuse      key_pages[block_tables] and jax.nn.dot_product_attention, rewritten
  XLA, cuDNN       the same without zenith, by jax.nn's two implementations
  Pallas           jax.experimental.pallas.ops.gpu.paged_attention, 128 keys at a time, the best of 16 and 64 splits
  without pages    zenith.ops.attention of a cache in one piece
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
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from attention_masks import copy_rate, in_turn
from rich.console import Console

import zenith_jax as zenith
from zenith_jax.bench.machine import kernels_missing, machine
from zenith_jax.bench.timing import interleaved

CACHES_BYTES = 1_200_000_000  # of all caches of one program
HEADS, KV_HEADS, FEATURES = 32, 8, 128
PALLAS_KEYS, PALLAS_SPLITS = 128, (16, 64)


@dataclasses.dataclass(frozen=True)
class Case:
    """b sequences of up to s keys, t queries each. ragged: of a quarter to all of the length."""

    b: int
    s: int
    page: int
    t: int = 1
    ragged: bool = False
    all_contenders: bool = False

    def text(self) -> str:
        return f"b{self.b} t{self.t} s{self.s} page {self.page}" + (" ragged" if self.ragged else "")

    def lengths(self) -> np.ndarray:
        first = self.s // 4 if self.ragged else self.s
        return np.linspace(first, self.s, self.b).astype(np.int32)


CASES = [
    Case(1, 131072, 16, all_contenders=True),
    Case(1, 131072, 64),
    Case(1, 131072, 256),
    Case(1, 16384, 16, all_contenders=True),
    Case(1, 16384, 64),
    Case(1, 16384, 256),
    Case(64, 8192, 16, all_contenders=True),
    Case(64, 8192, 64),
    Case(64, 8192, 256),
    Case(64, 8192, 16, ragged=True, all_contenders=True),
    Case(8, 32768, 16, t=4),
]


def gathered(query: Any, key: Any, value: Any, tables: Any, lengths: Any, *, implementation: str | None) -> Any:
    """What a user writes: the last t tokens of each sequence."""
    b, t = query.shape[:2]
    key, value = (x[tables].reshape(b, -1, *x.shape[2:]) for x in (key, value))
    if t == 1:
        return jax.nn.dot_product_attention(
            query, key, value, key_value_seq_lengths=lengths, implementation=implementation
        )
    position = lengths[:, None] - t + jnp.arange(t)
    mask = jnp.arange(key.shape[1]) <= position[..., None]
    return jax.nn.dot_product_attention(query, key, value, mask=mask[:, None], implementation=implementation)


def pallas(query: Any, key: Any, value: Any, tables: Any, lengths: Any, *, splits: int) -> Any:
    from jax.experimental.pallas.ops.gpu.paged_attention import paged_attention

    together = max(1, PALLAS_KEYS // key.shape[2])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return paged_attention(
            query[:, 0] * FEATURES**-0.5,
            key,
            value,
            tables,
            lengths,
            pages_per_compute_block=together,
            k_splits=splits,
        )[:, None]


def measured(case: Case, runs: int, seconds: float) -> dict:
    made = jax.jit(lambda key, shape: jax.random.normal(key, shape, jnp.bfloat16), static_argnums=1)
    entries = case.s // case.page
    query = made(jax.random.key(0), (case.b, case.t, HEADS, FEATURES))
    shape = (case.b * entries, case.page, KV_HEADS, FEATURES)
    copies = max(1, CACHES_BYTES // (2 * 2 * math.prod(shape)))
    caches = [[made(jax.random.key(2 * i + j), shape) for j in (0, 1)] for i in range(copies)]
    order = np.random.default_rng(1).permutation(case.b * entries).reshape(case.b, entries)
    tables, lengths = jnp.asarray(order, jnp.int32), jnp.asarray(case.lengths())
    rows = (case.b, case.s, KV_HEADS, FEATURES)

    def transposed() -> list:
        return [[jnp.moveaxis(x, 2, 0) for x in cache] for cache in caches]

    def whole() -> list:
        return [[x.reshape(rows) for x in cache] for cache in caches]

    def last(query: Any, key: Any, value: Any, tables: Any, lengths: Any) -> Any:
        del tables
        return zenith.ops.attention(query, key, value, key_lengths=lengths)

    xla = ft.partial(gathered, implementation="xla")
    contenders: dict[str, tuple[Callable, Callable[[], list]]] = {
        "zenith": (zenith.ops.paged_attention, lambda: caches),
        "without pages": (last, whole),
    }
    if case.t > 1:
        del contenders["without pages"]
    if case.all_contenders or case.t > 1:
        contenders["zenith.fuse"] = zenith.fuse(xla), lambda: caches
        contenders["XLA"] = xla, lambda: caches
        contenders["cuDNN"] = ft.partial(gathered, implementation="cudnn"), lambda: caches
    if case.t == 1:
        contenders |= {f"Pallas {n}": (ft.partial(pallas, splits=n), transposed) for n in PALLAS_SPLITS}
    functions, missing, wrong = {}, {}, {}
    expected = None
    for name, (function, arrays) in contenders.items():
        program = jax.jit(lambda q, caches, *rest, f=function: in_turn(lambda *a: f(*a, *rest), q, caches))
        call = ft.partial(program, query, arrays(), tables, lengths)
        try:
            out = np.asarray(call()[0], np.float32)
        except Exception as error:
            missing[name] = str(error).partition("\n")[0][:160]
            continue
        if name == "zenith":
            expected = out
        elif name != "without pages":
            wrong[name] = float(np.abs(out - expected).max())
        functions[name] = call
    times = interleaved(functions, runs=runs, seconds=seconds)
    used = 2 * 2 * int(case.lengths().sum()) * KV_HEADS * FEATURES
    splits = [n for n in times if n.startswith("Pallas")]
    if splits:
        best = min(splits, key=lambda n: times[n])
        times = {n: t for n, t in times.items() if n not in splits} | {"Pallas": times[best]}
    return {
        "case": case.text(), "us": {n: t / copies * 1e6 for n, t in times.items()},
        "GB/s": {n: copies * used / t / 1e9 for n, t in times.items()},
        "largest difference from zenith": wrong, "missing": missing,
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="REGEX", default="", help="cases in whose text it is found")
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=0.5, help="at most so long for a case, but 3 rounds")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE")
    options = parser.parse_args(arguments)
    if jax.default_backend() != "gpu":
        print(f"paged_attention.py needs a GPU; JAX sees {jax.devices()[0].device_kind} only", file=sys.stderr)
        return 2
    if reason := kernels_missing():
        print(f"paged_attention.py needs zenith's CUDA kernels: {reason}", file=sys.stderr)
        return 2
    here, console = machine(), Console(width=150, highlight=False)
    rate = copy_rate()
    console.print(
        f"zenith {zenith.__version__}, bfloat16 h{HEADS}/{KV_HEADS} d{FEATURES}: {here.text()}; copy {rate:.0f} GB/s"
    )
    rows = []
    for case in CASES:
        if re.search(options.only, case.text()) is None:
            continue
        row = measured(case, options.runs, options.seconds)
        rows.append(row)
        text = "  ".join(f"{n} {t:.1f}" for n, t in row["us"].items())
        share = row["GB/s"]["zenith"] / rate
        console.print(f"{row['case']:28} us: {text}; {share:.0%} of copy", soft_wrap=True)
        console.print(f"    {row['largest difference from zenith']} {row['missing'] or ''}", soft_wrap=True)
        if options.json is not None:
            content = {
                "what": "attention over a paged cache under jax.jit, median", "zenith": zenith.__version__,
                "machine": dataclasses.asdict(here), "copy GB/s": rate, "cases": rows,
            }  # fmt: skip
            options.json.write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
