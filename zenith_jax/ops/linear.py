"""A linear layer as one kernel: activation(x @ w + bias) + residual, for GPUs of the Hopper generation and the CPU.

Canonical shape: x (*b, k), w (k * n,) flat, in one of three layouts, bias (n,), residual (*b, n) or absent. The
contract of the kernels is ffi/kernels/linear.h. Differentiated, the forward kernel also writes x @ w + bias; from it
the backward kernel takes the activation's derivative, and the bias's gradient in the same pass. The two products of the
backward pass are XLA's.
"""

from __future__ import annotations

import functools as ft
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zenith_jax.errors import DTypeError, Refusal, ShapeError
from zenith_jax.ir import _compat
from zenith_jax.ops._groups import grouped
from zenith_jax.ops._op import (
    absent,
    as_batches,
    check_kernel_dtype,
    dense,
    is_absent,
    is_zero,
    kernel,
    summed_to,
    widened,
)
from zenith_jax.ops.activation import FORMULAS, KERNELS

ACTIVATIONS = {
    "none": lambda x: x,
    "relu": jax.nn.relu,
    "maximum": lambda x: jnp.maximum(x, 0),  # relu with the derivative 1/2 at 0
    "relu_squared": lambda x: jnp.square(jax.nn.relu(x)),
    "tanh": jnp.tanh,
    **FORMULAS,  # gelu_erf, gelu_tanh, silu
}
CODES = {  # Epilogue in ffi/kernels/linear.h
    "none": 0, "relu": 1, "maximum": 1, "relu_squared": 2, "tanh": 3, "silu": 4, "gelu_tanh": 5, "gelu_erf": 6,
}  # fmt: skip

LAYOUTS = ("rows", "columns", "panels")  # of the weights: WeightLayout in ffi/kernels/linear.h
PANEL = 64  # kPanelColumns there

ALIGNED = 8  # elements of 16 bits: rows start at multiples of 16 bytes, as the copy engine wants
HOPPER = "9.0"
LEAST_WEIGHTS = 65536  # on the CPU: 256 KiB, whose way from memory is what the kernel hides


@ft.cache
def compute_capability() -> str:
    """Of the GPU; without one the call is made by name, for a machine that has it (`_lower.unavailable`)."""
    try:
        return str(jax.devices("cuda")[0].compute_capability)
    except RuntimeError:
        return HOPPER


def unsupported(platform: str, *, dtype: Any, w_dtype: Any, k: int, n: int, layout: str = "rows") -> Refusal | None:
    """Why no kernel computes the layer, or None."""
    if platform == "cpu":
        if {np.dtype(dtype), np.dtype(w_dtype)} != {np.dtype(jnp.float32)}:
            return Refusal(
                "on the CPU a linear layer has a kernel for float32, not for {x} x {w}",
                dict(x=np.dtype(dtype).name, w=np.dtype(w_dtype).name),
            )
        if k * n < LEAST_WEIGHTS:
            return Refusal("XLA's product is as good for {k} x {n} weights on the CPU", dict(k=k, n=n))
        return None
    if platform != "cuda" or layout == "panels":
        return Refusal(
            "a linear layer of weights in {layout} has no kernel for {platform}", dict(layout=layout, platform=platform)
        )
    if np.dtype(dtype) not in (np.dtype(jnp.bfloat16), np.dtype(jnp.float16)) or dtype != w_dtype:
        return Refusal(
            "a linear layer has kernels for bfloat16 and float16, not for {x} x {w}",
            dict(x=np.dtype(dtype).name, w=np.dtype(w_dtype).name),
        )
    if k == 0 or k % ALIGNED or n % ALIGNED:
        return Refusal(
            "{k} features to {n}: both must be multiples of {m}", dict(k=k, n=n, m=ALIGNED), "pad the weights"
        )
    if compute_capability() != HOPPER:
        return Refusal(
            "the kernel needs compute capability {want}, this GPU has {cc}",
            dict(want=HOPPER, cc=compute_capability()),
        )
    return None


def _supports(avals: Any, platform: str, *, layout: str, **_: Any) -> Refusal | None:
    x, w, bias, residual = avals
    if bias.dtype not in (x.dtype, jnp.float32) or (not is_absent(residual) and residual.dtype != x.dtype):
        return Refusal(
            "bias must be {dtype} or float32 and residual {dtype}, got {bias} and {residual}",
            dict(dtype=x.dtype.name, bias=bias.dtype.name, residual=residual.dtype.name),
        )
    return unsupported(platform, dtype=x.dtype, w_dtype=w.dtype, k=x.shape[-1], n=bias.shape[0], layout=layout)


def _attributes(avals: Any, *, activation: str, layout: str) -> dict[str, Any]:
    del avals
    return {"activation": np.int32(CODES[activation]), "layout": np.int32(LAYOUTS.index(layout))}


def _with_full_residual(operands: Any, platform: str, **_: Any) -> list[Any]:
    """The kernel reads a residual of every row: one that vmap shares is repeated."""
    del platform
    x, w, bias, residual = operands
    if not is_absent(residual):
        residual = jnp.broadcast_to(residual, (*x.shape[:-1], bias.shape[0]))
    return [x, w, bias, residual]


def layout_of(transposed: bool) -> str:
    return "columns" if transposed else "rows"


def matrix(w: Any, k: int, layout: str) -> Any:
    """w, flat or in the shape of its layout, as (k, n)."""
    if layout == "rows":
        return w.reshape(k, -1)
    if layout == "columns":
        return w.reshape(-1, k).T
    return w.reshape(-1, k, PANEL).swapaxes(0, 1).reshape(k, -1)


def in_panels(w: Any, k: int, layout: str) -> Any:
    """w, (k * n,) of another layout, in panels: n must be a multiple of PANEL."""
    return matrix(w, k, layout).reshape(k, -1, PANEL).swapaxes(0, 1).reshape(-1)


def weights_cotangent(x: Any, w: Any, dy: Any, layout: str) -> Any:
    """Of w in x @ w, flat, from that of the product."""
    batch = tuple(range(dy.ndim - 1))
    rows = (dy, x) if layout == "columns" else (x, dy)
    found = jnp.tensordot(*rows, axes=(batch, batch)).astype(w.dtype).reshape(-1)
    return in_panels(found, x.shape[-1], "rows") if layout == "panels" else found


def _derivatives(activation: str, pre: Any, dy: Any) -> Any:
    _, vjp = jax.vjp(FORMULAS[activation], widened(pre))
    return vjp(widened(dy))[0]


_backward_common = dict(
    visible=2,
    supports=lambda avals, platform, **_: check_kernel_dtype("linear", avals[0].dtype),
    partitioned=False,  # as the layer
)


@kernel(
    "linear_bwd",
    "*b r n, *b r n -> *b r n, *b n",
    (0, jnp.float32),
    ffi_attributes=lambda avals, *, activation: {"activation": np.int32(list(FORMULAS).index(activation))},
    **_backward_common,
)
def _linear_bwd_of_groups(pre, dy, *, activation):
    dpre = _derivatives(activation, pre, dy)
    return dpre.astype(pre.dtype), jnp.sum(dpre, -2, dtype=jnp.float32)


# Of rows in all. Blocks have 512 bytes of a row, so that few groups fill an H100, and few are less to add up. us of 64,
# 32 and 16 rows a group: 16384x3072 110, 110, 111; 4096x4096 40, 40, 40; 8192x768 17, 17, 17 (bfloat16, 2026-11-26).
_GROUPS = 128


def _by_groups(operands, partitions, *, activation, kept):
    """As the norms' cotangents: a group's rows are summed by the kernel, the groups by XLA."""
    pre, dy = operands
    batch = grouped(pre.shape[:-1], kept, partitions, _GROUPS)
    shape = (*batch, pre.shape[-1])
    dpre, sums = _linear_bwd_of_groups(pre.reshape(shape), dy.reshape(shape), activation=activation)
    return dpre.reshape(pre.shape), jnp.sum(sums, range(kept, len(batch) - 1))


@kernel("linear_bwd", "*b n, *b n -> *b n, *k n", (0, jnp.float32), lowered=_by_groups, **_backward_common)
def linear_bwd(pre, dy, *, activation, kept):
    """(dy times the activation's derivative at pre, its sum over rows)."""
    dpre = _derivatives(activation, pre, dy)
    return dpre.astype(pre.dtype), jnp.sum(dpre, range(kept, dpre.ndim - 1), dtype=jnp.float32)


def _activation_cotangent(activation: str, x: Any, dy: Any) -> Any:
    """By the activation's own backward kernel where there is one. XLA would compute the derivative twice, for the
    products and in the sum that is the bias's gradient."""
    if activation in KERNELS and (backward := KERNELS[activation].backward) is not None:
        operand, cotangent = (as_batches(a[..., None], 1) for a in (x, dy))
        return backward((operand,), (), (cotangent,), (0,))[0].reshape(dy.shape)
    _, vjp = jax.vjp(ACTIVATIONS[activation], widened(x))
    return vjp(widened(dy))[0].astype(dy.dtype)


def _backward(operands, results, cotangents, needed, *, activation, layout):
    x, w, bias, residual = operands
    dy = dense(cotangents)[0]
    dpre, dbias = dy, None
    alone = len(cotangents) == 1 or is_zero(cotangents[1])  # nothing else reaches pre
    if alone and 2 in needed and activation in KERNELS:
        dpre, dbias = linear_bwd(results[-1], dy, activation=activation, kept=0)
    elif activation != "none":  # of relu, the result says as much as what it came from
        dpre = _activation_cotangent(activation, results[-1], dy)
    if not alone:
        dpre = dpre + cotangents[1]
    batch = tuple(range(dpre.ndim - 1))
    cotangent = {}
    if 0 in needed:
        cotangent[0] = (dpre @ matrix(w, x.shape[-1], layout).T).astype(x.dtype)
    if 1 in needed:
        cotangent[1] = weights_cotangent(x, w, dpre, layout)
    if 2 in needed:
        cotangent[2] = (jnp.sum(widened(dpre), batch) if dbias is None else dbias).astype(bias.dtype)
    if 3 in needed:
        cotangent[3] = summed_to(dy, residual.shape)
    return cotangent


def _saving(operands, *, activation, layout):
    """Which kernel runs where the layer is differentiated."""
    del layout
    enough = activation == "none" or (activation == "relu" and is_absent(operands[3]))
    return None if enough else linear_pre_fwd


_SIGNATURE = "*b k, w, n, ?*b n -> *b n"
_common = dict(
    backward=_backward,
    supports=_supports,
    ffi_attributes=_attributes,
    adapted=_with_full_residual,
    partitioned=False,  # the product's other axes, too, may be what is sharded
)


def _layer(x, w, bias, residual, activation, layout):
    """(result, pre-activation), widened. The product is rounded to x's dtype, as XLA's is where no kernel runs: in
    float32 it would cross memory in twice the bytes."""
    pre = widened(x @ matrix(w, x.shape[-1], layout)) + widened(bias)
    y = ACTIVATIONS[activation](pre)
    return (y if is_absent(residual) else y + widened(residual)), pre


@kernel("linear_fwd", _SIGNATURE, (0,), saving=_saving, **_common)
def linear_fwd(x, w, bias, residual, *, activation, layout):
    return (_layer(x, w, bias, residual, activation, layout)[0].astype(x.dtype),)


@kernel("linear_pre_fwd", f"{_SIGNATURE}, *b n", (0, 0), visible=2, **_common)
def linear_pre_fwd(x, w, bias, residual, *, activation, layout):
    return tuple(r.astype(x.dtype) for r in _layer(x, w, bias, residual, activation, layout))


def linear(x, w, bias=None, residual=None, *, activation: str = "none", transposed: bool = False):
    """activation(x @ w + bias) + residual.

    x: (*b, k), w: (k, n), or (n, k) if `transposed`; bias: (n,); residual: (*b, n); all of one dtype, bfloat16 or
    float16 on a GPU and float32 on the CPU (others run as XLA code); bias may also be float32. Returns (*b, n) in x's
    dtype, rounded once: products, activation and sums are float32 inside.
    activation: "none", "relu", "maximum" (relu with the derivative 1/2 at 0), "relu_squared", "tanh", "silu",
    "gelu_tanh" or "gelu_erf". On a GPU gelu_erf is a logistic function of a polynomial, less far from the formula than
    float16 rounds.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"linear: activation must be one of {sorted(ACTIVATIONS)}, got {activation!r}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise DTypeError(f"linear: x must have a real floating dtype, got {x.dtype}; convert it first")
    if x.ndim == 0 or w.ndim != 2 or w.shape[transposed] != x.shape[-1]:
        raise ShapeError(
            f"linear: w must have shape {'(n, k)' if transposed else '(k, n)'} to match x of shape (*b, k), "
            f"got x {x.shape} and w {w.shape}"
        )
    n = w.shape[1 - transposed]
    if bias is None:
        bias = jnp.zeros((n,), x.dtype)
    shape, layout = (*x.shape[:-1], n), layout_of(transposed)
    if bias.shape != (n,) or (residual is not None and residual.shape != shape):
        raise ShapeError(
            f"linear: bias must have shape {(n,)} and residual {shape}, got {bias.shape} and "
            f"{None if residual is None else residual.shape}"
        )
    if any(_compat.explicit_sharding(jax.typeof(a)) for a in (x, w)):
        # XLA splits the product over devices anyway; as it stands here, JAX knows the sharding of its gradients.
        more = absent(x.dtype) if residual is None else residual
        return _layer(x, w, bias, more, activation, layout)[0].astype(x.dtype)
    more = absent(x.dtype) if residual is None else as_batches(residual, 1)
    y = linear_fwd(as_batches(x, 1), w.reshape(-1), bias, more, activation=activation, layout=layout)[0]
    return y.reshape(shape)
