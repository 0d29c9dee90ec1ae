"""The name of what JAX computes on, where it says no more than "cpu"."""

from __future__ import annotations

import pathlib
import platform
import re


def processor() -> str:
    """The CPU's model name and widest vector instructions: "Intel(R) Xeon(R) CPU @ 2.60GHz AVX-512"."""
    try:
        text = pathlib.Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    name = re.search(r"^model name\s*:\s*(.*)$", text, re.MULTILINE)
    flags = re.search(r"^flags\s*:(.*)$", text, re.MULTILINE)
    known = set(flags[1].split()) if flags else set()
    widest = next((label for flag, label in (("avx512f", "AVX-512"), ("avx2", "AVX2")) if flag in known), "")
    return " ".join(part for part in (name[1] if name else platform.machine(), widest) if part)
