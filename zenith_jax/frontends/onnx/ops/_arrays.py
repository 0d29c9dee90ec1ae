"""What operator functions share."""

from __future__ import annotations

import functools as ft
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np


def in_jax(function: Callable) -> Callable:
    """`function` with its static operands as JAX arrays, for operators that no shape is computed with.

    NumPy makes float32 of bfloat16 times a Python number; jax.numpy keeps bfloat16.
    """

    @ft.wraps(function)
    def wrapped(*operands: Any, **attributes: Any) -> Any:
        return function(
            *(jnp.asarray(x) if isinstance(x, np.ndarray | np.generic) else x for x in operands), **attributes
        )

    return wrapped


def silent(function: Callable) -> Callable:
    """`function` without NumPy's warnings: ONNX's log(0) is -inf and its integers wrap, static or not."""

    @ft.wraps(function)
    def wrapped(*operands: Any, **attributes: Any) -> Any:
        with np.errstate(all="ignore"):
            return function(*operands, **attributes)

    return wrapped
