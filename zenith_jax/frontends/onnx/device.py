"""NumPy's weights as JAX's, each held once: shared where that can be, and what was mapped from a file let go."""

from __future__ import annotations

import ctypes
import logging
import mmap

import jax
import jax.numpy as jnp
import numpy as np

logger = logging.getLogger("zenith_jax")

_ALIGNMENT = 64  # bytes; XLA's CPU backend copies what is aligned less
_LARGE_BYTES = 1 << 16
# What DLPack carries from NumPy to JAX as it is. 64 bits would be narrowed, and bfloat16 is not NumPy's.
_SHARED = frozenset(np.dtype(t) for t in ("float32", "float16", "int8", "uint8", "int16", "uint16", "int32", "uint32"))


def on_device(array: np.ndarray) -> jax.Array:
    """The array for JAX.

    Shared, on the CPU, where it is large: as it is where it is aligned for XLA, which external data of most exporters
    is, so that nothing is read before it is used; else as one copy that is aligned.
    """
    if jax.default_backend() == "cpu" and array.nbytes >= _LARGE_BYTES and array.dtype in _SHARED:
        is_aligned = array.ctypes.data % _ALIGNMENT == 0 and array.flags.carray  # also writable, which DLPack wants
        return jax.dlpack.from_dlpack(array if is_aligned else _aligned_copy(array))
    if array.dtype in (np.float64, np.int64, np.uint64, np.complex128) and not jax.config.read("jax_enable_x64"):
        logger.info("an ONNX weight of %s becomes 32 bits wide: jax_enable_x64 is off", array.dtype)
    result = jnp.asarray(array)
    if array.nbytes >= _LARGE_BYTES:
        result.block_until_ready()
        _let_go(array)
    return result


def _aligned_copy(array: np.ndarray) -> np.ndarray:
    room = np.empty(array.nbytes + _ALIGNMENT, np.uint8)
    start = -room.ctypes.data % _ALIGNMENT
    copy = room[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    np.copyto(copy, array)
    _let_go(array)
    return copy


def _let_go(array: np.ndarray) -> None:
    """Tells the system that the pages of a mapped file below the array are not needed now; it would read them again."""
    root = array
    while isinstance(root, np.ndarray):
        root = root.base
    if not isinstance(root, mmap.mmap) or not array.flags.c_contiguous or not hasattr(mmap, "MADV_DONTNEED"):
        return
    offset = array.ctypes.data - np.frombuffer(root, np.uint8).ctypes.data
    first, end = -(-offset // mmap.PAGESIZE), (offset + array.nbytes) // mmap.PAGESIZE
    if end > first:
        root.madvise(mmap.MADV_DONTNEED, first * mmap.PAGESIZE, (end - first) * mmap.PAGESIZE)


def release_freed_memory() -> None:
    """Gives the system the pages that the C library keeps of freed memory, where it is glibc."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
