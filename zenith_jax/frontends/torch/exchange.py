# pyright: reportMissingImports=false
"""What the native modules do for tensors that cross: `ffi/exchange.cc`, and one stream's wait for another.

All of it is a shorter way of what tensors.py can do without: where torch is too old (before 2.10) or a module is not
built, the functions here return None.
"""

from __future__ import annotations

import functools as ft
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import torch

from zenith_jax import native
from zenith_jax.ir import _compat

# DLDataTypeCode, dlpack.h, by NumPy's kinds; bfloat16 has none. Not complex: conjugates are not in memory.
_CODES = {"i": 0, "u": 1, "f": 2, "b": 6}
_BFLOAT16 = 4


@ft.cache
def _exchange() -> tuple[Any, Any] | None:
    """The native module, and in it how torch's tensors are read and made."""
    module, api = native.module("cpu"), getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    if api is None or not hasattr(module, "Exchange"):
        return None
    try:
        return module, module.Exchange(torch.Tensor, api)  # type: ignore[union-attr]
    except ValueError:  # of another version
        return None


@ft.cache
def wait_for_stream() -> Callable[[int, int, int], None] | None:
    """(the stream that waits, the one it waits for, their device): 1 us, where torch's own objects take 4 (H100)."""
    return getattr(native.module("cuda"), "wait_for_stream", None)


def _type(dtype: Any) -> tuple[int, int] | None:
    dtype = np.dtype(dtype)
    if dtype.name == "bfloat16":
        return _BFLOAT16, 16
    # ml_dtypes calls float8_e5m2, and no other type of its own, "f".
    code = _CODES.get(dtype.kind) if dtype.isbuiltin == 1 else None
    return None if code is None else (code, 8 * dtype.itemsize)


def _device(device: Any) -> tuple[int, int]:
    return (_compat.DLPACK_CUDA, device.local_hardware_id) if device.platform == "gpu" else (_compat.DLPACK_CPU, 0)


def outlet(array: jax.Array) -> Any:
    """`.tensor(address, owner)` makes tensors like the array."""
    exchange, dtype = _exchange(), _type(array.dtype)
    if exchange is None or dtype is None or not array.size:
        return None
    module, tensors = exchange
    (device,) = array.devices()
    return module.Outlet(tensors, _device(device), dtype, array.shape)


def inlet(position: int, dtype: Any, device: Any, shape: tuple[int, ...]) -> Any:
    """`.find(args)` gives the array that was kept for the memory of the tensor there. dtype: of the tensor, NumPy's."""
    exchange, kind = _exchange(), _type(dtype)
    if exchange is None or kind is None:
        return None
    module, tensors = exchange
    return module.Inlet(tensors, position, _device(device), kind, shape)


def watch() -> Any:
    """`.holds(args)` says whether all that was added is as it was."""
    exchange = _exchange()
    return None if exchange is None else exchange[0].Watch(exchange[1])


def repeated(**parts: Any) -> Any:
    """args -> the return value of a call like an earlier one, made of what the functions above have returned."""
    exchange = _exchange()
    assert exchange is not None
    return exchange[0].Repeated(**parts).call
