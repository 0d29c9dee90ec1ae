"""Values while a graph is converted: static (NumPy) or not (JAX: traced, or concrete outside of `jax.jit`)."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from zenith_jax.frontends.onnx.errors import NotStaticError, OnnxError, UnsupportedError

__all__ = [
    "NotStaticError",
    "OnnxError",
    "UnsupportedError",
    "ints",
    "is_known",
    "is_static",
    "is_symbolic",
    "static",
    "xp",
]


def is_static(value: Any) -> bool:
    """Whether the value is known while tracing: NumPy, None, or a list of such."""
    if isinstance(value, list | tuple):
        return all(is_static(v) for v in value)
    return value is None or isinstance(value, np.ndarray | np.generic)


def is_symbolic(value: Any) -> bool:
    """Whether the value is static and holds symbols that `jax.export` has for sizes."""
    if not isinstance(value, np.ndarray) or value.dtype != object:
        return False
    return any(not isinstance(v, str | bytes | int | np.integer) for v in value.flat)


def xp(*values: Any) -> ModuleType:
    """numpy where every value is static, so that shapes stay values; else jax.numpy."""
    return np if all(is_static(v) for v in values) else jnp


def is_known(value: Any) -> bool:
    """Whether `static` can give the value: it is static, or a JAX array outside of any tracing."""
    if isinstance(value, list | tuple):
        return all(is_known(v) for v in value)
    return not isinstance(value, Tracer)


def static(value: Any, name: str) -> np.ndarray:
    """The operand `name` as a NumPy array. A JAX array outside of tracing is read; a tracer raises NotStaticError.

    So a model whose shapes depend on data runs exactly when it is called outside of `jax.jit`. Whether to compute with
    NumPy is another question, answered by `xp`: a JAX array stays one.
    """
    if not is_known(value):
        raise NotStaticError(f"the value of {name!r} must be known while tracing, because it decides a shape")
    return np.asarray(value)


def ints(value: Any, name: str) -> tuple[int, ...]:
    """The static operand `name` as Python integers."""
    return tuple(int(v) for v in static(value, name).reshape(-1))
