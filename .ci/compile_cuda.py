"""Compiles what the CUDA module is made of with the machine's nvcc; nothing is linked or run.

    python .ci/compile_cuda.py BUILD_DIRECTORY [--minutes 10] [--jobs 2]

BUILD_DIRECTORY is configured (ZENITH_CUDA=ON); its compile_commands.json says what to run, so the flags are the
build's own. What changed last is compiled first. At the time limit it stops and names what it did not get to, which
is no failure; a file that does not compile is.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools as ft
import json
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("build", type=pathlib.Path)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()

    entries = json.loads((arguments.build / "compile_commands.json").read_text())
    entries = [e for e in entries if re.search(r"CMakeFiles/\w*_cuda\w*\.dir/", e["output"])]
    if not entries:
        print(f"{arguments.build} has no CUDA targets")
        return 1
    entries.sort(key=lambda e: last_change(pathlib.Path(e["file"])), reverse=True)
    deadline = time.monotonic() + 60 * arguments.minutes

    print(f"{len(entries)} files, at most {arguments.minutes:g} minutes", flush=True)
    with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
        outcomes = list(pool.map(lambda e: compiled(e, deadline), entries))
    failed = [name(e) for e, ok in zip(entries, outcomes, strict=True) if ok is False]
    left = [name(e) for e, ok in zip(entries, outcomes, strict=True) if ok is None]
    print(f"CUDA: {len(entries) - len(failed) - len(left)} compiled, {len(failed)} failed, {len(left)} not compiled")
    for title, files in (("failed", failed), ("not compiled, out of time", left)):
        if files:
            print(f"  {title}: {' '.join(files)}")
    return 1 if failed else 0


def name(entry: dict[str, str]) -> str:
    return str(pathlib.Path(entry["file"]).relative_to(ROOT))


def compiled(entry: dict[str, str], deadline: float) -> bool | None:
    """Whether the file compiles; None if there was no time to know."""
    start = time.monotonic()
    if start >= deadline:
        return None
    command = shlex.split(entry["command"])
    if (ccache := shutil.which("ccache")) and pathlib.Path(command[0]).name != "ccache":
        command.insert(0, ccache)
    try:
        run = subprocess.run(
            command,
            cwd=entry["directory"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=deadline - start,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return None
    output = f"\n{run.stdout.rstrip()}" if run.stdout.strip() else ""
    verdict = "ok    " if run.returncode == 0 else "FAILED"
    print(f"  {verdict} {time.monotonic() - start:6.1f} s  {name(entry)}{output}", flush=True)
    return run.returncode == 0


@ft.cache
def last_change(file: pathlib.Path) -> float:
    """When a source, or a header of the repository that it includes, last changed; uncommitted is now."""
    return max([committed(file), *(committed(header) for header in included(file))])


@ft.cache
def committed(file: pathlib.Path) -> float:
    git = ft.partial(subprocess.run, cwd=ROOT, capture_output=True, text=True, check=False)
    if git(["git", "status", "--porcelain", "--", str(file)]).stdout:
        return time.time()
    return float(git(["git", "log", "-1", "--format=%ct", "--", str(file)]).stdout or 0)


def included(file: pathlib.Path) -> set[pathlib.Path]:
    """The repository's headers that a source includes, directly or not."""
    seen: set[pathlib.Path] = set()
    todo = [file]
    while todo:
        for include in re.findall(r'^#include "(.+)"', todo.pop().read_text(), re.MULTILINE):
            header = ROOT / include
            if header.exists() and header not in seen:
                seen.add(header)
                todo.append(header)
    return seen


if __name__ == "__main__":
    sys.exit(main())
