"""Gated activations, f(gate) * value elementwise: what SwiGLU and GeGLU have between their matrix products.

Shazeer 2020, arXiv:2002.05202. f is one of `activation.FORMULAS`.

Canonical shapes: gate and value (*b, u), every dimension of the user's arrays a batch dimension and u of size 1, as in
`activation`; or x (*b, p, d), gate and value its p = 2 halves, which kernels read where they are: a slice that is an
operand of a custom call would be copied.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from zenith_jax.errors import DTypeError, Refusal, ShapeError
from zenith_jax.ops._op import Kernel, as_batches, check_kernel_dtype, kernel, widened
from zenith_jax.ops.activation import FORMULAS


def _supports(avals: Any, platform: str, **_: Any) -> Refusal | None:
    del platform
    return check_kernel_dtype("gated activation", avals[0].dtype)


class Kernels(NamedTuple):
    of_two: Kernel
    of_halves: Kernel


def _kernels(name: str) -> Kernels:
    """The forward kernels of FORMULAS[name], tied to their backward kernels."""

    def product(gate: Any, value: Any) -> Any:
        return FORMULAS[name](gate) * value

    def product_of_halves(x: Any, gate_half: int) -> Any:
        return product(x[..., gate_half, :], x[..., 1 - gate_half, :])

    @kernel(f"gated_{name}_bwd", "*b u, *b u, *b u -> *b u, *b u", (0, 0), visible=2, supports=_supports)
    def two_bwd(gate, value, dy):
        _, vjp = jax.vjp(product, widened(gate), widened(value))
        return tuple(d.astype(gate.dtype) for d in vjp(widened(dy)))

    def backward(operands, results, cotangents, needed):
        del results, needed
        return dict(enumerate(two_bwd(*operands, cotangents[0])))

    @kernel(f"gated_{name}_fwd", "*b u, *b u -> *b u", (0,), backward=backward, supports=_supports)
    def two_fwd(gate, value):
        return (product(widened(gate), widened(value)).astype(gate.dtype),)

    @kernel(f"gated_{name}_halves_bwd", "*b p d, *b d -> *b p d", (0,), supports=_supports)
    def halves_bwd(x, dy, *, gate_half):
        _, vjp = jax.vjp(lambda x: product_of_halves(x, gate_half), widened(x))
        return (vjp(widened(dy))[0].astype(x.dtype),)

    def backward_of_halves(operands, results, cotangents, needed, *, gate_half):
        del results, needed
        return {0: halves_bwd(operands[0], cotangents[0], gate_half=gate_half)[0]}

    @kernel(f"gated_{name}_halves_fwd", "*b p d -> *b d", (0,), backward=backward_of_halves, supports=_supports)
    def halves_fwd(x, *, gate_half):
        return (product_of_halves(widened(x), gate_half).astype(x.dtype),)

    return Kernels(two_fwd, halves_fwd)


KERNELS = {name: _kernels(name) for name in FORMULAS}


def gated_activation(gate, value, *, activation: str = "silu"):
    """f(gate) * value, elementwise, in float32 inside; one pass of memory, and one for all its gradients.

    gate, value: of one shape and dtype, float32, float16 or bfloat16 (float64 runs as XLA code), as is the result.
    activation: "silu" (SwiGLU), "gelu_tanh" or "gelu_erf" (GeGLU). Raises ShapeError or DTypeError.
    """
    _check("gated_activation", gate, activation)
    if gate.shape != value.shape or gate.dtype != value.dtype:
        raise ShapeError(
            "gated_activation: gate and value must have one shape and dtype, "
            f"got {gate.shape} {gate.dtype} and {value.shape} {value.dtype}"
        )
    operands = (as_batches(a[..., None], 1) for a in (gate, value))
    return KERNELS[activation].of_two(*operands)[0].reshape(gate.shape)


def gated_activation_of_halves(x, *, activation: str = "silu", gate_half: int = 0):
    """f(gate) * value for the halves of x (*b, 2 * d) along its last axis; gate_half: which of them, 0 or 1, is gate.

    Else as `gated_activation`; the halves are not copied, as slices before it would be.
    """
    _check("gated_activation_of_halves", x, activation)
    if x.ndim == 0 or x.shape[-1] % 2 or gate_half not in (0, 1):
        raise ShapeError(
            "gated_activation_of_halves: the last axis of x must be even and gate_half 0 or 1, "
            f"got {x.shape} and {gate_half}"
        )
    width = x.shape[-1] // 2
    halves = as_batches(x.reshape(*x.shape[:-1], 2, width), 2)
    return KERNELS[activation].of_halves(halves, gate_half=gate_half)[0].reshape(*x.shape[:-1], width)


def _check(name: str, x: Any, activation: str) -> None:
    if activation not in KERNELS:
        raise ValueError(f"{name}: activation must be one of {', '.join(KERNELS)}, got {activation!r}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise DTypeError(f"{name}: the arrays must have a real floating dtype, got {x.dtype}; convert them first")
