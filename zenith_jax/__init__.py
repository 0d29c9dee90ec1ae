"""Zenith: the parts of a JAX function that hand-written kernels compute faster run in those kernels.

>>> import zenith_jax as zenith
>>> @zenith.jit
... def train_step(state, batch): ...
"""

from zenith_jax import ops
from zenith_jax.api import explain, fuse, jit
from zenith_jax.config import Config, config, configure, configured
from zenith_jax.export import export, load_exported, safety_checks
from zenith_jax.frontends import onnx
from zenith_jax.register import register
from zenith_jax.report import Report, Site
from zenith_jax.verify import Comparison, Verification, verify

__version__ = "0.1.0"

__all__ = [
    "Comparison",
    "Config",
    "Report",
    "Site",
    "Verification",
    "config",
    "configure",
    "configured",
    "explain",
    "export",
    "fuse",
    "jit",
    "load_exported",
    "onnx",
    "ops",
    "register",
    "safety_checks",
    "verify",
]
