"""How much a model may ask for, checked before it gets it: a file of a hundred bytes can ask for ten terabytes.

Operators that take a size check what they are about to make; the interpreter checks what any other node gives. So no
single value passes the limit. Their sum is not counted.
"""

from __future__ import annotations

import contextlib
import contextvars
import math
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from zenith_jax.frontends.onnx import dtypes
from zenith_jax.frontends.onnx.errors import OnnxError

MAX_NODES = 4_000_000  # nodes run in one call, rounds of loops that are written out included: minutes, not for ever
MAX_RANK = 64  # NumPy's; XLA would compile for a million dimensions until the end of days
_CONTAINER_LIMIT = pathlib.Path("/sys/fs/cgroup/memory.max")  # control groups, version 2: a number, or "max"
_PART_OF_MEMORY = 4  # a quarter: a value, what it is made from, and room


def default_max_bytes() -> int:
    """A quarter of the machine's memory, or of what the container may have."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        allowed = _CONTAINER_LIMIT.read_text().strip()
    except OSError:
        allowed = ""
    return (min(memory, int(allowed)) if allowed.isdecimal() else memory) // _PART_OF_MEMORY


_max_bytes: contextvars.ContextVar[int] = contextvars.ContextVar("max_bytes", default=1 << 40)


@contextlib.contextmanager
def limited(max_bytes: int) -> Iterator[None]:
    """Within it, no value may have more bytes."""
    token = _max_bytes.set(max_bytes)
    try:
        yield
    finally:
        _max_bytes.reset(token)


def check_rank(shape: Sequence[Any]) -> None:
    """Raises OnnxError for a shape of too many dimensions."""
    if len(shape) > MAX_RANK:
        raise OnnxError(f"a result would have {len(shape)} dimensions, more than {MAX_RANK}")


def check_size(shape: Sequence[Any], dtype: Any) -> None:
    """Raises OnnxError where an array would be larger than the limit. Symbolic sizes are let through."""
    check_rank(shape)
    if not all(isinstance(d, int | np.integer) for d in shape):
        return
    sizes = [int(d) for d in shape]
    if any(d < 0 for d in sizes):
        raise OnnxError(f"a result would have the shape {tuple(sizes)}, which has a negative dimension")
    needed = (math.prod(sizes) * dtypes.bits(dtype) + 7) // 8
    if needed > _max_bytes.get():
        raise OnnxError(
            f"a result of shape {tuple(sizes)} and type {np.dtype(dtype)} would have {_readable(needed)}, the limit is "
            f"{_readable(_max_bytes.get())}: load(max_bytes=...) sets it"
        )


def check_results(values: Any) -> None:
    """`check_size` of what a node gives; of traced values this is before anything is allocated."""
    for value in jax.tree.leaves(values):
        if isinstance(value, Tracer):
            check_size(value.shape, value.dtype)


def check_ahead(operator: Callable[..., Any], inputs: Sequence[Any]) -> None:
    """`check_size` of what `operator(*inputs)` would give, for inputs at hand whose combination could be too large.

    No operator without an operand for a size gives more elements than its inputs' sizes multiplied. Where the product
    is within the limit nothing is done, else the result's shape is found by tracing.
    """
    arrays = [(i, v) for i, v in enumerate(inputs) if isinstance(v, np.ndarray | jax.Array) and v.dtype != object]
    if any(isinstance(v, Tracer) for _, v in arrays):
        return
    if math.prod(max(v.size, 1) for _, v in arrays) * 16 <= _max_bytes.get():
        return
    places = [i for i, _ in arrays]

    def of_arrays(*traced: Any) -> Any:
        given = list(inputs)
        for place, value in zip(places, traced, strict=True):
            given[place] = value
        return operator(given)

    try:
        results = jax.eval_shape(of_arrays, *(v for _, v in arrays))
    except Exception:  # needs a value: an operator that checks for itself, or an error that comes again outside of this
        return
    for value in jax.tree.leaves(results):
        check_size(value.shape, value.dtype)


def _readable(size_bytes: int) -> str:
    units = ("B", "kB", "MB", "GB", "TB", "PB", "EB")
    power = min(max(size_bytes.bit_length() - 1, 0) // 10, len(units) - 1)
    return f"{size_bytes / 1024**power:.3g} {units[power]}" if size_bytes < 1 << 80 else "more bytes than 2**80"
