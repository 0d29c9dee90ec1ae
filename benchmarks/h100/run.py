"""Every benchmark of this folder, one after the other, in less than nine minutes of one H100.

    python benchmarks/h100/run.py --results benchmarks/h100/results
    python benchmarks/h100/run.py --only attention

Each is a process of its own, so that none sees another's memory or compiled programs; its figures go to
RESULTS/NAME.json, what it prints to RESULTS/NAME.log. Most of the time is compilation. None has more than its limit,
nor more than what those before it left of the whole: the last ones live on what others do not use. Exit code 1 where
one failed or was stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import pathlib
import subprocess
import sys
import time

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]


WHOLE_SECONDS = 535


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """seconds: its limit."""

    script: str
    seconds: int
    arguments: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return pathlib.Path(self.script).stem


BENCHMARKS = (
    Benchmark("attention.py", 70, ("--runs", "5", "--seconds", "0.2")),
    Benchmark("attention_masks.py", 55, ("--runs", "5", "--seconds", "0.2")),
    Benchmark("rows.py", 55, ("--seconds", "0.1")),
    Benchmark("linear.py", 60, ("--shapes", "1", "--chain", "--runs", "5")),
    Benchmark("linear_cross_entropy.py", 75, ("--runs", "5", "--seconds", "0.1")),
    Benchmark("quantized_linear.py", 40, ("--runs", "5", "--rows", "1", "16")),
    Benchmark("against_a_copy.py", 35),
    Benchmark("paged_attention.py", 35, ("--runs", "5", "--seconds", "0.2", "--only", "page 16")),
    Benchmark("whole_models.py", 120, ("--runs", "8", "--seconds", "2")),
    Benchmark("gpt2_train_step.py", 110, ("--runs", "8")),
    Benchmark("attention_crossover.py", 90, ("--shapes", "2", "--dtype", "bfloat16", "--seconds", "0.1")),
)


def outcome(benchmark: Benchmark, seconds: float, results: pathlib.Path) -> str:
    """ "ok", or what went wrong. seconds: what is left for it."""
    limit = min(benchmark.seconds, seconds)
    if limit <= 0:
        return "not run: no time was left"
    command = [sys.executable, str(HERE / benchmark.script), *benchmark.arguments]
    command += ["--json", str(results / f"{benchmark.name}.json")]
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    with open(results / f"{benchmark.name}.log", "w") as log:
        try:
            done = subprocess.run(
                command, stdout=log, stderr=subprocess.STDOUT, timeout=limit, check=False,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return f"stopped after {limit:.0f} s"
    return "ok" if done.returncode == 0 else f"exit code {done.returncode}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=pathlib.Path, default=HERE / "results", metavar="FOLDER")
    parser.add_argument("--only", metavar="WORD", default="", help="benchmarks whose name contains it")
    options = parser.parse_args()
    options.results.mkdir(parents=True, exist_ok=True)
    chosen = [b for b in BENCHMARKS if options.only in b.name]
    if not chosen:
        parser.error(f"no benchmark has {options.only!r} in its name: {', '.join(b.name for b in BENCHMARKS)}")
    console = Console()
    table = Table("benchmark", "s", "outcome")
    failed = False
    end = time.monotonic() + WHOLE_SECONDS
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("", total=len(chosen))
        for benchmark in chosen:
            progress.update(task, description=benchmark.name)
            start = time.monotonic()
            result = outcome(benchmark, end - start, options.results)
            table.add_row(benchmark.name, f"{time.monotonic() - start:.0f}", result)
            failed |= result != "ok"
            progress.advance(task)
    console.print(table)
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
