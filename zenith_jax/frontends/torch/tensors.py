# pyright: reportMissingImports=false
"""Tensors to arrays and back, in place: DLPack on the CPU and on GPUs, ordered with torch's current CUDA stream.

JAX has no 64-bit types unless jax_enable_x64 is set, and DLPack would narrow by a silent copy. So an int64 tensor
crosses as pairs of int32, of which the compiled program reads the low word: no copy and no conversion kernel.
"""

from __future__ import annotations

import functools as ft
import threading
import weakref
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax import lax
from torch.utils.dlpack import from_dlpack, to_dlpack

from zenith_jax.frontends.torch.errors import TorchError
from zenith_jax.ir import _compat

_INT32 = torch.iinfo(torch.int32)
_WIDE = (torch.float64, torch.complex128)
_PAIRS = {torch.int64: torch.int32, torch.uint64: torch.uint32}


def is_wide(tensor: torch.Tensor) -> bool:
    """Whether the tensor has a type that is computed in 64 bits or not at all."""
    return tensor.dtype in _WIDE


def jax_dtype(dtype: torch.dtype) -> np.dtype:
    name = str(dtype).removeprefix("torch.")
    try:
        return jnp.dtype(name)
    except TypeError:
        raise TorchError(f"JAX has no type for {dtype}") from None


def jax_device(device: torch.device) -> Any:
    """The JAX device on which the memory of a torch device lies."""
    if device.type not in ("cpu", "cuda"):
        raise TorchError(f"tensors on {device} do not cross to JAX, which is on cpu and cuda devices here")
    try:
        devices = jax.local_devices(backend=device.type)
    except RuntimeError as error:
        raise TorchError(
            f"the tensors are on {device} and JAX has no such device: pip install 'zenith-jax[cuda13]', "
            f"or move the module to the CPU ({error})"
        ) from None
    ordinal = device.index or 0 if device.type == "cuda" else 0
    for candidate in devices:
        if candidate.local_hardware_id == ordinal or device.type == "cpu":
            return candidate
    raise TorchError(f"the tensors are on {device}, JAX sees {devices}")


class Inlet:
    """How tensors of one dtype and device become arrays, and what undoes the detour of 64-bit integers.

    wide: the program computes in 64 bits, nothing is narrowed.
    """

    def __init__(self, tensor: torch.Tensor, wide: bool):
        if tensor.layout is not torch.strided or tensor.is_quantized:
            raise TorchError(f"a tensor of layout {tensor.layout} does not cross to JAX; call to_dense() before")
        self.dtype = jax_dtype(tensor.dtype)
        self.device = jax_device(tensor.device)
        self.pair = None if wide else _PAIRS.get(tensor.dtype)
        self.on_gpu = tensor.device.type == "cuda"
        self.latest: tuple[weakref.ref, int, jax.Array] | None = None  # the tensor, its address, its array

    def aval(self, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
        sharding = jax.sharding.SingleDeviceSharding(self.device)
        if self.pair is None:
            return jax.ShapeDtypeStruct(shape, self.dtype, sharding=sharding)
        return jax.ShapeDtypeStruct((*(shape or (1,)), 2), jax_dtype(self.pair), sharding=sharding)

    def __call__(self, tensor: torch.Tensor) -> jax.Array:
        """The array of the tensor's elements, of `aval`'s type. Aliases the tensor where that is dense and aligned."""
        latest = self.latest
        if latest is not None and latest[0]() is tensor and tensor.data_ptr() == latest[1] and self._is_written(tensor):
            return latest[2]
        given, tensor = tensor, tensor.detach()  # of which JAX holds the memory, so that the given one can be let go
        if not tensor.is_contiguous():
            tensor = tensor.contiguous()
        if self.pair is not None:
            self.check_range(tensor)
            tensor = (tensor if tensor.ndim else tensor.reshape(1)).view(self.pair).unflatten(-1, (-1, 2))
        stream = self._stream_that_waits(tensor.device) if self.on_gpu else None
        array = _compat.array_from_dlpack(to_dlpack(tensor), self.device, stream)
        if self.pair is None and shares_memory(given, array):
            self._keep(given, array)
        return array

    def _keep(self, tensor: torch.Tensor, array: jax.Array) -> None:
        """For the next call with this very tensor; a view of its memory takes 30 us to make on a GPU."""
        self.latest = weakref.ref(tensor, self._forget), tensor.data_ptr(), array

    def _forget(self, dead: weakref.ref) -> None:
        if self.latest is not None and self.latest[0] is dead:
            self.latest = None  # and the memory with it

    def _is_written(self, tensor: torch.Tensor) -> bool:
        """Whether what torch has written to the tensor is there, with nothing to wait for."""
        return not self.on_gpu or _current_stream(tensor.device).query()

    def _stream_that_waits(self, device: torch.device) -> int:
        """JAX's stream for memory of others, waiting for torch's current one, as DLPack prescribes.

        `tensor.__dlpack__(stream=)` does this too, in 22 us where this takes 4 (H100, torch 2.11, 2026-11-26): it makes
        the event and both stream objects anew.
        """
        handle = self.device.get_stream_for_external_ready_events()
        current = _current_stream(device)
        waits = _in_thread.waits.get(handle)
        if waits is None:
            with torch.cuda.device(device):
                waits = _in_thread.waits[handle] = torch.cuda.Event(), torch.cuda.ExternalStream(handle, device)
        event, external = waits
        event.record(current)
        external.wait_event(event)
        return handle

    def traced(self, array: Any, shape: tuple[int, ...]) -> Any:
        """Inside the program: the array of the tensor's own shape, 64-bit integers as 32-bit ones."""
        if self.pair is None:
            return array
        return lax.index_in_dim(array, 0, axis=-1, keepdims=False).reshape(shape)

    def check_range(self, tensor: torch.Tensor) -> None:
        """Raises TorchError where an integer on the CPU does not fit into 32 bits."""
        if self.on_gpu or not tensor.numel():  # on a GPU a look at the values would wait for them
            return
        low, high = torch.aminmax(tensor)
        if int(low) < _INT32.min or int(high) > _INT32.max:
            raise TorchError(
                f"an int64 tensor has values from {int(low)} to {int(high)}, and integers are computed in 32 bits: "
                "set jax_enable_x64"
            )


class _InThread(threading.local):
    """Of each thread, since an event that two record means only the later one."""

    def __init__(self) -> None:
        self.waits: dict[int, tuple[Any, Any]] = {}  # JAX's stream -> an event, the stream as torch's object
        self.streams: dict[tuple[int, int], Any] = {}  # (device, handle) -> torch's stream


_in_thread = _InThread()


def _current_stream(device: torch.device) -> Any:
    """`torch.cuda.current_stream(device)`, without its 8 us."""
    index = device.index or 0
    key = index, torch._C._cuda_getCurrentRawStream(index)
    stream = _in_thread.streams.get(key)
    if stream is None:
        stream = _in_thread.streams[key] = torch.cuda.current_stream(device)
    return stream


@ft.cache
def inlet_of(dtype: torch.dtype, device: torch.device, wide: bool) -> Inlet:
    """The Inlet of dense tensors of this kind."""
    return Inlet(torch.empty(0, dtype=dtype, device=device), wide)


def shares_memory(tensor: torch.Tensor, array: jax.Array) -> bool:
    return tensor.numel() == 0 or array.unsafe_buffer_pointer() == tensor.data_ptr()


_LEGACY_DEFAULT_STREAM = 1  # as DLPack numbers it, where CUDA and torch say 0


def to_torch(array: jax.Array, dtype: torch.dtype, gpu: int | None) -> torch.Tensor:
    """The array's memory as a tensor; a copy only where torch has a 64-bit type for it.

    gpu: the number of its device, of which torch's current stream waits for the array; None on the CPU.
    """
    if gpu is None:
        array.block_until_ready()
        stream = None
    else:
        stream = torch._C._cuda_getCurrentRawStream(gpu) or _LEGACY_DEFAULT_STREAM
    tensor = from_dlpack(_compat.dlpack_of_array(array, stream))
    return tensor if tensor.dtype == dtype else tensor.to(dtype)
