"""zenith.jit against jax.jit: medians of bursts of calls in turn in one process, and who computes what."""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import re
from collections.abc import Callable, Sequence

import jax
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

import zenith_jax as zenith
from zenith_jax import native
from zenith_jax.bench import memory
from zenith_jax.bench.cases import Case, cases
from zenith_jax.bench.machine import Machine, kernels_missing, machine
from zenith_jax.bench.timing import interleaved
from zenith_jax.config import configured

SLOWEST = 0.97  # of jax.jit's speed: anything rewritten that is slower is a bug of passes/choose/


@dataclasses.dataclass(frozen=True)
class Measurement:
    """Seconds of both, what was fused, which custom calls the compiled program holds, and why anything was refused."""

    case: Case
    jax_seconds: float
    zenith_seconds: float
    fused: dict[str, int]
    calls: tuple[str, ...]
    reasons: tuple[str, ...]

    @property
    def speed(self) -> float:
        return self.jax_seconds / self.zenith_seconds

    @property
    def is_too_slow(self) -> bool:
        return bool(self.calls) and self.speed < SLOWEST

    @property
    def rate(self) -> str:
        work = self.case.gradient_work if self.case.gradient else self.case.work
        return f"{work / self.zenith_seconds / 1e9:.0f} G{'FLOP' if self.case.unit == 'flop' else 'B'}/s"

    @property
    def by(self) -> str:
        """Who computes: the kernels by name, or XLA."""
        if not self.calls:
            return "XLA: no kernel was called" if self.fused else "XLA"
        return ", ".join(self.calls)

    def as_dict(self) -> dict[str, object]:
        return {
            "case": self.case.label,
            "jax_ms": self.jax_seconds * 1e3,
            "zenith_ms": self.zenith_seconds * 1e3,
            "speed": self.speed,
            "rate": self.rate,
            "fused": self.fused,
            "calls": self.calls,
            "reasons": self.reasons,
        }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = 'example: zenith bench --only "attention|norm". Exit codes: 0 done, 1 --check found a slower case'
    parser.add_argument("--only", metavar="PATTERN", default="", help="a regular expression: cases that it finds")
    parser.add_argument("--list", action="store_true", help="print the cases and stop")
    parser.add_argument("--runs", type=int, default=50, metavar="N", help="timed calls of each (default 50)")
    parser.add_argument("--seconds", type=float, default=8.0, help="at most so long for a case, but 3 calls")
    parser.add_argument("--json", metavar="FILE", type=pathlib.Path, help="write the figures to FILE too")
    parser.add_argument("--markdown", action="store_true", help="print the table as docs/performance.md has it")
    parser.add_argument(
        "--check",
        action="store_true",
        help=f"exit code 1 if a rewritten case is slower than {SLOWEST} x jax.jit, also in a second try",
    )
    parser.add_argument(
        "--always", action="store_true", help="use kernels also where passes/choose/ would leave the case to XLA"
    )
    parser.add_argument("--memory", action="store_true", help="measure the peak memory of CPU attention instead")


def main(arguments: argparse.Namespace, console: Console | None = None) -> int:
    """Measures, prints, returns the exit code."""
    console = console or Console()
    platform = native.default_platform()
    chosen = [c for c in cases(platform) if re.search(arguments.only, c.label)]
    if arguments.list:
        console.print("\n".join(c.label for c in chosen), highlight=False)
        return 0
    here = machine()
    console.print(f"zenith {zenith.__version__}: {escape(here.text())}")
    if reason := kernels_missing():
        console.print(f"[red]zenith's kernels cannot run here[/]: {escape(reason)}", soft_wrap=True)
    if arguments.memory:
        figures = memory.growths()
        console.print(memory.table(figures))
        _write(arguments.json, here, memory=[dataclasses.asdict(f) for f in figures])
        return 0
    if not chosen:
        console.print(f"[red]no case matches {arguments.only!r}; --list shows them[/]")
        return 2
    with configured(use_cost=not arguments.always):
        found = measured(chosen, runs=arguments.runs, seconds=arguments.seconds, retry=arguments.check, console=console)
    if arguments.markdown:
        print(markdown(found))
    else:
        console.print(table(found))
    _write(arguments.json, here, cases=[m.as_dict() for m in found])
    slow = [m for m in found if m.is_too_slow]
    for m in slow:
        console.print(f"[red]slower than {SLOWEST} x jax.jit[/]: {m.case.label}, {m.speed:.2f} x")
    return 1 if slow and arguments.check else 0


def measured(
    chosen: Sequence[Case], *, runs: int, seconds: float, retry: bool = False, console: Console | None = None
) -> list[Measurement]:
    """One Measurement a case. retry: what comes out too slow is measured again for twice as long, and that counts."""
    found = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=console or Console(), transient=True) as progress:
        task = progress.add_task("", total=runs * len(chosen))
        step = lambda: progress.advance(task)  # noqa: E731
        for case in chosen:
            progress.update(task, description=case.label)
            found.append(measure(case, runs=runs, seconds=seconds, step=step))
        for i, m in enumerate(found):
            if retry and m.is_too_slow:
                progress.update(task, description=f"again: {m.case.label}")
                found[i] = measure(m.case, runs=2 * runs, seconds=2 * seconds)
    return found


def measure(case: Case, *, runs: int, seconds: float, step: Callable[[], None] = lambda: None) -> Measurement:
    program, arguments = case.program()
    report = zenith.explain(program)(*arguments)
    functions = {"jax.jit": jax.jit(program), "zenith.jit": zenith.jit(program)}
    calls = re.findall(r"@zenith_(\w+?)_v\d+", functions["zenith.jit"].lower(*arguments).as_text())
    # Called as users do, by JAX's C++ path: calling a compiled object takes 0.1 ms of Python.
    times = interleaved(
        {name: lambda f=f: f(*arguments) for name, f in functions.items()}, runs=runs, seconds=seconds, step=step
    )
    return Measurement(
        case,
        times["jax.jit"],
        times["zenith.jit"],
        report.counts(),
        tuple(dict.fromkeys(calls)),
        tuple(dict.fromkeys(s.reason for s in report.refused)),
    )


def table(found: Sequence[Measurement]) -> Table:
    shown = Table(title="medians; work at the least that the function needs", title_justify="left")
    for column in ("case", "jax.jit", "zenith.jit", "speed", "rate", "fused", "computed by"):
        shown.add_column(column, justify="left" if column in ("case", "fused", "computed by") else "right")
    for m in found:
        colour = "red" if m.is_too_slow else "green" if m.calls else "dim"
        more = [f"and {len(m.reasons) - 2} more reasons"] if len(m.reasons) > 2 else []
        by = m.by if not m.reasons else f"{m.by} ({'; '.join([*m.reasons[:2], *more])})"
        shown.add_row(
            m.case.label,
            f"{m.jax_seconds * 1e3:.3f} ms",
            f"{m.zenith_seconds * 1e3:.3f} ms",
            f"[{colour}]{m.speed:.2f} x[/]",
            m.rate,
            " ".join(f"{n} {op}" for op, n in m.fused.items()),
            escape(by),
        )
    return shown


def markdown(found: Sequence[Measurement]) -> str:
    """The table without refusals, as Markdown."""
    lines = [
        "| case | jax.jit, ms | zenith.jit, ms | speed | rate | computed by |",
        "| --- " + "| ---: " * 4 + "| --- |",
    ]
    for m in found:
        times = f"{m.jax_seconds * 1e3:.3g} | {m.zenith_seconds * 1e3:.3g} | {m.speed:.2f} x | {m.rate}"
        lines.append(f"| {m.case.label} | {times} | {m.by} |")
    return "\n".join(lines)


def _write(path: pathlib.Path | None, here: Machine, **figures: object) -> None:
    if path is not None:
        content = {"zenith": zenith.__version__, "machine": dataclasses.asdict(here), **figures}
        path.write_text(json.dumps(content, indent=1) + "\n")
