"""What a measurement was taken on."""

from __future__ import annotations

import dataclasses
import datetime
import os
import platform
import shutil
import subprocess

import jax
import jaxlib

from zenith_jax import native
from zenith_jax.device import processor


@dataclasses.dataclass(frozen=True)
class Machine:
    """device: the processor or GPU that JAX computes on. driver: the NVIDIA driver's version, "" on a CPU."""

    device: str
    cores: int
    driver: str
    jax: str
    jaxlib: str
    python: str
    date: str

    def text(self) -> str:
        where = f"{self.device}, driver {self.driver}" if self.driver else f"{self.device}, {self.cores} cores"
        return f"{where}; jax {self.jax}, Python {self.python}, {self.date}"


def machine() -> Machine:
    """This machine, as JAX's default backend sees it."""
    device = jax.devices()[0]
    on_cpu = device.platform == "cpu"
    return Machine(
        device=processor() if on_cpu else device.device_kind,
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        driver="" if on_cpu else _driver(),
        jax=jax.__version__,
        jaxlib=jaxlib.__version__,
        python=platform.python_version(),
        date=datetime.date.today().isoformat(),
    )


def kernels_missing() -> str | None:
    """Why the kernels for JAX's default backend cannot run, or None: then every op runs as XLA code."""
    name = native.default_platform()
    if name not in native.PLATFORMS:
        return f"there are no kernels for {name}"
    return native.unavailable_reason(name)


def _driver() -> str:
    if shutil.which("nvidia-smi") is None:
        return "unknown"
    command = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    found = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    return found.stdout.partition("\n")[0].strip() or "unknown"
