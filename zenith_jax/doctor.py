"""`zenith doctor`: what is installed, built and found on this machine, and what to do about the rest.

`findings()` is plain data (also `--json`); `show()` prints it. CPU kernels that work are all that Zenith
needs, so their absence alone makes the exit code 1.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys
import warnings
from typing import Any, Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from zenith_jax import native

# package -> the extra that brings it; None: required
PACKAGES = {
    "zenith-jax": None,
    "jax": None,
    "jaxlib": None,
    "numpy": None,
    "flax": None,
    "rich": None,
    "jax-cuda12-plugin": "cuda12",
    "jax-cuda13-plugin": "cuda13",
    "safetensors": "demo",
    "tokenizers": "demo",
}


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line of the report. advice: what to do about it, "" where there is nothing to do."""

    section: Literal["installed", "built", "found"]
    name: str
    state: Literal["ok", "absent", "broken"]  # absent: not needed here; broken: something here does not work
    detail: str
    advice: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "example: zenith doctor --json. Exit codes: 0 the CPU kernels work, 1 they do not"
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")


def main(arguments: argparse.Namespace) -> int:
    """Prints the report; returns 0 if the CPU kernels work, else 1."""
    report = findings()
    if arguments.json:
        print(json.dumps([dataclasses.asdict(f) for f in report], indent=2))
    else:
        show(report)
    return 0 if all(f.state == "ok" for f in report if f.name == "CPU kernels") else 1


def findings() -> list[Finding]:
    """Everything that the doctor looks at, in the order of the report. Starts JAX's backends."""
    return [*_installed(), *_built(), *_found()]


def show(report: list[Finding], console: Console | None = None) -> None:
    """The report as a table, and below it what to do."""
    console = console or Console()
    colour = {"ok": "green", "absent": "dim", "broken": "red"}
    for section in ("installed", "built", "found"):
        table = Table(title=section, title_justify="left", title_style="bold", box=None, show_header=False)
        for finding in report:
            if finding.section == section:
                state = f"[{colour[finding.state]}]{finding.state}[/]"
                table.add_row(f"  {finding.name}", state, escape(finding.detail))
        console.print(table)
    advice = [f for f in report if f.advice]
    if advice:
        console.print("\n[bold]what to do[/]")
    for finding in advice:
        console.print(f"  {finding.name}: {finding.advice}", soft_wrap=True, markup=False, highlight=False)


# ---- installed -----------------------------------------------------------------------------------


def _installed() -> list[Finding]:
    return [
        Finding("installed", "python", "ok", f"{platform.python_version()}  {sys.executable}"),
        *(_package(name, extra) for name, extra in PACKAGES.items()),
    ]


def _package(name: str, extra: str | None) -> Finding:
    try:
        return Finding("installed", name, "ok", importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        if extra is not None:
            return Finding("installed", name, "absent", f"comes with `pip install 'zenith-jax[{extra}]'`")
        if name == "zenith-jax":
            return Finding("installed", name, "absent", "used from a checkout")
        return Finding("installed", name, "broken", "not installed", f"pip install {name}")


# ---- built ---------------------------------------------------------------------------------------


def _built() -> list[Finding]:
    jaxlib = "{}.{}".format(*native.running_ffi_api_version())
    return [Finding("built", "jaxlib's XLA FFI", "ok", jaxlib), _cpu_kernels(), _cuda_kernels()]


def _cpu_kernels() -> Finding:
    module = native.module("cpu")
    if module is None:
        reason = native.unavailable_reason("cpu") or ""
        return Finding("built", "CPU kernels", "broken", *_reason_and_fix(reason))
    best, *others = module.instruction_sets
    detail = f"{_built_with(module)}, {best} in use" + (f" (also {', '.join(others)})" if others else "")
    return Finding("built", "CPU kernels", "ok", detail)


def _cuda_kernels() -> Finding:
    module = native.module("cuda")
    if module is None:
        reason, fix = _reason_and_fix(native.unavailable_reason("cuda") or "")
        # Without a driver there is no GPU to run them on: nothing to repair.
        state, advice = ("broken", fix) if _driver_version() else ("absent", "")
        return Finding("built", "CUDA kernels", state, reason, advice)
    cuda = f"CUDA {module.cuda_version // 1000}.{module.cuda_version % 1000 // 10}"
    return Finding("built", "CUDA kernels", "ok", f"{_built_with(module)}, {cuda}")


def _built_with(module: Any) -> str:
    major, minor = module.ffi_api_version
    return f"{len(module.targets())} targets, version {module.kernel_version}, XLA FFI {major}.{minor}"


def _reason_and_fix(reason: str) -> tuple[str, str]:
    """native's text is "what is wrong: what to do"."""
    what, _, fix = reason.partition(": ")
    return what, fix


# ---- found ---------------------------------------------------------------------------------------


def _found() -> list[Finding]:
    return [_processor(), _compiler(), _nvcc(), _driver(), *_gpus(), _backends()]


def _processor() -> Finding:
    features = _cpu_flags() & {"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl", "amx_bf16"}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return Finding("found", "processor", "ok", f"{platform.machine()}, {cores} cores  {' '.join(sorted(features))}")


def _cpu_flags() -> set[str]:
    try:
        text = pathlib.Path("/proc/cpuinfo").read_text()
    except OSError:
        return set()
    match = re.search(r"^flags\s*:(.*)$", text, re.MULTILINE)
    return set(match[1].split()) if match else set()


def _compiler() -> Finding:
    for name in ("c++", "g++", "clang++"):
        if path := shutil.which(name):
            return Finding("found", "C++ compiler", "ok", f"{_first_line(path, '--version')}  {path}")
    return Finding("found", "C++ compiler", "absent", "needed to build Zenith only: `apt install g++`")


def _nvcc() -> Finding:
    path = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if path is None:
        return Finding("found", "nvcc", "absent", "needed to build the CUDA kernels only")
    release = re.search(r"release (\S+),", _output(path, "--version"))
    return Finding("found", "nvcc", "ok", f"{release[1] if release else 'of an unknown version'}  {path}")


def _driver_version() -> str:
    """Version of the NVIDIA kernel driver, "" where there is none."""
    try:
        text = pathlib.Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").partition("\n")[0]
    match = re.search(r"\s(\d+\.\d+(\.\d+)?)\s", text)
    return match[1] if match else "of an unknown version"


def _driver() -> Finding:
    version = _driver_version()
    if not version:
        return Finding(
            "found", "NVIDIA driver", "absent", "no GPU, or no driver for it; the CPU kernels do not need one"
        )
    return Finding("found", "NVIDIA driver", "ok", version)


def _gpus() -> list[Finding]:
    module = native.module("cuda")
    if module is None:
        return []
    info = module.device_info()
    if info["error"] is not None and _driver_version():
        return [Finding("found", "GPU", "broken", info["error"], "`nvidia-smi` tells more")]
    return [
        Finding(
            "found",
            f"GPU {i}",
            "ok",
            "{name}, compute capability {major}.{minor}, {memory:.0f} GiB".format(
                name=device["name"],
                major=device["compute_capability"][0],
                minor=device["compute_capability"][1],
                memory=device["memory_bytes"] / 2**30,
            ),
        )
        for i, device in enumerate(info["devices"])
    ]


def _backends() -> Finding:
    import jax

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a GPU that JAX was not installed for is said below
            devices = jax.devices()
    except RuntimeError as error:
        return Finding("found", "JAX's backend", "broken", str(error), "reinstall jax and jaxlib of one version")
    detail = f"{devices[0].platform}, {len(devices)} devices"
    if devices[0].platform == "cpu" and _driver_version():
        advice = "`pip install 'zenith-jax[cuda13]'` (driver 580 or newer), or `[cuda12]`, for JAX on the GPU"
        return Finding("found", "JAX's backend", "broken", f"{detail}, though there is an NVIDIA driver", advice)
    return Finding("found", "JAX's backend", "ok", detail)


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=False).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _first_line(*command: str) -> str:
    return _output(*command).partition("\n")[0]
