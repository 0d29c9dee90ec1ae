"""What every test runs under: four CPU devices, a quick compiler, a reason where a GPU is missing, and no swallowed
exception."""

import os

import quick_compiler

# Before JAX starts its backends: sharding tests need several devices on any machine.
os.environ["XLA_FLAGS"] = " ".join(
    [os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=4", *quick_compiler.FLAGS]
)
# Workers of pytest-xdist share a GPU: the first would take three quarters of its memory, and the rest fail.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import contextlib
import functools as ft
import logging
from collections.abc import Iterator

import jax
import pytest
import share

from zenith_jax import native

quick_compiler.start()


@ft.cache
def _no_gpu() -> str | None:
    """Why tests marked `gpu` cannot run here, or None."""
    try:
        jax.devices("cuda")
    except RuntimeError as error:
        return f"no NVIDIA GPU under JAX: {error}"
    return native.unavailable_reason("cuda")


def pytest_addoption(parser: pytest.Parser) -> None:
    share.add_option(parser)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items[:], others = share.thinned(items, config.getoption("share"))
    if others:
        config.hook.pytest_deselected(items=others)
    for item in items:
        if item.get_closest_marker("gpu") and (reason := _no_gpu()):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def compiler(request: pytest.FixtureRequest) -> Iterator[None]:
    with quick_compiler.optimised() if request.node.get_closest_marker("optimised") else contextlib.nullcontext():
        yield


class _Collector(logging.Handler):
    def __init__(self):
        super().__init__(logging.ERROR)
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


@pytest.fixture(autouse=True)
def no_swallowed_exception() -> Iterator[None]:
    """A matcher that raises costs users its fusion and leaves a line in the log; a test that it fails."""
    collector, logger = _Collector(), logging.getLogger("zenith_jax")
    logger.addHandler(collector)
    yield
    logger.removeHandler(collector)
    assert not collector.records, "\n\n".join(logging.Formatter().format(r) for r in collector.records)
