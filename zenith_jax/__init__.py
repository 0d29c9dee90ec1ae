"""Zenith: the parts of a JAX function that hand-written kernels compute faster run in those kernels.

>>> import zenith_jax as zenith
>>> @zenith.jit
... def train_step(state, batch): ...
"""

import importlib
from typing import Any

from zenith_jax import ops, telemetry
from zenith_jax.api import explain, fuse, jit
from zenith_jax.compiled import CompiledModel, compile, load
from zenith_jax.config import Config, config, configure, configured
from zenith_jax.export import export, load_exported, safety_checks
from zenith_jax.frontends import onnx
from zenith_jax.register import register
from zenith_jax.report import Report, Site
from zenith_jax.verify import Comparison, Verification, verify
from zenith_jax.version import __version__

__all__ = [
    "Comparison",
    "CompiledModel",
    "Config",
    "Report",
    "Site",
    "Verification",
    "__version__",
    "compile",
    "config",
    "configure",
    "configured",
    "explain",
    "export",
    "fuse",
    "jit",
    "load",
    "load_exported",
    "onnx",
    "ops",
    "register",
    "safety_checks",
    "telemetry",
    "verify",
]

# Imported when they are used: what needs a framework, as zenith.flax.wrap(module) does, and what few need.
_DOORS = {
    "flax": "zenith_jax.frontends.flax",
    "serving": "zenith_jax.serving",
    "tensorflow": "zenith_jax.frontends.tensorflow",
    "torch": "zenith_jax.frontends.torch",
}


def __getattr__(name: str) -> Any:
    if name in _DOORS:
        return importlib.import_module(_DOORS[name])
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
