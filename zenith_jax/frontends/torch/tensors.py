# pyright: reportMissingImports=false
"""Tensors to arrays and back, in place: DLPack on the CPU and on GPUs, ordered with torch's current CUDA stream.

JAX has no 64-bit types unless jax_enable_x64 is set, and DLPack would narrow by a silent copy. So an int64 tensor
crosses as pairs of int32, of which the compiled program reads the low word: no copy and no conversion kernel.
"""

from __future__ import annotations

import ctypes
import functools as ft
import threading
import weakref
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax import lax
from torch.utils.dlpack import to_dlpack

from zenith_jax.frontends.torch import exchange
from zenith_jax.frontends.torch.errors import TorchError
from zenith_jax.ir import _compat
from zenith_jax.ops._lower import compute_stream, is_launched_by_caller

_INT32 = torch.iinfo(torch.int32)
WIDE = (torch.float64, torch.complex128)
_PAIRS = {torch.int64: torch.int32, torch.uint64: torch.uint32}


def is_wide(tensor: torch.Tensor) -> bool:
    """Whether the tensor has a type that is computed in 64 bits or not at all."""
    return tensor.dtype in WIDE


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
        self.known: dict[tuple[int, torch.Size], jax.Array] = {}  # by address and shape, memory not kept

    def aval(self, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
        sharding = jax.sharding.SingleDeviceSharding(self.device)
        if self.pair is None:
            return jax.ShapeDtypeStruct(shape, self.dtype, sharding=sharding)
        return jax.ShapeDtypeStruct((*(shape or (1,)), 2), jax_dtype(self.pair), sharding=sharding)

    def __call__(self, tensor: torch.Tensor) -> jax.Array:
        """The array of the tensor's elements, of `aval`'s type. Aliases the tensor where that is dense and aligned, and
        keeps its memory."""
        dense = tensor if self.is_dense(tensor) else tensor.resolve_conj().resolve_neg().contiguous()
        latest = self.latest
        if latest is not None and latest[0]() is dense and dense.data_ptr() == latest[1] and self._is_written(dense):
            return latest[2]
        # A tensor of its own for JAX to keep the memory of, so that the given one can be let go.
        array = self._array(dense.detach(), _stream_that_waits(self.device, tensor.device) if self.on_gpu else None)
        if self.pair is None and dense is tensor and _is_aligned(tensor):
            self._keep(tensor, array)
        return array

    def is_dense(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor's elements lie in memory one after the other, as they are."""
        if tensor.layout is not torch.strided:
            raise TorchError(f"a tensor of layout {tensor.layout} does not cross to JAX; call to_dense() before")
        return tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()

    def of_call(self, tensor: torch.Tensor, is_ordered: bool) -> jax.Array:
        """As `__call__`, for a tensor that the caller keeps until what reads the array is waited for: by this thread on
        a CPU, by torch's stream on a GPU. is_ordered: what reads it comes after what torch's stream has had to do.

        Arrays of such borrowed memory are kept by address, for torch gives out the same memory again and again: to make
        one takes 12 us, with an event of its own on a GPU 46, and programs wait 15 us longer for that event (H100, jax
        0.11.2, 2026-11-26). A copy that is made here comes later than the order, and is kept by its own array.
        """
        if not is_ordered or not self.is_dense(tensor):
            return self(tensor)
        try:
            address, shape = tensor.data_ptr(), tensor.shape
        except RuntimeError as error:  # of torch.func's transforms
            raise TorchError(f"a tensor without memory does not cross to JAX: {error}") from None
        if not address or address % ALIGNMENT:  # empty, or copied by JAX
            return self(tensor)
        array = self.known.get((address, shape))
        if array is None:
            view = _unowned(address, tensor.nbytes, tensor.device).view(tensor.dtype).view(shape)
            array = self._array(view, None)
            if len(self.known) >= MOST_KNOWN:
                self.known.clear()
            self.known[address, shape] = array
        elif self.pair is not None:
            self.check_range(tensor)
        return array

    def _array(self, tensor: torch.Tensor, stream: int | None) -> jax.Array:
        if not tensor.data_ptr() and tensor.numel():
            raise TorchError("a tensor without memory (fake, functional or of zeros) does not cross to JAX")
        if self.pair is not None:
            self.check_range(tensor)
            tensor = (tensor if tensor.ndim else tensor.reshape(1)).view(self.pair).unflatten(-1, (-1, 2))
        return _compat.array_from_dlpack(to_dlpack(tensor), self.device, stream)

    def _keep(self, tensor: torch.Tensor, array: jax.Array) -> None:
        """For the next call with this very tensor; a view of its memory takes 30 us to make on a GPU."""
        self.latest = weakref.ref(tensor, self._forget), tensor.data_ptr(), array

    def _forget(self, dead: weakref.ref) -> None:
        if self.latest is not None and self.latest[0] is dead:
            self.latest = None  # and the memory with it

    def _is_written(self, tensor: torch.Tensor) -> bool:
        """Whether what torch has written to the tensor is there, with nothing to wait for."""
        return not self.on_gpu or _current_stream(tensor.device.index or 0).query()

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


def _current_stream(index: int) -> Any:
    """`torch.cuda.current_stream(index)`, without its 8 us."""
    key = index, torch._C._cuda_getCurrentRawStream(index)
    stream = _in_thread.streams.get(key)
    if stream is None:
        stream = _in_thread.streams[key] = torch.cuda.current_stream(index)
    return stream


def _wait(stream: int, index: int) -> None:
    """The stream waits for what torch's current one has to do."""
    if (wait_for_stream := exchange.wait_for_stream()) is not None:
        return wait_for_stream(stream, torch._C._cuda_getCurrentRawStream(index), index)
    waits = _in_thread.waits.get(stream)
    if waits is None:
        with torch.cuda.device(index):
            waits = _in_thread.waits[stream] = torch.cuda.Event(), torch.cuda.ExternalStream(stream, index)
    event, external = waits
    event.record(_current_stream(index))
    external.wait_event(event)


def _stream_that_waits(device: Any, torch_device: torch.device) -> int:
    """JAX's stream for memory of others, waiting for torch's current one, as DLPack prescribes: what
    `tensor.__dlpack__(stream=)` does in 22 us, making the event and both stream objects anew."""
    stream = device.get_stream_for_external_ready_events()
    _wait(stream, torch_device.index or 0)
    return stream


def order_after_torch(compute_stream: int | None, index: int) -> bool:
    """Makes programs that are called from now on wait for what torch's current stream has to do. False where it is not
    known on which stream they run."""
    if compute_stream is None or _compat.execution_stream_id():
        return False
    _wait(compute_stream, index)
    return True


MOST_KNOWN = 64  # addresses of each input


class _Memory:
    """Memory of a GPU, for torch. https://numba.readthedocs.io/en/stable/cuda/cuda_array_interface.html, version 2."""

    def __init__(self, address: int, size_bytes: int):
        self.__cuda_array_interface__ = dict(shape=(size_bytes,), typestr="|u1", data=(address, False), version=2)


def _unowned(address: int, size_bytes: int, device: torch.device) -> torch.Tensor:
    """The bytes there, which the tensor does not keep."""
    if device.type == "cpu":
        return torch.frombuffer((ctypes.c_ubyte * size_bytes).from_address(address), dtype=torch.uint8)
    return torch.as_tensor(_Memory(address, size_bytes), device=device)


ALIGNMENT = 64  # bytes; JAX copies what is aligned to less


def _is_aligned(tensor: torch.Tensor) -> bool:
    return tensor.data_ptr() % ALIGNMENT == 0


@ft.cache
def inlet_of(dtype: torch.dtype, device: torch.device, wide: bool) -> Inlet:
    """The Inlet of dense tensors of this kind."""
    return Inlet(torch.empty(0, dtype=dtype, device=device), wide)


def shares_memory(tensor: torch.Tensor, array: jax.Array) -> bool:
    return tensor.numel() == 0 or array.unsafe_buffer_pointer() == tensor.data_ptr()


_LEGACY_DEFAULT_STREAM = 1  # as DLPack numbers it, where CUDA and torch say 0


class Outlet:
    """How results of a program on one device become tensors; in place but for torch's 64-bit types."""

    def __init__(self, device: Any, dtypes: Sequence[torch.dtype]):
        self.dtypes = list(dtypes)
        self.gpu = device.local_hardware_id if device.platform == "gpu" else None
        # Of programs whose results are there when what is in it now has been done.
        self.stream = compute_stream(device) if self.gpu is not None and is_launched_by_caller(device) else None
        self.wait: Any = exchange.wait_for_stream()
        self.is_converted = False
        self.made: dict[tuple[Any, ...], list[Any]] = {}  # by the results' shapes: for each its native outlet

    def __call__(self, arrays: Sequence[jax.Array]) -> list[torch.Tensor]:
        """Tensors in the memory of the arrays, which torch's current stream waits for.

        The arrays are the results of one call that this thread has made, in the order of `dtypes`.
        """
        shapes = tuple([a.shape for a in arrays])
        outlets = self.made.get(shapes)
        if outlets is None:
            outlets = self.made[shapes] = [exchange.outlet(a) for a in arrays]
            self.is_converted = any(jax_dtype(d) != a.dtype for d, a in zip(self.dtypes, arrays, strict=True))
        stream = self.stream
        if self.gpu is None:
            for array in arrays:
                array.block_until_ready()
        elif stream is not None and not _compat.execution_stream_id():
            self.wait(torch._C._cuda_getCurrentRawStream(self.gpu), stream, self.gpu)
        else:
            return [self._by_capsule(a, d) for a, d in zip(arrays, self.dtypes, strict=True)]
        return [
            self._by_capsule(a, d) if outlet is None else _as(outlet.tensor(a.unsafe_buffer_pointer(), a), d)
            for outlet, a, d in zip(outlets, arrays, self.dtypes, strict=True)
        ]

    def native(self) -> list[Any] | None:
        """The native outlets of the latest results, where all of them have one and are what torch takes for them."""
        if len(self.made) != 1:
            return None
        (outlets,) = self.made.values()
        return None if None in outlets or self.is_converted else outlets

    def _by_capsule(self, array: jax.Array, dtype: torch.dtype) -> torch.Tensor:
        stream = None
        if self.gpu is not None:
            stream = torch._C._cuda_getCurrentRawStream(self.gpu) or _LEGACY_DEFAULT_STREAM
        return _as(torch._C._from_dlpack(_compat.dlpack_of_array(array, stream)), dtype)


def _as(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor if tensor.dtype == dtype else tensor.to(dtype)
