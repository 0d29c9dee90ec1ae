"""The fuzzer for long: `python tests/fuzz/run.py --seconds 3600 --seed 1`. Prints what it saw, and each wrong program.

Exits with 1 if any program was wrong. --show 'Program(record=...)' runs one program, as a failure prints it.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
import time
import traceback
import warnings

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import jax
from fuzz.check import Tally, Wrong, check
from fuzz.programs import Program, programs
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded

BATCH = 100


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", metavar="PROGRAM")
    options = parser.parse_args()
    warnings.simplefilter("ignore", RuntimeWarning)  # of constants that overflow, as mask fills in float16 do
    tally = Tally()
    if options.show:
        program = eval(options.show, {"Program": Program})
        print(program)
        check(program, tally)
        print(tally)
        return 0
    start, batch = time.monotonic(), 0
    while time.monotonic() - start < options.seconds:

        @seeded(options.seed * 1_000_003 + batch)
        @settings(
            max_examples=BATCH,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(programs())
        def one_batch(program: Program) -> None:
            if time.monotonic() - start >= options.seconds:
                return
            try:
                check(program, tally)
            except Wrong as wrong:
                print(f"WRONG: {wrong}\n", flush=True)
            except Exception:
                tally.programs["wrong"] += 1
                print(f"FAILED: {program}\n{program!r}\n{traceback.format_exc(limit=-8)}\n", flush=True)

        one_batch()
        jax.clear_caches()
        batch += 1
    print(f"seed {options.seed}, {time.monotonic() - start:.0f} s, {batch} batches: {tally}")
    return 1 if tally.programs["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
