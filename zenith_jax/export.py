"""jax.export of functions with Zenith's kernels: one call that allows their custom calls, and one that loads them."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax.export as jax_export

from zenith_jax import native
from zenith_jax.api import jit
from zenith_jax.config import configured
from zenith_jax.errors import NativeError
from zenith_jax.ops import _op


def safety_checks() -> list[jax_export.DisabledSafetyCheck]:
    """What `jax.export.export(..., disabled_checks=)` must be given for Zenith's kernels.

    JAX exports only custom calls that it promises to keep working. Zenith's promise: a target's name ends in the
    version of its kernels, and a library of another version does not have it, so that a stale program fails by name
    when it is loaded and never reads operands that it does not understand.
    """
    return [jax_export.DisabledSafetyCheck.custom_call(native.target(name)) for name in sorted(_op.KERNEL_NAMES)]


def export(
    function: Callable, *, platforms: Sequence[str] | None = None, disabled_checks: Sequence[Any] = ()
) -> Callable[..., jax_export.Exported]:
    """export(f)(*args): `jax.export.export` of `f` with its Zenith kernels, an Exported to `.serialize()`.

    function: decorated with `zenith.jit` or `jax.jit`, or plain, which is then decorated with `zenith.jit`.
    platforms: ("cpu",), ("cuda",); one other than this machine's is lowered for without having it. disabled_checks: of
    custom calls that are not Zenith's, those of kernels that you have registered for instance.
    Arguments may be `jax.ShapeDtypeStruct`s, with symbolic dimensions too: ops on these are exported as XLA's
    code, since a kernel is called with its sizes.

    >>> import jax, jax.numpy as jnp, zenith_jax as zenith
    >>> exported = zenith.export(jax.nn.softmax)(jax.ShapeDtypeStruct((64, 512), jnp.float32))
    >>> exported.out_avals
    (ShapedArray(float32[64,512]),)
    """
    jitted: Any = function if hasattr(function, "trace") else jit(function)
    # Kernels are chosen while tracing, for one platform.
    chosen = configured(platform=platforms[0]) if platforms and len(platforms) == 1 else contextlib.nullcontext()

    def exported(*args: Any, **kwargs: Any) -> jax_export.Exported:
        checks = [*safety_checks(), *disabled_checks]
        with chosen:
            return jax_export.export(jitted, platforms=platforms, disabled_checks=checks)(*args, **kwargs)

    return exported


def load_exported(source: bytes | bytearray | str | pathlib.Path) -> jax_export.Exported:
    """The Exported that `serialize()` wrote, from bytes or a file, its kernels registered: `.call(*args)` runs it.

    Needs none of the Python that was exported. Raises NativeError where this machine has no kernels for it.
    """
    data = source if isinstance(source, (bytes, bytearray)) else pathlib.Path(source).read_bytes()
    exported = jax_export.deserialize(bytearray(data))
    here = native.default_platform()
    if here in native.PLATFORMS and here in exported.platforms and "@zenith_" in exported.mlir_module():
        reason = native.unavailable_reason(here)
        if reason is not None:
            raise NativeError(f"the exported program calls Zenith's kernels for {here}, but {reason}")
    return exported
