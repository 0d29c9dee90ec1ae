"""Peak memory of attention on the CPU as the length grows: linear with our kernel, quadratic in XLA's code.

Each figure comes from a process of its own, `python -m zenith_jax.bench.memory HOW LENGTH`, because the highest
resident size of a process never falls.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Sequence

from rich.table import Table

LENGTHS = (2048, 4096, 8192)
HEADS, FEATURES = 2, 64


@dataclasses.dataclass(frozen=True)
class Growth:
    """By how much one call raised the peak of the resident memory, inputs and compilation not counted."""

    how: str  # "jax.jit" or "zenith.jit"
    gradient: bool
    length: int
    mebibytes: float


def growths(lengths: Sequence[int] = LENGTHS, gradients: Sequence[bool] = (False, True)) -> list[Growth]:
    return [
        _in_process_of_its_own(how, length, gradient)
        for gradient in gradients
        for how in ("jax.jit", "zenith.jit")
        for length in lengths
    ]


def table(figures: Sequence[Growth]) -> Table:
    shown = Table(
        title=f"growth of peak memory in one call of attention, b1 h{HEADS} d{FEATURES}, float32", title_justify="left"
    )
    lengths = sorted({f.length for f in figures})
    shown.add_column("")
    for length in lengths:
        shown.add_column(f"s {length}", justify="right")
    if len(lengths) > 1:
        shown.add_column("for twice the length", justify="right")
    for gradient in (False, True):
        for how in ("jax.jit", "zenith.jit"):
            row = {f.length: f.mebibytes for f in figures if (f.how, f.gradient) == (how, gradient)}
            if not row:
                continue
            cells = [f"{row[length]:.1f} MiB" for length in lengths]
            if len(lengths) > 1:
                cells.append(f"{row[lengths[-1]] / max(row[lengths[-2]], 1e-3):.1f} x")
            shown.add_row(how + (" gradient" if gradient else ""), *cells)
    return shown


def _in_process_of_its_own(how: str, length: int, gradient: bool) -> Growth:
    flags = ("gradient",) if gradient else ()
    # -P and the path: the child imports the package of this process, not one that lies in the current folder.
    command = [sys.executable, "-P", "-m", "zenith_jax.bench.memory", how, str(length), *flags]
    package = str(pathlib.Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": path}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed with {done.returncode}: {done.stderr[-2000:]}")
    return Growth(how, gradient, length, json.loads(done.stdout)["mebibytes"])


def _measure(how: str, length: int, gradient: bool) -> float:
    """MiB by which the first call raises the peak. The process must be fresh."""
    import jax

    import zenith_jax as zenith
    from zenith_jax.bench.cases import attention_case, dot_product_attention

    case = attention_case(dot_product_attention, 1, HEADS, length, FEATURES)
    program, arguments = dataclasses.replace(case, gradient=gradient).program()
    jit = {"jax.jit": jax.jit, "zenith.jit": zenith.jit}[how]
    compiled = jit(program).lower(*arguments).compile()
    jax.block_until_ready(arguments)
    before = _reset_peak()
    jax.block_until_ready(compiled(*arguments))
    return (_status("VmHWM") - before) / 2**20


def _reset_peak() -> int:
    """Bytes from which growth counts: the resident size, or the peak so far where the system does not reset that."""
    with contextlib.suppress(OSError):
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # Linux, proc(5): VmHWM becomes the current size
    return _status("VmHWM")


def _status(field: str) -> int:
    found = re.search(rf"^{field}:\s*(\d+) kB$", pathlib.Path("/proc/self/status").read_text(), re.MULTILINE)
    if found is None:
        raise RuntimeError(f"/proc/self/status has no {field}: peak memory is measured on Linux only")
    return int(found[1]) * 1024


if __name__ == "__main__":
    print(json.dumps({"mebibytes": _measure(sys.argv[1], int(sys.argv[2]), "gradient" in sys.argv[3:])}))
