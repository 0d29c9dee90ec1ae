"""A linear layer with integer weights and float inputs: y = x @ (w * scale) + bias. Weight-only quantisation.

Canonical shape: x (*b, k), w (k * n,) flat, int8 or int4, scale (g * n,) flat, bias (n,) or (0,). The contract of the
kernels is ffi/kernels/quantized_linear.h. They pay where rows are few, and weights from memory are what takes time:
the weights cross it in their own bytes. The derivative is the reference's: XLA's products with the widened weights.

Scales are multiplied behind the sum over a group: an infinite one gives an infinity, where 0 times it would be NaN.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zenith_jax.errors import DTypeError, Refusal, ShapeError
from zenith_jax.ir import _compat
from zenith_jax.ops._op import absent, as_batches, check_kernel_dtype, is_absent, kernel, widened

WEIGHT_DTYPES = (jnp.int8, jnp.int4)
CUDA_ROWS = 16  # kQuantizedRows in ffi/kernels/quantized_linear.h: the rows of one tensor-core tile
# k of a group, and n, of the kernel for CUDA: its steps, and whole pieces of 16 bytes.
CUDA_K, CUDA_K_TRANSPOSED = 16, 64
CUDA_N, CUDA_N_4_BIT = 16, 32


def unsupported(
    platform: str, *, dtype: Any, w_dtype: Any, rows: int, k: int, n: int, groups: int, transposed: bool
) -> Refusal | None:
    """Why no kernel computes the layer, or None."""
    refusal = check_kernel_dtype("quantized_linear", dtype)
    if refusal is not None:
        return refusal
    if k == 0 or n == 0:
        return Refusal("an operand is empty")
    is_4_bit = jnp.dtype(w_dtype) == jnp.int4
    if is_4_bit and (n % 2 if not transposed else (k // groups) % 2):
        return Refusal("rows and groups of int4 weights must begin with a whole byte, got {k} x {n}", dict(k=k, n=n))
    if platform == "cpu":
        return None
    if platform != "cuda":
        return Refusal("a quantised linear layer has no kernel for {platform}", dict(platform=platform))
    if jnp.dtype(dtype) == jnp.float32:
        return Refusal(
            "on a GPU a quantised linear layer has kernels for bfloat16 and float16, not for float32",
            advice="compute in bfloat16",
        )
    if rows > CUDA_ROWS:
        return Refusal(
            "the kernel is for up to {most} rows, got {rows}: XLA widens the weights once for all of them",
            dict(most=CUDA_ROWS, rows=rows),
        )
    k_step = CUDA_K_TRANSPOSED if transposed else CUDA_K
    n_step = CUDA_N_4_BIT if is_4_bit and not transposed else CUDA_N
    if (k // groups) % k_step or n % n_step:
        return Refusal(
            "groups of {k} features must be a multiple of {a}, and {n} results of {b}",
            dict(k=k // groups, a=k_step, n=n, b=n_step),
        )
    return None


def _supports(avals: Any, platform: str, *, n: int, transposed: bool) -> Refusal | None:
    x, w, scale, bias = avals
    if scale.dtype not in (x.dtype, jnp.float32) or bias.dtype != scale.dtype:
        return Refusal(
            "scale and bias must both be {dtype} or both float32, got {scale} and {bias}",
            dict(dtype=x.dtype.name, scale=scale.dtype.name, bias=bias.dtype.name),
        )
    k = x.shape[-1]
    return unsupported(
        platform,
        dtype=x.dtype,
        w_dtype=w.dtype,
        rows=x.size // max(k, 1),
        k=k,
        n=n,
        groups=scale.shape[0] // max(n, 1),
        transposed=transposed,
    )


def _attributes(avals: Any, *, n: int, transposed: bool) -> dict[str, Any]:
    del avals
    return {"n": np.int64(n), "transposed": np.int32(transposed)}


@kernel(
    "quantized_linear_fwd",
    "*b k, w, s, c -> *b n",
    (0,),
    supports=_supports,
    ffi_attributes=_attributes,
    partitioned=False,  # the product's other axes, too, may be what is sharded
)
def quantized_linear_fwd(x, w, scale, bias, *, n, transposed):
    """One scale for all of k goes behind the product, whose integers are exact in x's dtype; scales of groups go into
    the weights, which are rounded to it, as programs have it that know no kernel."""
    k = x.shape[-1]
    wide = jnp.promote_types(x.dtype, jnp.float32)
    if w.dtype == jnp.int4:
        # XLA's products that read int4 by themselves are wrong on a GPU for k or n of 16 and 24, however they are
        # written (jax 0.11.2, H100, 15 and 64 rows: no digit right); behind a barrier the weights are int8.
        w = jax.lax.optimization_barrier(w.astype(jnp.int8))
    matrix = w.reshape(n, k).T if transposed else w.reshape(k, n)
    groups = scale.size // n if n else 1
    scale = scale.reshape(groups, n).astype(wide)
    if groups > 1:
        grouped = matrix.reshape(groups, k // groups, n).astype(wide) * scale[:, None]
        y = jnp.matmul(x, grouped.reshape(k, n).astype(x.dtype), preferred_element_type=wide)
    else:
        y = jnp.matmul(x, matrix.astype(x.dtype), preferred_element_type=wide) * scale[0]
    return ((y if is_absent(bias) else y + widened(bias)).astype(x.dtype),)


def quantized_linear(x, w, scale, bias=None, *, transposed: bool = False):
    """x @ (w * scale) + bias, for weights stored as integers.

    x: (*b, k), float32, bfloat16 or float16 (float64 runs as XLA code). w: (k, n), or (n, k) if `transposed`, int8 or
    int4. scale: (n,), one for each result, or (g, n), one for each of g groups of k / g neighbours along k; it stands
    for (k, n) weights' columns in either layout. bias: (n,). scale and bias in x's dtype or float32.
    Returns (*b, n) in x's dtype: products, scales and sums are float32 inside, with one rounding. Differentiable in x,
    scale and bias. Kernels: on a GPU bfloat16 and float16 of up to 16 rows; on the CPU any.
    Raises ShapeError or DTypeError.
    """
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise DTypeError(f"quantized_linear: x must have a real floating dtype, got {x.dtype}; convert it first")
    if w.dtype not in WEIGHT_DTYPES:
        raise DTypeError(f"quantized_linear: w must be int8 or int4, got {w.dtype}")
    if x.ndim == 0 or w.ndim != 2 or w.shape[transposed] != x.shape[-1]:
        raise ShapeError(
            f"quantized_linear: w must have shape {'(n, k)' if transposed else '(k, n)'} to match x of shape (*b, k), "
            f"got x {x.shape} and w {w.shape}"
        )
    k, n = x.shape[-1], w.shape[1 - transposed]
    groups = scale.shape[0] if scale.ndim == 2 else 1
    if scale.shape not in ((n,), (groups, n)) or groups == 0 or k % groups:
        raise ShapeError(
            f"quantized_linear: scale must have shape ({n},), or (g, {n}) where g divides {k}, got {scale.shape}"
        )
    if bias is not None and bias.shape != (n,):
        raise ShapeError(f"quantized_linear: bias must have shape ({n},), got {bias.shape}")
    dtype = scale.dtype if scale.dtype == x.dtype and (bias is None or bias.dtype == x.dtype) else jnp.float32
    scale = scale.astype(jnp.promote_types(dtype, scale.dtype))
    bias = absent(scale.dtype) if bias is None else bias.astype(scale.dtype)
    operands = (as_batches(x, 1), w.reshape(-1), scale.reshape(-1), bias)
    if any(_compat.explicit_sharding(jax.typeof(a)) for a in (x, w)):
        # XLA splits the product over devices anyway; as it stands here, JAX knows the sharding of its gradients.
        y = quantized_linear_fwd.reference(*operands, n=n, transposed=transposed)[0]
    else:
        y = quantized_linear_fwd(*operands, n=n, transposed=transposed)[0]
    return y.reshape(*x.shape[:-1], n)
