"""Memory-bound work on a GPU, under jax.jit and by zenith.ops, against the speed of a copy: what rules in
zenith_jax/passes/choose/ and lines of docs/matching.md say of gated activations, rotations, group norm, and batch
norm after a convolution.

    python benchmarks/h100/against_a_copy.py --json FILE [--only "group norm"]

bfloat16. A fraction of 1 is a copy's bandwidth, counting each argument and result once.
"""

from __future__ import annotations

import argparse
import functools as ft
import json
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import zenith_jax as zenith
from zenith_jax.bench.timing import interleaved

Functions = dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)


def gradient(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda dy, *xs: jax.vjp(function, *xs)[1](dy)


def gated(n: int, d: int, name: str) -> dict[str, Functions]:
    act = {"silu": jax.nn.silu, "gelu_tanh": jax.nn.gelu, "gelu_erf": ft.partial(jax.nn.gelu, approximate=False)}[name]
    gate, value, dy, both = normal(n, d), normal(n, d, seed=1), normal(n, d, seed=2), normal(n, 2 * d, seed=3)
    two = {"XLA": lambda a, b: act(a) * b, "zenith": ft.partial(zenith.ops.gated_activation, activation=name)}
    halves = {
        "XLA": lambda x: two["XLA"](*jnp.split(x, 2, axis=-1)),
        "zenith": ft.partial(zenith.ops.gated_activation_of_halves, activation=name),
    }
    label = f"gated {name} {n}x{d}"
    return {
        label: {k: (f, (gate, value)) for k, f in two.items()},
        f"{label} gradient": {k: (gradient(f), (dy, gate, value)) for k, f in two.items()},
        f"{label} of halves": {k: (f, (both,)) for k, f in halves.items()},
        f"{label} of halves gradient": {k: (gradient(f), (dy, both)) for k, f in halves.items()},
    }


def rotation(b: int, t: int, heads: tuple[int, int], d: int, *, pairs: bool) -> dict[str, Functions]:
    angle = jnp.arange(t)[:, None, None] * 1e4 ** (-jnp.arange(d // 2) / (d / 2))
    cos, sin = jnp.cos(angle), jnp.sin(angle)

    def rotated(x: Any) -> Any:
        first, second = (x[..., ::2], x[..., 1::2]) if pairs else jnp.split(x, 2, axis=-1)
        parts = first * cos - second * sin, second * cos + first * sin
        y = jnp.stack(parts, -1).reshape(x.shape) if pairs else jnp.concatenate(parts, -1)
        return y.astype(x.dtype)

    both = lambda q, k: (rotated(q), rotated(k))  # noqa: E731
    q, k = (normal(b, t, h, d, seed=h) for h in heads)
    label = f"rotation of {'pairs' if pairs else 'halves'} b{b} t{t} h{heads[0]}+{heads[1]} d{d}"
    backward = lambda dy: gradient(both)(dy, q, k)  # noqa: E731  which reads neither q nor k
    ours = lambda q, k: tuple(zenith.ops.rope(x, cos, sin, interleaved=pairs) for x in (q, k))  # noqa: E731
    return {
        label: {"zenith": (ours, (q, k)), "XLA": (both, (q, k))},
        f"{label} gradient": {
            "zenith": (lambda dy: gradient(ours)(dy, q, k), ((q, k),)),
            "XLA": (backward, ((q, k),)),
        },
    }


def group_norm(*shape: int, groups: int = 32, silu: bool = False, dtype: Any = jnp.bfloat16) -> dict[str, Functions]:
    """As Flax writes it."""

    def function(x: Any, scale: Any, bias: Any) -> Any:
        wide = x.astype(jnp.float32)
        grouped = wide.reshape(*shape[:-1], groups, -1)
        mean, square = (y.mean((1, 2, 4)) for y in (grouped, grouped * grouped))
        variance = jnp.maximum(0.0, square - mean * mean)
        mean, variance = (jnp.repeat(v, shape[-1] // groups, -1)[:, None, None] for v in (mean, variance))
        y = ((wide - mean) * (jax.lax.rsqrt(variance + 1e-6) * scale) + bias).astype(x.dtype)
        return jax.nn.silu(y) if silu else y

    fused = ft.partial(zenith.ops.group_norm, groups=groups, eps=1e-6, activation="silu" if silu else None)
    x, scale, bias = normal(*shape).astype(dtype), jnp.ones(shape[-1]), jnp.zeros(shape[-1])
    label = f"group norm{', silu' if silu else ''} {'x'.join(map(str, shape))} {jnp.dtype(dtype).name}"
    both = {"XLA": function, "zenith": fused}
    return {
        label: {k: (f, (x, scale, bias)) for k, f in both.items()},
        f"{label} gradient": {k: (gradient(f), (x, x, scale, bias)) for k, f in both.items()},
    }


def batch_norm(n: int, size: int, channels: tuple[int, int], kernel: int) -> dict[str, Functions]:
    x, w = normal(n, size, size, channels[0]), normal(kernel, kernel, *channels, seed=1)
    mean, variance, scale, bias = (jnp.abs(normal(channels[1], seed=i)).astype(jnp.float32) for i in range(4))

    def function(x: Any, w: Any) -> Any:
        y = jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return jax.nn.relu(((y - mean) * (jax.lax.rsqrt(variance + 1e-5) * scale) + bias).astype(x.dtype))

    label = f"convolution, batch norm, relu {n}x{size}x{size} {channels[0]} to {channels[1]} by {kernel}x{kernel}"
    return {label: {"XLA": (function, (x, w)), "zenith": (zenith.fuse(function), (x, w))}}


def cases() -> dict[str, Functions]:
    found: dict[str, Functions] = {}
    for name in ("silu", "gelu_tanh", "gelu_erf"):
        found |= gated(16384, 3072, name)
    for pairs in (False, True):
        found |= rotation(4, 4096, (32, 8), 128, pairs=pairs)
    for shape in ((8, 64, 64, 320), (8, 32, 32, 640), (16, 128, 128, 128), (1, 64, 64, 320), (8, 16, 16, 1280)):
        found |= group_norm(*shape)
    found |= group_norm(8, 64, 64, 320, silu=True)
    found |= group_norm(8, 64, 64, 320, dtype=jnp.float32)
    for channels, size, kernel in (((64, 256), 56, 1), ((64, 64), 56, 3), ((256, 256), 14, 3)):
        found |= batch_norm(32, size, channels, kernel)
    return found


def size_bytes(*trees: Any) -> int:
    return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(trees))


def seconds(functions: Functions) -> dict[str, float]:
    compiled = {k: ft.partial(jax.jit(f), *args) for k, (f, args) in functions.items()}
    return interleaved(compiled, runs=15, seconds=1.0)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name holds this")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE")
    options = parser.parse_args(arguments)
    if jax.default_backend() != "gpu":
        print(f"against_a_copy.py needs a GPU; JAX sees {jax.devices()[0].device_kind} only", file=sys.stderr)
        return 2
    x = normal(1 << 27)
    copy = 2 * size_bytes(x) / seconds({"copy": (lambda x: x * jnp.bfloat16(2), (x,))})["copy"]
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}: a copy runs at {copy / 1e12:.2f} TB/s")
    rows = {}
    for label, functions in cases().items():
        if options.only not in label:
            continue
        times = seconds(functions)
        function, args = functions["XLA"]
        moved = size_bytes(args, jax.eval_shape(function, *args))
        rows[label] = {k: dict(us=s * 1e6, of_copy=moved / s / copy) for k, s in times.items()}
        print(f"{label}: " + ", ".join(f"{k} {r['us']:.1f} us, {r['of_copy']:.2f}" for k, r in rows[label].items()))
    if options.json is not None:
        options.json.write_text(json.dumps(dict(copy_bytes_per_second=copy, cases=rows), indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
