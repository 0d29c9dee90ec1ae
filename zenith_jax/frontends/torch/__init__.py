# pyright: reportMissingImports=false
"""PyTorch modules run in JAX: `zenith.torch.compile(module)` and `torch.compile(module, backend="zenith")`.

torch is imported when `compile` is called, not before. docs/pytorch.md says what is covered.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

from zenith_jax.errors import FrontendError
from zenith_jax.frontends._source import missing

if TYPE_CHECKING:
    from zenith_jax.frontends._source import Source
    from zenith_jax.frontends.torch.module import CompiledModule

__all__ = ["compile"]


def compile(module: Any, *, dynamic: bool | None = None, strict: bool = False, frozen: bool = False) -> CompiledModule:
    """The module as one whose inference runs in JAX with Zenith's kernels: tensors in, tensors out, weights shared.

    >>> fast = zenith.torch.compile(model.eval())
    >>> with torch.inference_mode():
    ...     logits = fast(input_ids, attention_mask=mask)

    The first call exports the module (seconds); each new combination of sizes is compiled (seconds) without a new
    export where the module allows it. What cannot run in JAX, and every call that needs gradients, runs in torch and
    says why in one FallbackWarning.

    dynamic: False exports for each combination of sizes anew, which can find more to fuse.
    strict: raise TorchError instead of running in torch.
    frozen: promise that weights are not replaced or moved and train() is not called, which saves looking at each before
    every call (0.1 us a weight). Changing weights in place is fine either way.
    """
    require()
    import torch

    from zenith_jax.frontends.torch.module import CompiledModule

    if not isinstance(module, torch.nn.Module):
        raise FrontendError(
            f"zenith.torch.compile takes a torch.nn.Module, got {type(module).__name__}; a function goes to "
            'torch.compile(function, backend="zenith")'
        )
    return CompiledModule(module, dynamic=dynamic, strict=strict, frozen=frozen)


def source(module: Any, *example_inputs: Any) -> Source:
    """For `zenith.compile`."""
    require()
    from zenith_jax.frontends.torch import as_source

    return as_source.source(module, *example_inputs)


def require() -> None:
    """Raises MissingExtraError where a package of the extra [torch] is not installed."""
    for package in ("torch", "onnxscript", "onnx"):
        if importlib.util.find_spec(package) is None:
            raise missing("zenith.torch", package, "torch")
