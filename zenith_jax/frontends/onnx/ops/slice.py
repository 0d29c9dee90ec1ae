"""Operators that cut tensors, join them, and pad them."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from zenith_jax.frontends.onnx.limits import check_size
from zenith_jax.frontends.onnx.ops.shape import dimensions
from zenith_jax.frontends.onnx.registry import Node, operator
from zenith_jax.frontends.onnx.values import OnnxError, UnsupportedError, ints, is_static, xp

_UNBOUNDED = 2**31 - 1  # exporters write this, or the largest int64, for "to the end"


@operator("Concat")
def concat(*values, axis=1):
    """Opsets before 4 join along axis 1 unless told otherwise."""
    return xp(*values).concatenate(values, axis)


@operator("Split")
def split(x, split=None, *, axis=0, num_outputs=None, node: Node):
    """Sizes by `split` (an attribute from 2 to 11), else even: the last part is smaller where they do not divide."""
    total = x.shape[axis]
    if split is None:
        count = len(node.wanted) if num_outputs is None else num_outputs
        if count < 1 or count != len(node.wanted):
            raise OnnxError(f"Split has {len(node.wanted)} outputs, num_outputs is {count}")
        part = -(-total // count)
        lengths = (
            [max(min(part, total - i * part), 0) for i in range(count)] if isinstance(part, int) else [part] * count
        )
    else:
        lengths = dimensions(split, "split")
        if sum(lengths) != total:
            raise OnnxError(f"Split into {tuple(lengths)}: axis {axis} of {x.shape} has {total} elements")
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    return tuple(_at(x, {axis: slice(s, s + n)}) for s, n in zip(starts, lengths, strict=True))


def _at(x: Any, slices: dict[int, slice]) -> Any:
    index = [slice(None)] * x.ndim
    for axis, piece in slices.items():
        index[axis] = piece
    return x[tuple(index)]


@operator("Slice")
def slice_(x, starts, ends, axes=None, steps=None):
    """Attributes before opset 10, inputs since. Bounds beyond the tensor are its bounds, as in Python."""
    starts, ends = dimensions(starts, "starts"), dimensions(ends, "ends")
    axes = range(len(starts)) if axes is None else ints(axes, "axes")
    steps = [1] * len(starts) if steps is None else ints(steps, "steps")
    if 0 in steps:
        raise OnnxError("Slice has a step of 0")
    pieces = {a: _piece(*bounds) for a, *bounds in zip(axes, starts, ends, steps, strict=True)}
    return _at(x, pieces)


def _piece(start: Any, end: Any, step: int) -> slice:
    # Open ends are spelled None: a symbolic dimension cannot be compared with 2**63 - 1.
    if isinstance(end, int) and (end >= _UNBOUNDED if step > 0 else end <= -_UNBOUNDED):
        end = None
    if isinstance(start, int) and (start <= -_UNBOUNDED if step > 0 else start >= _UNBOUNDED):
        start = None
    return slice(start, end, step)


@operator("Pad", since=1)
def pad_floats(x, *, pads=None, paddings=None, mode="constant", value=0.0):
    return pad(x, paddings if pads is None else pads, np.asarray(value, x.dtype), mode=mode)


@operator("Pad", since=11)
def pad(x, pads, constant_value=None, axes=None, *, mode="constant"):
    """Begins then ends, for `axes`. A negative pad removes."""
    amounts = dimensions(pads, "pads")
    axes = range(x.ndim) if axes is None else ints(axes, "axes")
    axes = list(axes)
    if len(amounts) != 2 * len(axes):
        raise OnnxError(f"Pad takes two amounts for each of the {len(axes)} axes, got {amounts}")
    widths = [(0, 0)] * x.ndim
    for i, axis in enumerate(axes):
        widths[axis] = (amounts[i], amounts[i + len(amounts) // 2])
    check_size([lo + d + hi for (lo, hi), d in zip(widths, x.shape, strict=True)], x.dtype)
    if mode == "constant":
        return _pad_constant(x, widths, constant_value)
    x = x[tuple(slice(max(-lo, 0), d - max(-hi, 0)) for (lo, hi), d in zip(widths, x.shape, strict=True))]
    widths = [(max(lo, 0), max(hi, 0)) for lo, hi in widths]
    if mode not in ("reflect", "edge", "wrap"):
        raise UnsupportedError(f"Pad has no mode {mode!r}; its modes are constant, reflect, edge and wrap")
    return xp(x).pad(x, widths, mode=mode)


def _pad_constant(x: Any, widths: list[tuple[int, int]], value: Any) -> Any:
    if is_static([x, value]):
        fill = (np.zeros((), x.dtype) if x.dtype != object else "") if value is None else value.reshape(-1)[0]
        shape = [lo + d + hi for (lo, hi), d in zip(widths, x.shape, strict=True)]
        y = np.full(shape, fill, x.dtype)
        inner = tuple(slice(max(lo, 0), n - max(hi, 0)) for (lo, hi), n in zip(widths, shape, strict=True))
        y[inner] = x[tuple(slice(max(-lo, 0), d - max(-hi, 0)) for (lo, hi), d in zip(widths, x.shape, strict=True))]
        return y
    x = jnp.asarray(x)
    fill = jnp.zeros((), x.dtype) if value is None else jnp.asarray(value, x.dtype).reshape(())
    return lax.pad(x, fill, [(lo, hi, 0) for lo, hi in widths])


@operator("CenterCropPad")
def center_crop_pad(x, shape, *, axes=None):
    """Each axis to its size in `shape` around the middle: cut where it is longer, zeros where it is shorter."""
    axes = range(x.ndim) if axes is None else axes
    widths = [(0, 0)] * x.ndim
    for axis, wanted in zip(axes, ints(shape, "shape"), strict=True):
        missing = wanted - x.shape[axis]
        # An odd one is missing at the end, and cut at the end.
        low = missing // 2 if missing >= 0 else -(-missing // 2)
        widths[axis] = (low, missing - low)
    check_size([lo + d + hi for (lo, hi), d in zip(widths, x.shape, strict=True)], x.dtype)
    return _pad_constant(x, widths, None)


@operator("Trilu")
def trilu(x, k=None, *, upper=1):
    m = xp(x, k)
    k = 0 if k is None else k.reshape(())
    distance = np.arange(x.shape[-1]) - np.arange(x.shape[-2])[:, None]
    keep = distance >= k if upper else distance <= k
    return m.where(keep, x, m.zeros((), x.dtype))


@operator("ReverseSequence")
def reverse_sequence(x, sequence_lens, *, batch_axis=1, time_axis=0):
    """The first `sequence_lens[b]` steps of batch entry b backwards, the rest as it is."""
    m = xp(x, sequence_lens)
    steps = np.arange(x.shape[time_axis])[:, None]
    source = m.where(steps < sequence_lens, sequence_lens - 1 - steps, steps)  # time, batch
    rank = x.ndim
    time_axis, batch_axis = time_axis % rank, batch_axis % rank
    source = m.transpose(source) if batch_axis < time_axis else source
    source = source.reshape([d if i in (time_axis, batch_axis) else 1 for i, d in enumerate(x.shape)])
    return m.take_along_axis(m.asarray(x), source, time_axis)


@operator("Col2Im")
def col2im(x, image_shape, block_shape, *, dilations=None, pads=None, strides=None):
    """Adds overlapping blocks up to an image. x: (n, c * product of block_shape, blocks) -> (n, c, *image_shape)."""
    image, block = ints(image_shape, "image_shape"), ints(block_shape, "block_shape")
    rank = len(image)
    dilations, strides = dilations or [1] * rank, strides or [1] * rank
    pads = pads or [0] * (2 * rank)
    padded = [d + pads[i] + pads[i + rank] for i, d in enumerate(image)]
    check_size((*x.shape[:2], *padded), x.dtype)
    position = np.zeros((1, 1), np.int64)  # of each element of each block, in the padded image laid flat
    for i in range(rank):
        blocks = (padded[i] - dilations[i] * (block[i] - 1) - 1) // strides[i] + 1
        along = np.arange(block[i])[:, None] * dilations[i] + np.arange(blocks) * strides[i]
        position = (position[:, None, :, None] * padded[i] + along[:, None, :]).reshape(-1, position.shape[1] * blocks)
    n, rows, columns = x.shape
    if position.shape[1] != columns or rows % position.shape[0]:
        raise OnnxError(f"Col2Im of {x.shape} to {image} by {block}: expected {position.shape[1]} blocks")
    c = rows // position.shape[0]
    x = x.reshape(n, c, position.shape[0], columns)
    if is_static(x):
        y = np.zeros((n, c, math.prod(padded)), x.dtype)
        everywhere: Any = (slice(None), slice(None), position)
        np.add.at(y, everywhere, x)
    else:
        y = jnp.zeros((n, c, math.prod(padded)), x.dtype).at[:, :, position].add(x)
    inner = tuple(slice(pads[i], pads[i] + image[i]) for i in range(rank))
    return y.reshape(n, c, *padded)[(slice(None), slice(None), *inner)]
