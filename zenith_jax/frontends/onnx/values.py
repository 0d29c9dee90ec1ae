"""Values while a graph is converted: static (NumPy) or traced (JAX)."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import jax.numpy as jnp
import numpy as np

from zenith_jax.errors import ZenithError


class NotStaticError(ZenithError):
    """An operand whose value must be known while tracing is traced. The converter adds the node's name."""


def is_static(value: Any) -> bool:
    """Whether the value is known while tracing: NumPy, None, or a list of such."""
    if isinstance(value, list | tuple):
        return all(is_static(v) for v in value)
    return value is None or isinstance(value, np.ndarray | np.generic)


def xp(*values: Any) -> ModuleType:
    """numpy where every value is static, so that shapes stay values; else jax.numpy."""
    return np if all(is_static(v) for v in values) else jnp


def static(value: Any, name: str) -> np.ndarray:
    """The operand `name` as a NumPy array. Raises NotStaticError for a traced one."""
    if not is_static(value):
        raise NotStaticError(f"the value of {name!r} must be known while tracing, because it decides a shape")
    return np.asarray(value)


def ints(value: Any, name: str) -> tuple[int, ...]:
    """The static operand `name` as Python integers."""
    return tuple(int(v) for v in static(value, name).reshape(-1))
