"""The native modules `_cpu` and `_cuda`: loads them, registers their custom calls once, says why it cannot.

Nothing is imported before it is asked for, so a program that runs on the CPU never touches CUDA, and
no JAX backend starts from here. Custom-call names, ABI: https://docs.jax.dev/en/latest/ffi.html
"""

from __future__ import annotations

import functools as ft
import importlib
import importlib.util
import pathlib
import re
import threading
from types import ModuleType
from typing import Any

import jax

from zenith_jax.errors import NativeError

# Part of every target's name. XLA's persistent compilation cache keys on the name and does not know
# the shared object behind it: raise this when a target's operands, attributes or meaning change.
# CMakeLists.txt reads it from here for the C++ side.
KERNEL_VERSION = 7

# platform as jax lowers for it -> platform as jax.ffi registers for it
PLATFORMS = {"cpu": "cpu", "cuda": "CUDA"}

# jaxlib 0.10.2, the oldest that Zenith supports; XLA_FFI_API_MAJOR and _MINOR of its headers.
OLDEST_FFI_API_VERSION = (0, 3)

_INSTALL = {
    "cpu": "run `pip install .` in a checkout of Zenith (it needs a C++20 compiler: `apt install g++`)",
    "cuda": "run `pip install . -C cmake.define.ZENITH_CUDA=ON` in a checkout of Zenith (it needs nvcc 12.0 or newer)",
}

_lock = threading.Lock()
_registered: dict[str, ModuleType] = {}
_batch_partitionable: set[str] = set()


def default_platform() -> str:
    """The platform that JAX computes on where arrays do not say: of `jax.default_device`, else of its backend."""
    return platform_of(default_device())


def default_device() -> Any:
    """The `jax.Device` where JAX computes if arrays do not say."""
    device = jax.config.jax_default_device or jax.local_devices()[0]  # pyright: ignore[reportAttributeAccessIssue]
    return jax.local_devices(backend=device)[0] if isinstance(device, str) else device


def memory_bytes(device: Any) -> int | None:
    """The memory that JAX may use on a device; None where it does not say, as for CPUs."""
    return (device.memory_stats() or {}).get("bytes_limit")


def platform_of(device: Any) -> str:
    """A device's platform as jax lowers for it: "cpu", "cuda", "tpu", ..."""
    return "cuda" if device.platform == "gpu" else device.platform


def target(name: str) -> str:
    """The custom-call target of a kernel: "rms_norm_fwd" -> "zenith_rms_norm_fwd_v1"."""
    return f"zenith_{name}_v{KERNEL_VERSION}"


def ensure_registered(platform: str) -> None:
    """Makes the kernels for "cpu" or "cuda" known to XLA. Cheap after the first call; any thread.

    Raises NativeError, with `unavailable_reason(platform)`, if that cannot be.
    """
    if platform in _registered:
        return
    reason = unavailable_reason(platform)
    if reason is not None:
        raise NativeError(reason)


def unavailable_reason(platform: str) -> str | None:
    """Why the kernels for "cpu" or "cuda" cannot run here and the command that fixes it, or None.

    A machine without a GPU is no reason: a program can be lowered for CUDA there. `zenith doctor`
    tells of devices.
    """
    if platform not in PLATFORMS:
        raise ValueError(f"platform must be one of {sorted(PLATFORMS)}, got {platform!r}")
    with _lock:
        if platform in _registered:
            return None
        module = _load(platform)
        if isinstance(module, str):
            return module
        _register(module, platform)
        _registered[platform] = module
        return None


def module(platform: str) -> ModuleType | None:
    """The native module of a platform, registered, or None where `unavailable_reason` says why."""
    return _registered[platform] if unavailable_reason(platform) is None else None


def instruction_set() -> str:
    """What the CPU's kernels run with here: "avx512", "avx2" or "portable"; "" where they cannot run."""
    cpu = module("cpu")
    return cpu.instruction_sets[0] if cpu is not None else ""


@ft.cache
def running_ffi_api_version() -> tuple[int, int]:
    """XLA FFI version of the jaxlib in this process, read from the headers that it ships."""
    header = pathlib.Path(jax.ffi.include_dir()) / "xla" / "ffi" / "api" / "c_api.h"
    try:
        text = header.read_text()
    except FileNotFoundError:
        return OLDEST_FFI_API_VERSION  # a repackaged jaxlib: assume no more than what is required
    major = re.search(r"#define XLA_FFI_API_MAJOR (\d+)", text)
    minor = re.search(r"#define XLA_FFI_API_MINOR (\d+)", text)
    return (int(major[1]), int(minor[1])) if major and minor else OLDEST_FFI_API_VERSION


@ft.cache
def _load(platform: str) -> ModuleType | str:
    """The module, fit to be registered, or why it is not."""
    name = f"zenith_jax._{platform}"
    if importlib.util.find_spec(name) is None:
        return f"{name} is not built: {_INSTALL[platform]}"
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        return f"{name} does not load ({error}): {_INSTALL[platform]} to build it for this machine"
    return _misfit(module, platform) or module


def _misfit(module: ModuleType, platform: str) -> str | None:
    if module.kernel_version != KERNEL_VERSION:
        return (
            f"{module.__name__} was built from other sources (kernel version {module.kernel_version}, "
            f"Python expects {KERNEL_VERSION}): {_INSTALL[platform]}"
        )
    built, running = tuple(module.ffi_api_version), running_ffi_api_version()
    # XLA refuses a handler of a later version by refusing to start the backend: all of JAX is gone,
    # not just the call. A major version may change anything.
    if built > running or built[0] != running[0]:
        return (
            f"{module.__name__} was built for XLA FFI {built[0]}.{built[1]}, jaxlib {jax.lib.__version__} "
            f"speaks {running[0]}.{running[1]}: {_INSTALL[platform]}, or install a newer jaxlib"
        )
    if platform == "cuda":
        driver, runtime = module.driver_version(), module.cuda_version
        # Within a major version any driver runs any runtime; 0 means no driver, hence no device.
        if driver and driver // 1000 < runtime // 1000:
            return (
                f"the NVIDIA driver supports CUDA {driver // 1000}, {module.__name__} was built with "
                f"CUDA {runtime // 1000}: update the driver, or with an older nvcc on PATH "
                f"{_INSTALL['cuda']}"
            )
    return None


def _register(module: ModuleType, platform: str) -> None:
    for name, handler in module.targets().items():
        jax.ffi.register_ffi_target(name, handler, platform=PLATFORMS[platform])
        # Lets the partitioner shard leading axes (num_batch_dims) without gathering; per name.
        if name not in _batch_partitionable:
            jax.ffi.register_ffi_target_as_batch_partitionable(name)
            _batch_partitionable.add(name)
