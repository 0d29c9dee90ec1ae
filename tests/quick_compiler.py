"""XLA's CPU compiler set to compile quickly: most of the tests' time is its. Nothing that is ours is compiled by it.

A formula of tests/op_cases.py, or its gradient, is compiled in 250 ms for users and in 88 so with jaxlib 0.10.2, in 240
and 177 with 0.12 (Zen 3, 2026-11-27). `ZENITH_TESTS_AS_USERS=1 pytest tests` leaves the compiler as it is.

FLAGS must be in XLA_FLAGS before JAX is imported, so that this file imports it late.
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
# For jax.jit(compiler_options=) of what the old emitters compute wrong: they make -0 a NaN in float8 types FNUZ.
NEW_EMITTERS = {"xla_cpu_use_fusion_emitters": True} if HAS_OLD_EMITTERS else {}


def start() -> None:
    """Turns LLVM's optimisations off; not on a GPU, where the programs around our kernels would be slow without."""
    import jax

    jax.config.update("jax_disable_most_optimizations", not AS_USERS and jax.default_backend() == "cpu")


@contextlib.contextmanager
def optimised() -> Iterator[None]:
    """With LLVM's optimisations, for large programs, and where XLA must round alike what it fuses and what not."""
    import jax

    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
