"""Elementwise activations: gelu (erf and tanh) and silu.

Canonical shape: x (*b, u), every dimension of the user's array a batch dimension and u of size 1: where all dimensions
of an operand are batch dimensions, XLA's partitioner gathers it (seen on the CPU).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from zenith_jax.errors import DTypeError, Refusal
from zenith_jax.ops._op import Kernel, as_batches, check_kernel_dtype, kernel, widened


def gelu_erf_formula(x: Any) -> Any:
    """x/2 * (1 + erf(x/sqrt(2))). Hendrycks and Gimpel 2016, arXiv:1606.08415."""
    return jax.nn.gelu(x, approximate=False)


def gelu_tanh_formula(x: Any) -> Any:
    """x/2 * (1 + tanh(sqrt(2/pi) * (x + 0.044715 x^3))). Same paper."""
    return jax.nn.gelu(x, approximate=True)


def silu_formula(x: Any) -> Any:
    """x / (1 + exp(-x)). Same paper; as "swish" Ramachandran et al. 2017, arXiv:1710.05941."""
    return x * jax.lax.logistic(x)


FORMULAS = {"gelu_erf": gelu_erf_formula, "gelu_tanh": gelu_tanh_formula, "silu": silu_formula}


def _supports(avals: Any, platform: str, **_: Any) -> Refusal | None:
    del platform
    return check_kernel_dtype("activation", avals[0].dtype)


def _kernels(name: str) -> Kernel:
    """The forward kernel of FORMULAS[name], tied to its backward kernel."""
    formula = FORMULAS[name]

    @kernel(f"{name}_bwd", "*b u, *b u -> *b u", (0,), supports=_supports)
    def backward_kernel(x, dy):
        _, vjp = jax.vjp(formula, widened(x))
        return (vjp(widened(dy))[0].astype(x.dtype),)

    def backward(operands, results, cotangents, needed):
        del results, needed
        return {0: backward_kernel(operands[0], cotangents[0])[0]}

    @kernel(f"{name}_fwd", "*b u -> *b u", (0,), backward=backward, supports=_supports)
    def forward_kernel(x):
        return (formula(widened(x)).astype(x.dtype),)

    return forward_kernel


KERNELS = {name: _kernels(name) for name in FORMULAS}


def activation(name: str, x: Any) -> Any:
    """FORMULAS[name](x), elementwise, in float32 inside."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise DTypeError(f"{name}: x must have a real floating dtype, got {x.dtype}; convert it first")
    return KERNELS[name](as_batches(x[..., None], 1))[0].reshape(x.shape)


def gelu(x, approximate: bool = True):
    """Gaussian error linear unit, elementwise; `approximate` chooses the tanh formula, as in `jax.nn.gelu`.

    x: any shape, float32, float16 or bfloat16 (float64 runs as XLA code); the result has its shape and dtype.
    """
    return activation("gelu_tanh" if approximate else "gelu_erf", x)


def silu(x):
    """x * sigmoid(x), elementwise. Shapes and dtypes as in `gelu`."""
    return activation("silu", x)
