"""Every benchmark of this folder, one after the other, in less than nine minutes of one H100.

    python benchmarks/h100/run.py --results benchmarks/h100/results
    python benchmarks/h100/run.py --only attention

Each is a process of its own with its own limit, so that none sees another's memory or compiled programs; its figures go
to RESULTS/NAME.json, what it prints to RESULTS/NAME.log. Exit code 1 where one failed or took too long.
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


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """seconds: its limit. Together they stay below 540."""

    script: str
    seconds: int
    arguments: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return pathlib.Path(self.script).stem


BENCHMARKS = (
    Benchmark("attention.py", 110, ("--runs", "5", "--seconds", "0.2")),
    Benchmark("attention_masks.py", 60, ("--runs", "5", "--seconds", "0.2")),
    Benchmark("attention_crossover.py", 50),
    Benchmark("rows.py", 60, ("--seconds", "0.1")),
    Benchmark("linear.py", 50, ("--shapes", "1", "--chain", "gelu_erf")),
    Benchmark("linear_cross_entropy.py", 45),
    Benchmark("quantized_linear.py", 40, ("--runs", "5", "--rows", "1", "16")),
    Benchmark("against_a_copy.py", 29),
    Benchmark("gpt2_train_step.py", 95, ("--runs", "12")),
)


def outcome(benchmark: Benchmark, results: pathlib.Path) -> str:
    """ "ok", or what went wrong."""
    command = [sys.executable, str(HERE / benchmark.script), *benchmark.arguments]
    command += ["--json", str(results / f"{benchmark.name}.json")]
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    with open(results / f"{benchmark.name}.log", "w") as log:
        try:
            done = subprocess.run(
                command, stdout=log, stderr=subprocess.STDOUT, timeout=benchmark.seconds, check=False,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return f"stopped after {benchmark.seconds} s"
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
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("", total=len(chosen))
        for benchmark in chosen:
            progress.update(task, description=benchmark.name)
            start = time.monotonic()
            result = outcome(benchmark, options.results)
            table.add_row(benchmark.name, f"{time.monotonic() - start:.0f}", result)
            failed |= result != "ok"
            progress.advance(task)
    console.print(table)
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
