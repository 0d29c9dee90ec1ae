"""What every test runs under: four CPU devices, and a reason where a GPU is missing."""

import os

# Before JAX starts its backends: sharding tests need several devices on any machine.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"

import functools as ft

import jax
import pytest

from zenith_jax import native


@ft.cache
def _no_gpu() -> str | None:
    """Why tests marked `gpu` cannot run here, or None."""
    try:
        jax.devices("cuda")
    except RuntimeError as error:
        return f"no NVIDIA GPU under JAX: {error}"
    return native.unavailable_reason("cuda")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and (reason := _no_gpu()):
            item.add_marker(pytest.mark.skip(reason=reason))
