"""Programs compiled before a server needs them, and measured: how long a call of each takes, and with how many threads.

`compile_ahead` starts a process for each number of threads, with a JAX that has no other work and no other options:
`main`. Each measures when it is asked, one at a time, in several rounds, and what counts is the shortest round: a
neighbour on the machine makes a call longer, never shorter.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

from zenith_jax.errors import ServingError

CACHE = "cache"  # of a version, which backend.py makes JAX's
# Of JAX's CPU client: one for each processor, or one fewer, for the thread that calls.
POOL_THREADS = ("all", "all but one")
ROUNDS = 5
ROUND_CALLS, ROUND_SECONDS = 8, 0.1  # of each program in a round, and one call at least
PROGRAM_SECONDS = 1.0  # a program that took as long in all is not measured again

_PROGRAM = f"import sys; from {__name__} import main; main(*sys.argv[1:])"

# Of one round: sizes of a program and seconds of a call of it.
Round = Sequence[tuple[Sequence[int], float]]


def processors() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0))


def compile_ahead(version: pathlib.Path, *, of_cpu: bool, fused: bool) -> dict[str, Any]:
    """Fills the version's cache, and returns the settings that were measured: which of POOL_THREADS it is to have, and
    seconds of a call of each program. Raises ServingError.

    JAX's CPU client has a thread for each processor, beside the one that calls. Where Zenith's kernels are most of a
    model, these are one too many: an encoder's p90 with one sentence was 4.0 ms, and 2.2 ms without the last. XLA's own
    loops go to the threads of the pool alone: up to 2.2 x as slow with one of two. So it is measured, where anything is
    fused.
    """
    candidates = POOL_THREADS if of_cpu and processors() > 1 and fused else POOL_THREADS[:1]
    with contextlib.ExitStack() as stack:
        processes = {t: stack.enter_context(_Process(version, t, of_cpu)) for t in candidates}
        for process in processes.values():
            process.answer()  # it has compiled: no round has a compiler beside it
        rounds: dict[str, list[Round]] = {threads: [] for threads in candidates}
        for turn in range(ROUNDS):
            for threads in candidates if turn % 2 == 0 else reversed(candidates):
                rounds[threads].append(processes[threads].measure())
    best, seconds = chosen(rounds)
    for threads in candidates:
        if threads == best:
            (version / _cache(threads)).rename(version / CACHE)
        else:
            shutil.rmtree(version / _cache(threads))
    return dict(pool_threads=best, seconds=seconds)


def chosen(rounds: Mapping[str, Sequence[Round]]) -> tuple[str, list[tuple[list[int], float]]]:
    """The number of threads that is faster, and the seconds of each program with it: of its shortest round."""
    shortest: dict[str, dict[tuple[int, ...], float]] = {}
    for threads, measured in rounds.items():
        shortest[threads] = {}
        for sizes, seconds in (program for one in measured for program in one):
            shortest[threads][tuple(sizes)] = min(seconds, shortest[threads].get(tuple(sizes), seconds))
    mean = {threads: statistics.geometric_mean(found.values()) for threads, found in shortest.items()}
    every, but_one = POOL_THREADS
    # The tail of `all` hardly shows in so few calls.
    best = but_one if but_one in mean and mean[but_one] < 1.1 * mean[every] else every
    return best, [(list(sizes), seconds) for sizes, seconds in shortest[best].items()]


def _cache(threads: str) -> str:
    return f"{CACHE}-{threads.replace(' ', '-')}"


class _Process:
    """Runs `main` with so many threads. It compiles at once, says so, and measures a round when it is asked."""

    def __init__(self, version: pathlib.Path, threads: str, of_cpu: bool):
        self._stderr = tempfile.TemporaryFile("w+")  # noqa: SIM115
        environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", **os.environ}  # beside us on a GPU
        if of_cpu:
            environment["JAX_PLATFORMS"] = "cpu"  # as in template.py
        if threads != POOL_THREADS[0]:
            environment["NPROC"] = str(processors() - 1)
        # This very package, whatever lies in the working directory.
        paths = os.environ.get("PYTHONPATH"), str(pathlib.Path(__file__).parents[2])
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", _PROGRAM, str(version), _cache(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
            env=environment,
        )

    def measure(self) -> Round:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it ended: there will be no answer
            self._process.stdin.write("measure\n")
            self._process.stdin.flush()
        return self.answer()

    def answer(self) -> Round:
        assert self._process.stdout is not None
        answer = self._process.stdout.readline()
        if not answer:
            self._process.wait()
            self._stderr.seek(0)
            raise ServingError(f"the model cannot be compiled as a server would: {self._stderr.read().strip()[-2000:]}")
        return json.loads(answer)

    def __enter__(self) -> _Process:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is not None:
            self._process.kill()
        with contextlib.suppress(BrokenPipeError):
            self._process.communicate()  # the end of its input ends it
        self._stderr.close()


def main(folder: str, cache: str) -> None:
    """Compiles all programs of a version into the folder `cache` in it, and prints an empty list. For each line of the
    input, prints the sizes of each program and the median of the seconds that a call takes, as JSON."""
    import jax

    from zenith_jax.compiled import buckets
    from zenith_jax.compiled.model import random_inputs
    from zenith_jax.serving.backend import Model

    version = pathlib.Path(folder)
    (version / cache).mkdir(exist_ok=True)
    model = Model(version, version / cache).compiled
    programs = [
        (list(sizes.values()), model.programs[tuple(sizes.values())], random_inputs(model.inputs, sizes))
        for sizes in buckets.combinations(model.dynamic)
    ]
    spent = [0.0] * len(programs)
    print("[]", flush=True)
    for _ in sys.stdin:
        measured = []
        for index, (sizes, program, inputs) in enumerate(programs):
            times: list[float] = []
            while spent[index] < PROGRAM_SECONDS and len(times) < ROUND_CALLS and sum(times) < ROUND_SECONDS:
                start = time.perf_counter()
                jax.block_until_ready(program(inputs))
                times.append(time.perf_counter() - start)
                spent[index] += times[-1]
            if times:
                measured.append((sizes, statistics.median(times)))
        print(json.dumps(measured), flush=True)
    # jaxlib at times aborts at exit, in its compiler's threads; all is written by now.
    sys.stderr.flush()
    os._exit(0)
