"""Data-parallel training over devices and processes: the losses of one device, and nothing gathered."""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys

import pytest

from zenith_jax import native

ROOT = pathlib.Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(native.unavailable_reason("cpu") is not None, reason="the CPU module is not built")


def trained(devices: int, processes: int = 1) -> tuple[list[float], dict[str, int], str]:
    """(losses, collectives in the compiled step, what else was said) of examples/data_parallel.py."""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices // processes}",
    }
    command = [sys.executable, "examples/data_parallel.py", "--no-cost", "--steps", "4", "--processes", str(processes)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    losses = [float(x) for x in re.findall(r"step \d+ loss (\S+)", done.stdout)]
    (counts,) = re.findall(r"collectives: (.*)", done.stdout)
    return losses, {n: int(c) for n, c in re.findall(r"([a-z-]+) (\d+)", counts)}, done.stdout


@pytest.fixture(scope="module")
def alone():
    losses, collectives, shown = trained(1)
    assert len(losses) == 4 and losses[-1] < losses[0] - 0.1 and not any(collectives.values())
    assert "7 sites fused" in shown
    return losses


@pytest.mark.parametrize("processes", [1, 2])
def test_eight_devices_give_the_losses_of_one_and_gather_nothing(alone, processes):
    losses, collectives, shown = trained(8, processes)
    assert f"{processes} processes, 8 devices, 7 sites fused" in shown
    assert losses == pytest.approx(alone, rel=2e-5)
    assert collectives.pop("all-reduce") > 0  # of gradients
    assert not any(collectives.values()), collectives
