"""A script in a Python process of its own: `from fresh_process import run_script`."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import zenith_jax


def run_script(text: str, where: pathlib.Path, *, timeout_s: int = 250, **environment: str) -> str:
    """What `text` prints as `where/script.py`; fails with all that it printed if it fails."""
    process = started_script(text, where, **environment)
    try:
        out, err = process.communicate(timeout=timeout_s)
    finally:
        process.kill()
    assert process.returncode == 0, out + err
    return out


def started_script(text: str, where: pathlib.Path, **environment: str) -> subprocess.Popen[str]:
    """`text` running as `where/script.py`, there and on the CPU.

    It imports the zenith_jax that is under test, wherever that lies: a checkout may hold no built modules.
    """
    (where / "script.py").write_text(text)
    package = str(pathlib.Path(zenith_jax.__file__).parents[1])
    paths = os.pathsep.join(p for p in (package, os.environ.get("PYTHONPATH", "")) if p)
    return subprocess.Popen(
        [sys.executable, "script.py"],
        cwd=where,
        env={**os.environ, "PYTHONPATH": paths, "JAX_PLATFORMS": "cpu", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
