"""Operators that make shapes or give the same elements another shape."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from zenith_jax.frontends.onnx import dtypes
from zenith_jax.frontends.onnx.limits import check_rank, check_size
from zenith_jax.frontends.onnx.registry import operator
from zenith_jax.frontends.onnx.values import OnnxError, ints, static, xp


@operator("Identity")
def identity(x):
    return x


@operator("Shape")
def shape(x, *, start=0, end=None):
    """The shape as a static value, so that whatever is computed from it is never traced."""
    return sizes(x.shape[slice(start, end)])


@operator("Size")
def size(x):
    return sizes(math.prod(x.shape))


def sizes(value: Any) -> np.ndarray:
    """Dimensions as int64; as objects where `jax.export` made one of them symbolic."""
    exact = np.asarray(value, dtype=object)
    return exact.astype(np.int64) if all(isinstance(d, int | np.integer) for d in exact.flat) else exact


def dimensions(value: Any, name: str) -> tuple[Any, ...]:
    """The static operand `name` as a shape: Python integers and, under `jax.export`, symbolic dimensions."""
    if value is None:
        raise OnnxError(f"operand {name!r} is missing")
    return tuple(int(d) if isinstance(d, int | float | np.number) else d for d in static(value, name).reshape(-1))


@operator("Reshape")
def reshape(x, shape, *, allowzero=0, consumed_inputs=None):
    """0 copies the dimension of `x` unless `allowzero`; -1 takes what is left."""
    wanted = dimensions(shape, "shape")
    check_rank(wanted)
    copied = {i for i, d in enumerate(wanted) if isinstance(d, int) and d == 0 and not allowzero}
    if any(i >= x.ndim for i in copied):
        raise OnnxError(f"Reshape to {wanted} copies a dimension that an input of shape {x.shape} does not have")
    target = [x.shape[i] if i in copied else d for i, d in enumerate(wanted)]
    unknown = [i for i, d in enumerate(target) if isinstance(d, int) and d < 0]
    if len(unknown) > 1 or any(target[i] != -1 for i in unknown):
        raise OnnxError(f"Reshape to {wanted}: at most one dimension may be -1 and none less than that")
    if unknown:
        # What is copied cancels, so that an empty batch keeps its other dimensions: (0, 3, 4) by (0, -1) is (0, 12).
        given = math.prod(d for i, d in enumerate(target) if i not in copied and i != unknown[0])
        left = math.prod(d for i, d in enumerate(x.shape) if i not in copied)
        target[unknown[0]] = left // given if _divides(given, left) else -1
    if -1 in target or math.prod(target) != math.prod(x.shape):
        raise OnnxError(f"Reshape of {x.shape} to {wanted}: the number of elements differs")
    return xp(x).reshape(x, target)


def _divides(divisor: Any, whole: Any) -> bool:
    return not (isinstance(divisor, int) and divisor == 0) and whole % divisor == 0


@operator("Flatten")
def flatten(x, *, axis=1):
    rows = math.prod(x.shape[:axis] if axis >= 0 else x.shape[: x.ndim + axis])
    columns = math.prod(x.shape[axis:])
    return xp(x).reshape(x, (rows, columns))


@operator("Squeeze")
def squeeze(x, axes=None):
    """`axes` is an attribute before opset 13, an input since."""
    return xp(x).squeeze(x, None if axes is None else ints(axes, "axes"))


@operator("Unsqueeze")
def unsqueeze(x, axes):
    """`axes` is an attribute before opset 13, an input since. They count in the result."""
    axes = ints(axes, "axes")
    check_rank([*x.shape, *axes])
    return xp(x).expand_dims(x, axes)


@operator("Transpose")
def transpose(x, *, perm=None):
    return xp(x).transpose(x, perm)


@operator("Expand")
def expand(x, shape):
    """Broadcasts both ways: a 1 in `shape` keeps the dimension of `x`."""
    wanted = dimensions(shape, "shape")
    rank = max(x.ndim, len(wanted))
    pairs = zip((1,) * (rank - x.ndim) + x.shape, (1,) * (rank - len(wanted)) + wanted, strict=True)
    shape = tuple(d if isinstance(w, int) and w == 1 else w for d, w in pairs)
    check_size(shape, x.dtype)
    return xp(x).broadcast_to(x, shape)


@operator("Tile", since=1)
def tile_one_axis(x, tiles, axis):
    repeats = [1] * x.ndim
    repeats[ints(axis, "axis")[0]] = ints(tiles, "tiles")[0]
    return tile(x, np.asarray(repeats))


@operator("Tile", since=6)
def tile(x, repeats):
    repeats = dimensions(repeats, "repeats")
    if len(repeats) != x.ndim:
        raise OnnxError(f"Tile takes a repeat for each of the {x.ndim} axes, got {len(repeats)}")
    check_size([d * r for d, r in zip(x.shape, repeats, strict=True)], x.dtype)
    return xp(x).tile(x, repeats)


@operator("Constant")
def constant(
    *,
    value=None,
    sparse_value=None,
    value_int=None,
    value_ints=None,
    value_float=None,
    value_floats=None,
    value_string=None,
    value_strings=None,
):
    if value is not None:
        return np.asarray(value)
    if value_int is not None or value_ints is not None:
        return np.asarray(value_ints if value_int is None else value_int, np.int64)
    if value_float is not None or value_floats is not None:
        return np.asarray(value_floats if value_float is None else value_float, np.float32)
    if value_string is not None or value_strings is not None:
        return np.asarray(value_strings if value_string is None else value_string, object)
    if sparse_value is not None:
        return np.asarray(sparse_value)
    raise OnnxError("Constant has no value")


@operator("ConstantOfShape")
def constant_of_shape(shape, *, value=None):
    """A view of one element, which costs nothing until it is used."""
    value = np.zeros(1, np.float32) if value is None else np.asarray(value)
    wanted = dimensions(shape, "shape")
    check_size(wanted, value.dtype)
    symbolic = not all(isinstance(d, int) for d in wanted)
    return (jnp if symbolic else np).broadcast_to(value.reshape(()), wanted)


@operator("Range")
def range_(start, limit, delta):
    """The count must be known while tracing; the values have the operands' dtype."""
    start, limit, delta = (
        static(v, n).reshape(())[()] for v, n in ((start, "start"), (limit, "limit"), (delta, "delta"))
    )
    if any(not isinstance(v, np.generic) and not isinstance(v, int) for v in (start, limit, delta)):  # symbolic
        return jnp.arange(start, limit, delta, dtype=dtypes.held(np.int64))
    if not delta:
        raise OnnxError("Range has a delta of 0")
    dtype = start.dtype if isinstance(start, np.generic) else np.dtype(np.int64)
    exact = int if dtype.kind in "iu" else float
    first, last, step = exact(start), exact(limit), exact(delta)
    count = -((first - last) // step) if exact is int else math.ceil((last - first) / step)
    count = max(int(count), 0)
    check_size((count,), dtype)
    # start + i * delta in the operands' dtype, as the function body in the schema has it.
    return (start + np.arange(count).astype(dtype) * delta).astype(dtype)


@operator("EyeLike")
def eye_like(x, *, dtype=None, k=0):
    rows, columns = x.shape
    to = x.dtype if dtype is None else dtypes.from_onnx(dtype)
    symbolic = not all(isinstance(d, int) for d in x.shape)
    return (jnp if symbolic else np).eye(rows, columns, k=k).astype(to)


@operator("DepthToSpace")
def depth_to_space(x, *, blocksize, mode="DCR"):
    """Channels to pixels: DCR reads them as (block row, block column, channel), CRD as (channel, row, column)."""
    n, c, h, w = x.shape
    b = blocksize
    depth = c // (b * b)
    if mode == "DCR":
        y = xp(x).transpose(x.reshape(n, b, b, depth, h, w), (0, 3, 4, 1, 5, 2))
    else:
        y = xp(x).transpose(x.reshape(n, depth, b, b, h, w), (0, 1, 4, 2, 5, 3))
    return y.reshape(n, depth, h * b, w * b)


@operator("SpaceToDepth")
def space_to_depth(x, *, blocksize, mode="DCR"):
    n, c, h, w = x.shape
    b = blocksize
    y = x.reshape(n, c, h // b, b, w // b, b)
    y = xp(x).transpose(y, (0, 3, 5, 1, 2, 4) if mode == "DCR" else (0, 1, 3, 5, 2, 4))
    return y.reshape(n, c * b * b, h // b, w // b)
