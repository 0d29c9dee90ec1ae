"""Stock models, jax.jit, zenith.jit and torch.compile in one run.

    python benchmarks/h100/whole_models.py --json FILE     # on a GPU; needs flax, optax and, for its rows, torch
    python benchmarks/h100/whole_models.py --only bert --profile
    python benchmarks/h100/whole_models.py --tiny          # anywhere, to see that it runs

GPT-2 124M: value and gradients of a step of 8 x 1024 tokens, bfloat16. BERT-base: forward pass of 32 x 512 tokens,
float16. In torch: the same layers, one product for query, key and value, `scaled_dot_product_attention`, compiled in
mode "default". Median times, contenders in turn: of a call among as many as take 0.1 s, of which the last is waited
for, as in a loop of training; and of one call, waited for, in which the host's part stands as well. --profile: what
zenith.jit's kernels take.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import functools as ft
import glob
import json
import os
import pathlib
import re
import sys
import tempfile
from collections.abc import Callable
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch allocates beside JAX

import jax
import jax.numpy as jnp
from flax import nnx
from gpt2_train_step import JITS, gpt2, token_ids, training_step
from rich.console import Console
from rich.table import Table

import zenith_jax as zenith
from zenith_jax.bench.machine import machine
from zenith_jax.bench.timing import interleaved


@dataclasses.dataclass(frozen=True)
class Case:
    """function(*arguments) in JAX; torch: makes a function without arguments."""

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    torch: Callable[[], Callable[[], Any]]


# --- GPT-2 124M, a training step --------------------------------------------------------------------------------------


def gpt2_step(tiny: bool) -> Case:
    config = dataclasses.replace(gpt2.TINY, dtype=jnp.bfloat16) if tiny else gpt2.SMALL
    step, state = training_step(config)
    ids = token_ids(config, batch=8)

    def torch_step() -> Callable[[], Any]:
        import torch

        model = TorchTransformer(config, causal=True).cuda().bfloat16()
        tokens = torch.randint(0, config.vocabulary, (8, config.length + 1), device="cuda")
        parameters = list(model.parameters())

        @torch.compile
        def loss(ids: Any) -> Any:
            logits = model(ids[:, :-1]) @ model.tokens.weight.T
            return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())

        return lambda: torch.autograd.grad(loss(tokens), parameters)

    return Case(f"GPT-2 training step, b8 s{config.length} bfloat16", step, (state, ids), torch_step)


# --- BERT-base, inference ---------------------------------------------------------------------------------------------


class BertLayer(nnx.Module):
    def __init__(self, config: gpt2.Config, rngs: nnx.Rngs) -> None:
        d = config.features
        dtypes: dict[str, Any] = dict(dtype=config.dtype, param_dtype=config.dtype)
        self.attention = nnx.MultiHeadAttention(config.heads, d, decode=False, **dtypes, rngs=rngs)
        self.attention_norm = nnx.LayerNorm(d, epsilon=1e-12, **dtypes, rngs=rngs)
        self.up, self.down = nnx.Linear(d, 4 * d, **dtypes, rngs=rngs), nnx.Linear(4 * d, d, **dtypes, rngs=rngs)
        self.norm = nnx.LayerNorm(d, epsilon=1e-12, **dtypes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.attention_norm(x + self.attention(x))
        return self.norm(x + self.down(jax.nn.gelu(self.up(x), approximate=False)))


class Bert(nnx.Module):
    def __init__(self, config: gpt2.Config, rngs: nnx.Rngs) -> None:
        dtypes: dict[str, Any] = dict(dtype=config.dtype, param_dtype=config.dtype)
        self.tokens = nnx.Embed(config.vocabulary, config.features, **dtypes, rngs=rngs)
        self.positions = nnx.Embed(config.length, config.features, **dtypes, rngs=rngs)
        self.norm = nnx.LayerNorm(config.features, epsilon=1e-12, **dtypes, rngs=rngs)
        self.layers = nnx.List([BertLayer(config, rngs) for _ in range(config.layers)])

    def __call__(self, ids: jax.Array) -> jax.Array:
        x = self.norm(self.tokens(ids) + self.positions(jnp.arange(ids.shape[1])))
        for layer in self.layers:
            x = layer(x)
        return x


def bert_forward(tiny: bool) -> Case:
    # A CPU has no float16 products with sums in float32, which jax.nn asks for.
    config = gpt2.TINY if tiny else gpt2.Config(vocabulary=30522, length=512, dtype=jnp.float16)
    graph, state = nnx.split(Bert(config, nnx.Rngs(0)))
    batch = 2 if tiny else 32
    ids = jax.random.randint(jax.random.key(0), (batch, config.length), 0, config.vocabulary)

    def torch_forward() -> Callable[[], Any]:
        import torch

        model = torch.compile(TorchTransformer(config, causal=False).cuda().half().eval())
        tokens = torch.randint(0, config.vocabulary, (batch, config.length), device="cuda")

        @torch.inference_mode()
        def forward() -> Any:
            return model(tokens)

        return forward

    name = f"BERT-base, b{batch} s{config.length} {jnp.dtype(config.dtype).name}"
    return Case(name, lambda state, ids: nnx.merge(graph, state)(ids), (state, ids), torch_forward)


# --- both in torch ----------------------------------------------------------------------------------------------------


def TorchTransformer(config: gpt2.Config, causal: bool) -> Any:  # a class, once torch is there
    """GPT-2's decoder, norms before, or BERT's encoder, norms behind."""
    import torch
    from torch import nn

    d = config.features

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention_norm, self.norm = nn.LayerNorm(d), nn.LayerNorm(d)
            self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
            self.up, self.down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

        def attention(self, x: Any) -> Any:
            q, k, v = self.qkv(x).unflatten(-1, (3, config.heads, -1)).permute(2, 0, 3, 1, 4)
            attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
            return self.out(attended.transpose(1, 2).flatten(2))

        def mlp(self, x: Any) -> Any:
            return self.down(nn.functional.gelu(self.up(x)))

        def forward(self, x: Any) -> Any:
            if causal:
                x = x + self.attention(self.attention_norm(x))
                return x + self.mlp(self.norm(x))
            x = self.attention_norm(x + self.attention(x))
            return self.norm(x + self.mlp(x))

    class Transformer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens = nn.Embedding(config.vocabulary, d)
            self.positions = nn.Embedding(config.length, d)
            self.layers = nn.ModuleList([Layer() for _ in range(config.layers)])
            self.norm = nn.LayerNorm(d)

        def forward(self, ids: Any) -> Any:
            x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
            x = x if causal else self.norm(x)
            for layer in self.layers:
                x = layer(x)
            return self.norm(x) if causal else x

    return Transformer()


# --- measuring --------------------------------------------------------------------------------------------------------


class TorchResult:
    """What jax.block_until_ready waits for as it does for JAX's arrays."""

    def __init__(self, result: Any) -> None:
        self.result = result

    def block_until_ready(self) -> TorchResult:
        import torch

        torch.cuda.synchronize()
        return self


def torch_call(case: Case) -> Callable[[], TorchResult]:
    function = case.torch()
    for _ in range(3):
        function()
    return lambda: TorchResult(function())


def measured(case: Case, runs: int, seconds: float) -> dict[str, Any]:
    functions = {n: ft.partial(jit(case.function), *case.arguments) for n, jit in JITS.items()}
    missing = {}
    try:
        functions["torch.compile"] = torch_call(case)
    except (ImportError, AssertionError, RuntimeError) as error:  # no torch, or none for this GPU
        missing["torch.compile"] = str(error).partition("\n")[0]
    queued = interleaved(functions, runs=runs, seconds=seconds, queued=True, queued_seconds=0.1)
    waited = interleaved(functions, runs=runs, seconds=seconds, queued=False)
    report = zenith.explain(case.function)(*case.arguments)
    return {
        "case": case.name, "ms": {n: t * 1e3 for n, t in queued.items()},
        "ms_waited": {n: t * 1e3 for n, t in waited.items()}, "missing": missing, "fused": report.counts(),
        "left_to_xla": dict(collections.Counter(f"{s.op}: {s.reason}" for s in report.refused)),
    }  # fmt: skip


KINDS = {  # by the kernel's name; the first that it holds
    "zenith attention": "attention",
    "zenith norms": "norm|row",
    "zenith linear": "hopper_linear|linear_kernel",
    "products": "gemm|nvjet|cutlass|cublas|xmma|splitK",
    "copies": "memcpy|memset|transpose|copy",
    "XLA's sums": "reduce",
}


def profiled(case: Case, calls: int = 5) -> list[tuple[str, float, float]]:
    """(kernel, us and launches of one call) of zenith.jit, the longest first."""
    function = ft.partial(zenith.jit(case.function), *case.arguments)
    jax.block_until_ready(function())
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(calls):
                jax.block_until_ready(function())
        (path,) = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
        data = jax.profiler.ProfileData.from_file(path)
        time, count = collections.Counter[str](), collections.Counter[str]()
        for plane in data.planes:
            if not plane.name.startswith("/device:GPU"):
                continue
            for line in plane.lines:
                if "Stream" in line.name:
                    for event in line.events:
                        name = re.sub(r"_\d+(?=$|_)", "", event.name)
                        time[name] += event.duration_ns / 1e3 / calls
                        count[name] += 1 / calls
    return [(name, us, count[name]) for name, us in time.most_common()]


def print_profile(case: Case, console: Console) -> None:
    kernels = profiled(case)
    kinds = collections.Counter[str]()
    for name, us, _ in kernels:
        kinds[next((k for k, words in KINDS.items() if re.search(words, name)), "XLA's loops")] += us
    total = sum(kinds.values())
    console.print(
        f"{case.name}: {total:.0f} us in kernels: " + ", ".join(f"{k} {t:.0f}" for k, t in kinds.most_common())
    )
    for name, us, launches in kernels[:40]:
        console.print(f"{us:9.0f} us {launches:6.1f} x  {name[:130]}", highlight=False)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="2 layers of 128 features")
    parser.add_argument("--only", metavar="WORD", default="", help="models whose name contains it")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE")
    options = parser.parse_args(arguments)
    console, here = Console(), machine()
    console.print(f"zenith {zenith.__version__}: {here.text()}", highlight=False)
    rows = []
    for make in (bert_forward, gpt2_step):
        case = make(options.tiny)
        if options.only.lower() not in case.name.lower():
            continue
        rows.append(measured(case, options.runs, options.seconds))
        if options.profile:
            print_profile(case, console)
    table = Table("model", "ms", "jax.jit", "zenith.jit", "torch.compile", "against jax.jit", "against torch.compile")
    for row in rows:
        for how, ms in (("queued", row["ms"]), ("waited for", row["ms_waited"])):
            torch_ms = ms.get("torch.compile")
            table.add_row(
                row["case"], how, f"{ms['jax.jit']:.2f}", f"{ms['zenith.jit']:.2f}",
                f"{torch_ms:.2f}" if torch_ms else "-", f"{ms['jax.jit'] / ms['zenith.jit']:.2f} x",
                f"{torch_ms / ms['zenith.jit']:.2f} x" if torch_ms else "-",
            )  # fmt: skip
        console.print(f"{row['case']}: fused {row['fused']}; left to XLA: {row['left_to_xla']}", highlight=False)
        for name, why in row["missing"].items():
            console.print(f"{name}: {why}", highlight=False)
    console.print(table)
    if options.json is not None:
        what = "a call, median: of calls queued, and of one waited for"
        content = {"what": what, "machine": dataclasses.asdict(here), "models": rows}
        options.json.write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
