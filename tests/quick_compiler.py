"""XLA's CPU compiler set to compile quickly: most of the tests' time is its. Nothing that is ours is compiled by it.

A program of tests/op_cases.py and its gradient took 160 ms each as users compile them, 73 ms so (Zen 3, jaxlib 0.10.2,
2026-11-27). `ZENITH_TESTS_AS_USERS=1 pytest tests` leaves the compiler as it is.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
from collections.abc import Iterator

AS_USERS = os.environ.get("ZENITH_TESTS_AS_USERS", "") not in ("", "0")


# The emitters of before are twice as fast. jaxlib 0.12 has none, and ends the process at a flag that it does not know.
HAS_OLD_EMITTERS = not AS_USERS and tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 11)
FLAGS = () if AS_USERS else ("--xla_cpu_parallel_codegen_split_count=1",)
if HAS_OLD_EMITTERS:
    FLAGS += ("--xla_cpu_use_fusion_emitters=false",)


def start() -> None:
    """Turns optimisations off; not on a GPU, where the programs around our kernels would be slow without."""
    import jax

    jax.config.update("jax_disable_most_optimizations", not AS_USERS and jax.default_backend() == "cpu")


@contextlib.contextmanager
def optimised() -> Iterator[None]:
    import jax

    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
