"""A gate and its value as one kernel: f(x @ w_gate) * (x @ w_value), for GPUs of the Hopper generation.

What SwiGLU and GeGLU begin with (Shazeer 2020, arXiv:2002.05202). Canonical shape: x (*b, k), w_gate and w_value
(k * n,) flat. The contract of the kernel is ffi/kernels/linear.h. Differentiated, it also writes both products, from
which the backward kernel of `gated_activation` makes their cotangents; the four products behind that are XLA's.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zenith_jax.errors import DTypeError, Refusal, ShapeError
from zenith_jax.ir import _compat
from zenith_jax.ops._op import as_batches, dense, is_zero, kernel, widened
from zenith_jax.ops.activation import FORMULAS
from zenith_jax.ops.gated import KERNELS
from zenith_jax.ops.linear import CODES, layout_of, matrix, weights_cotangent
from zenith_jax.ops.linear import unsupported as linear_unsupported


def unsupported(platform: str, *, dtype: Any, w_dtype: Any, k: int, n: int) -> Refusal | None:
    """Why no kernel computes the layer, or None."""
    if platform == "cpu":
        return Refusal("on the CPU a gate and its value are two products and a gated activation")
    return linear_unsupported(platform, dtype=dtype, w_dtype=w_dtype, k=k, n=n)


def _supports(avals: Any, platform: str, *, n: int, **_: Any) -> Refusal | None:
    x, w_gate, _ = avals
    return unsupported(platform, dtype=x.dtype, w_dtype=w_gate.dtype, k=x.shape[-1], n=n)


def _attributes(avals: Any, *, activation: str, transposed: bool, n: int) -> dict[str, Any]:
    del avals, n
    return {"activation": np.int32(CODES[activation]), "transposed": np.int32(transposed)}


def _products(x, w_gate, w_value, activation, transposed):
    """(result, gate, value), widened; the products are rounded to x's dtype, as XLA's are where no kernel runs."""
    gate, value = (widened(x @ matrix(w, x.shape[-1], layout_of(transposed))) for w in (w_gate, w_value))
    return FORMULAS[activation](gate) * value, gate, value


def _backward(operands, results, cotangents, needed, *, activation, transposed, n):
    del n
    x, *weights = operands
    dy = dense(cotangents)[0]
    backward = KERNELS[activation].of_two.backward
    assert backward is not None
    gate, value, dy_rows = (as_batches(a[..., None], 1) for a in (*results[1:], dy))
    found = backward((gate, value), (), (dy_rows,), (0, 1))
    products = [found[i].reshape(dy.shape) for i in (0, 1)]
    for i, more in enumerate(cotangents[1:]):
        if not is_zero(more):
            products[i] = products[i] + more
    cotangent = {}
    if 0 in needed:
        dx = [d @ matrix(w, x.shape[-1], layout_of(transposed)).T for d, w in zip(products, weights, strict=True)]
        cotangent[0] = (dx[0] + dx[1]).astype(x.dtype)
    for i, (d, w) in enumerate(zip(products, weights, strict=True), start=1):
        if i in needed:
            cotangent[i] = weights_cotangent(x, w, d, layout_of(transposed))
    return cotangent


_common = dict(
    supports=_supports,
    ffi_attributes=_attributes,
    partitioned=False,  # as a layer without a gate
)


@kernel("gated_linear_pre_fwd", "*b k, w, w -> *b n, *b n, *b n", (0, 0, 0), visible=3, backward=_backward, **_common)
def gated_linear_pre_fwd(x, w_gate, w_value, *, activation, transposed, n):
    del n
    return tuple(r.astype(x.dtype) for r in _products(x, w_gate, w_value, activation, transposed))


def _saving(operands, **_):
    del operands
    return gated_linear_pre_fwd


@kernel("gated_linear_fwd", "*b k, w, w -> *b n", (0,), saving=_saving, **_common)
def gated_linear_fwd(x, w_gate, w_value, *, activation, transposed, n):
    del n
    return (_products(x, w_gate, w_value, activation, transposed)[0].astype(x.dtype),)


def gated_linear(x, w_gate, w_value, *, activation: str = "silu", transposed: bool = False):
    """f(x @ w_gate) * (x @ w_value), in one kernel of both products.

    x: (*b, k); w_gate and w_value: (k, n), or (n, k) if `transposed`; all of one dtype, bfloat16 or float16 on a GPU
    (others run as XLA code, as everything does on the CPU). Returns (*b, n) in x's dtype, rounded once.
    activation: "silu" (SwiGLU), "gelu_tanh" or "gelu_erf" (GeGLU), which is that of `linear`. Raises ShapeError or
    DTypeError.
    """
    if activation not in KERNELS:
        raise ValueError(f"gated_linear: activation must be one of {', '.join(KERNELS)}, got {activation!r}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise DTypeError(f"gated_linear: x must have a real floating dtype, got {x.dtype}; convert it first")
    if w_gate.dtype != w_value.dtype:
        raise DTypeError(f"gated_linear: the weights must have one dtype, got {w_gate.dtype} and {w_value.dtype}")
    if x.ndim == 0 or w_gate.ndim != 2 or w_gate.shape[transposed] != x.shape[-1] or w_gate.shape != w_value.shape:
        raise ShapeError(
            f"gated_linear: w_gate and w_value must have shape {'(n, k)' if transposed else '(k, n)'} to match x of "
            f"shape (*b, k), got x {x.shape}, w_gate {w_gate.shape} and w_value {w_value.shape}"
        )
    if any(_compat.explicit_sharding(jax.typeof(a)) for a in (x, w_gate, w_value)):
        # XLA splits the products over devices anyway; as they stand here, JAX knows the sharding of their gradients.
        return _products(x, w_gate, w_value, activation, transposed)[0].astype(x.dtype)
    n = w_gate.shape[1 - transposed]
    operands = (as_batches(x, 1), w_gate.reshape(-1), w_value.reshape(-1))
    y = gated_linear_fwd(*operands, activation=activation, transposed=transposed, n=n)[0]
    return y.reshape(*x.shape[:-1], n)
