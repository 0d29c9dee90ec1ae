"""Sequences and optionals: Python lists and None, known while tracing; what they hold may be traced."""

from __future__ import annotations

import itertools
from typing import Any

import jax.numpy as jnp
import numpy as np

from zenith_jax.frontends.onnx.limits import check_size
from zenith_jax.frontends.onnx.registry import operator
from zenith_jax.frontends.onnx.values import OnnxError, ints, is_known, xp


@operator("SequenceConstruct", since=11)
def sequence_construct(*values):
    return list(values)


@operator("SequenceEmpty", since=11)
def sequence_empty(*, dtype=1):
    """Without elements its type does not matter."""
    return []


@operator("SequenceLength", since=11)
def sequence_length(sequence):
    return np.asarray(len(sequence), np.int64)


@operator("SequenceAt", since=11)
def sequence_at(sequence, position):
    """A traced position needs elements of one shape and dtype: they are stacked."""
    if is_known(position):
        return sequence[_position(position, len(sequence) - 1, len(sequence))]
    if len({(v.shape, v.dtype) for v in sequence}) > 1:
        ints(position, "position")  # raises: it decides a shape
    at = position.reshape(())
    return jnp.stack(sequence)[jnp.where(at < 0, at + len(sequence), at)]


@operator("SequenceInsert", since=11)
def sequence_insert(sequence, value, position=None):
    at = len(sequence) if position is None else _position(position, len(sequence), len(sequence))
    return [*sequence[:at], value, *sequence[at:]]


@operator("SequenceErase", since=11)
def sequence_erase(sequence, position=None):
    if not sequence:
        raise OnnxError("SequenceErase of an empty sequence")
    at = len(sequence) - 1 if position is None else _position(position, len(sequence) - 1, len(sequence))
    return [*sequence[:at], *sequence[at + 1 :]]


def _position(position: Any, last: int, length: int) -> int:
    (at,) = ints(position, "position")
    if not -length <= at <= last:
        raise OnnxError(f"position {at} is outside of a sequence of {length}")
    return at + length if at < 0 else at


@operator("SplitToSequence", since=11)
def split_to_sequence(x, split=None, *, axis=0, keepdims=1):
    """A scalar `split` is the size of every part but the last; a vector the size of each; none gives single slices."""
    total = x.shape[axis]
    if split is None:
        lengths = [1] * total
    elif split.ndim == 0:
        (size,) = ints(split, "split")
        if size < 1:
            raise OnnxError(f"SplitToSequence into parts of {size}")
        lengths = [min(size, total - start) for start in range(0, total, size)]
    else:
        lengths = list(ints(split, "split"))
        if sum(lengths) != total or min(lengths, default=0) < 0:
            raise OnnxError(f"SplitToSequence into {lengths}: axis {axis} of {x.shape} has {total} elements")
    ends = np.cumsum([0, *lengths]).tolist()
    axis %= x.ndim
    parts = [x[(slice(None),) * axis + (slice(a, b),)] for a, b in itertools.pairwise(ends)]
    return [xp(p).squeeze(p, axis) for p in parts] if split is None and not keepdims else parts


@operator("ConcatFromSequence", since=11)
def concat_from_sequence(sequence, *, axis, new_axis=0):
    if not sequence:
        raise OnnxError("ConcatFromSequence of an empty sequence")
    check_size((sum(v.size for v in sequence),), sequence[0].dtype)
    m = xp(*sequence)
    return m.stack(sequence, axis) if new_axis else m.concatenate(sequence, axis)


@operator("Optional", since=15)
def optional(value=None, *, type=None):
    return value


@operator("OptionalHasElement", since=15)
def optional_has_element(value=None):
    return np.asarray(value is not None)


@operator("OptionalGetElement", since=15)
def optional_get_element(value):
    if value is None:
        raise OnnxError("OptionalGetElement of an empty optional")
    return value
