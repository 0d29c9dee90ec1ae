"""Weights of 2 to 8 bits in blocks, as language models carry them."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from zenith_jax.frontends.onnx import dtypes
from zenith_jax.frontends.onnx.ops.index import gather
from zenith_jax.frontends.onnx.ops.microsoft import contrib
from zenith_jax.frontends.onnx.values import OnnxError, UnsupportedError


@contrib("MatMulNBits")
def matmul_n_bits(
    a,
    b,
    scales,
    zero_points=None,
    g_idx=None,
    bias=None,
    *,
    K,
    N,
    block_size,
    bits=4,
    accuracy_level=0,
    weight_prepacked=0,
):
    """a @ w.T + bias with w = (b - zero_points) * scales of shape (N, K), quantised in blocks along K.

    b: (N, blocks, block_size * bits / 8) uint8, the first element in the lowest bits. `accuracy_level`, which lets a be
    rounded to 8 bits, is not taken up.
    """
    if weight_prepacked or g_idx is not None:
        raise UnsupportedError("MatMulNBits with prepacked weights or g_idx is not implemented")
    a = jnp.asarray(a)
    if 0 in b.shape:  # an omitted projection
        y = jnp.zeros((*a.shape[:-1], N), a.dtype)
    else:
        y = jnp.matmul(a, _dequantized(b, scales, zero_points, N, K, block_size, bits).astype(a.dtype).T)
    return y if bias is None else y + bias


def _dequantized(b: Any, scales: Any, zero_points: Any, n: int, k: int, block_size: int, bits: int) -> Any:
    blocks = -(-k // block_size)
    values = unpacked(jnp.asarray(b).reshape(n, blocks, -1), bits)[..., :block_size]
    scales = jnp.asarray(scales).reshape(n, blocks, 1)
    if zero_points is None:
        zeros: Any = jnp.float32(1 << (bits - 1))
    elif zero_points.dtype == np.uint8:
        zeros = unpacked(jnp.asarray(zero_points).reshape(n, -1), bits)[:, :blocks, None].astype(jnp.float32)
    else:
        zeros = jnp.asarray(zero_points).reshape(n, blocks, 1).astype(jnp.float32)
    return ((values.astype(jnp.float32) - zeros) * scales.astype(jnp.float32)).reshape(n, -1)[:, :k]


def unpacked(packed: Any, bits: int) -> Any:
    """The unsigned integers of `bits` bits in the bytes of the last axis, the lowest bits first, as uint8."""
    if bits == 8:
        return packed
    if 8 % bits == 0:
        shifts = np.arange(0, 8, bits, dtype=np.uint8)
        return ((packed[..., None] >> shifts) & np.uint8((1 << bits) - 1)).reshape(*packed.shape[:-1], -1)
    if bits not in (3, 5, 6, 7):
        raise OnnxError(f"weights of {bits} bits; 2 to 8 are known")
    single = ((packed[..., None] >> np.arange(8, dtype=np.uint8)) & 1).reshape(*packed.shape[:-1], -1)
    count = single.shape[-1] // bits
    groups = single[..., : count * bits].reshape(*packed.shape[:-1], count, bits)
    return (groups << np.arange(bits, dtype=np.uint8)).sum(-1).astype(jnp.uint8)


@contrib("GatherBlockQuantized")
def gather_block_quantized(
    data, indices, scales, zero_points=None, *, gather_axis=0, quantize_axis=1, block_size=128, bits=4
):
    """Rows of a table that is quantised in blocks; only the rows that are read are dequantised.

    data: int4 or uint4, or uint8 with 8 / bits elements a byte along the last axis.
    """
    axis = quantize_axis % data.ndim
    gather_axis %= data.ndim
    if data.dtype == np.uint8 and bits < 8 and axis != data.ndim - 1:
        raise UnsupportedError("GatherBlockQuantized of packed bytes along another axis than the last")
    # Where the gathered axis goes, `indices.ndim` axes come.
    moved = axis + (indices.ndim - 1 if axis > gather_axis else 0)
    rows, scales = gather(data, indices, axis=gather_axis), gather(scales, indices, axis=gather_axis)
    zeros: Any = None if zero_points is None else gather(zero_points, indices, axis=gather_axis)
    if data.dtype == np.uint8:
        rows = unpacked(jnp.asarray(rows), bits)
        zeros = None if zeros is None else unpacked(jnp.asarray(zeros), bits)[..., : scales.shape[-1]]
        zeros = jnp.int32(1 << (bits - 1)) if zeros is None else zeros
    scales = _spread(scales, rows.shape[moved], moved, block_size)
    wide = jnp.asarray(rows).astype(jnp.int32)
    if zeros is not None:
        zeros = zeros if zeros.ndim == 0 else _spread(zeros, rows.shape[moved], moved, block_size)
        wide = wide - zeros.astype(jnp.int32)
    return dtypes.cast(wide.astype(jnp.float32) * scales.astype(jnp.float32), scales.dtype)


def _spread(per_block: Any, size: int, axis: int, block_size: int) -> Any:
    spread = jnp.repeat(jnp.asarray(per_block), block_size, axis)
    return spread[(slice(None),) * axis + (slice(0, size),)]
