"""Arrays in the memory of other frameworks' tensors on the host, found by that memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax

from zenith_jax import native
from zenith_jax.ir import _compat


class BorrowedArrays:
    """Arrays in the memory of objects that have a buffer (PEP 3118), of one type, which frameworks give out again and
    again. They do not own it: it is there as long as the object of the call.

    find: object -> the array that was kept for its memory, sizes and element type; None without. Native, 1 us.
    """

    def __init__(self, buffers: Any, device: Any):
        self._buffers, self._device = buffers, device
        self._sharding = jax.sharding.SingleDeviceSharding(device)
        self.find = buffers.find

    @classmethod
    def of(cls, kind: type, device: Any) -> BorrowedArrays | None:
        """Of objects of this type. None where the native module is not here."""
        module = native.module("cpu")
        return None if module is None else cls(module.Buffers(kind), device)

    def array(self, x: Any, shape: Sequence[int], dtype: Any) -> Any:
        """An array in the memory of `x`, or a copy of what is small or not aligned as JAX wants it; None where `x` is
        empty or does not say where its memory is."""
        address = self._buffers.address(x)
        if not address or not math.prod(shape):
            return None
        return _compat.array_at(address, shape, dtype, self._sharding, self._device)

    def keep(self, x: Any, array: Any) -> None:
        """For the next object in this memory, if that is where the array is too."""
        if isinstance(array, jax.Array) and array.size and array.unsafe_buffer_pointer() == self._buffers.address(x):
            self._buffers.keep(x, array)
