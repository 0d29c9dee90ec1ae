"""Operators that read and write elements by index.

A negative index counts from the end. One out of range is an error in ONNX, but real models hold them (masked labels of
-1 or of 2**31), and nothing inside `jax.jit` can raise: reading takes the nearest element, writing is dropped.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from zenith_jax.frontends.onnx import dtypes
from zenith_jax.frontends.onnx.limits import check_size
from zenith_jax.frontends.onnx.registry import ML, operator
from zenith_jax.frontends.onnx.values import OnnxError, ints, is_static, xp


@operator("Gather")
def gather(data, indices, *, axis=0):
    m = xp(data, indices)
    return m.take(m.asarray(data), _wrapped(indices, data.shape[axis]), axis, mode="clip")


def _wrapped(indices: Any, size: Any) -> Any:
    """Negative indices as positive ones."""
    return xp(indices).where(indices < 0, indices + size, indices)


def _in_range(indices: Any, size: Any) -> Any:
    """For reading. Empty tensors have no nearest element: nothing can be read from them but nothing."""
    return xp(indices).clip(_wrapped(indices, size), 0, size - 1)


@operator("GatherElements")
def gather_elements(data, indices, *, axis=0):
    m = xp(data, indices)
    where = list(_grid(indices.shape))
    where[axis] = _in_range(indices, data.shape[axis])
    return m.asarray(data)[tuple(where)]


def _grid(shape: tuple[Any, ...]) -> tuple[Any, ...]:
    """Arrays that broadcast to `shape`, the n-th counting along axis n."""
    rank = len(shape)
    return tuple(np.arange(d).reshape([-1 if i == n else 1 for i in range(rank)]) for n, d in enumerate(shape))


@operator("GatherND")
def gather_nd(data, indices, *, batch_dims=0):
    """The last axis of `indices` holds an index for each axis of `data` after the first `batch_dims`."""
    m = xp(data, indices)
    depth = indices.shape[-1]
    batch = _grid(indices.shape[:batch_dims])
    batch = tuple(b.reshape(b.shape + (1,) * (indices.ndim - 1 - batch_dims)) for b in batch)
    sizes = data.shape[batch_dims : batch_dims + depth]
    where = tuple(_in_range(indices[..., i], size) for i, size in enumerate(sizes))
    return m.asarray(data)[batch + where]


@operator("Scatter")
@operator("ScatterElements")
def scatter_elements(data, indices, updates, *, axis=0, reduction="none"):
    where = list(_grid(indices.shape))
    where[axis] = indices
    return _write(data, where, updates, reduction)


@operator("ScatterND")
def scatter_nd(data, indices, updates, *, reduction="none"):
    return _write(data, [indices[..., i] for i in range(indices.shape[-1])], updates, reduction)


def _write(data: Any, where: list[Any], updates: Any, reduction: str) -> Any:
    """`data` with `updates` at `where` (an index array for each leading axis), combined by `reduction`."""
    methods = {"none": "set", "add": "add", "mul": "multiply", "min": "min", "max": "max"}
    if reduction not in methods:
        raise OnnxError(f"scatter has no reduction {reduction!r}; they are {', '.join(methods)}")
    where = [_wrapped(w, size) for w, size in zip(where, data.shape, strict=False)]
    if is_static([data, updates, *where]):
        return _write_static(data, where, updates, reduction)
    if data.dtype == bool and reduction in ("min", "max"):  # XLA has no boolean scatter-min
        return _write(data.astype(np.int8), where, updates.astype(np.int8), reduction).astype(bool)
    # An index beyond the end is dropped by mode="drop"; one before the start would count from the end again.
    where = [jnp.where(w < 0, size, w) for w, size in zip(where, data.shape, strict=False)]
    return getattr(jnp.asarray(data).at[tuple(where)], methods[reduction])(updates, mode="drop")


def _write_static(data: np.ndarray, where: list[Any], updates: np.ndarray, reduction: str) -> np.ndarray:
    """One by one, as the specification has it: duplicates reduce in order, for strings too."""
    result = np.array(data)
    combine: Any = {"add": np.add, "mul": np.multiply, "min": np.minimum, "max": np.maximum}.get(reduction)
    where = list(np.broadcast_arrays(*where)) if where else []
    shape = where[0].shape if where else ()
    for at in np.ndindex(shape):
        target = tuple(int(w[at]) for w in where)
        if all(0 <= i < size for i, size in zip(target, data.shape, strict=False)):
            result[target] = updates[at] if combine is None else combine(result[target], updates[at])
    return result


@operator("TensorScatter", since=24)
def tensor_scatter(past_cache, update, write_indices=None, *, mode="linear", axis=-2):
    """Writes `update` into a cache along `axis`, for batch entry b from `write_indices[b]` on."""
    axis %= past_cache.ndim
    size, length = past_cache.shape[axis], update.shape[axis]
    batch = past_cache.shape[0]
    if axis == 0:
        raise OnnxError("TensorScatter writes along another axis than the batch")
    start = np.zeros(batch, np.int64) if write_indices is None else write_indices
    position = start.reshape(-1, 1) + np.arange(length)
    if mode == "circular":
        position = position % size
    where = list(_grid(update.shape))
    where[axis] = position.reshape([d if i in (0, axis) else 1 for i, d in enumerate(update.shape)])
    return _write(past_cache, where, update, "none")


@operator("TopK")
def top_k(x, k, *, axis=-1, largest=1, sorted=1):
    """Values and indices; of equal ones the first comes first. `k` is an attribute before opset 10, an input since.

    NaN counts as the largest value, as in NumPy. The result is sorted whether asked for or not.
    """
    (k,) = ints(k, "k")
    if k > x.shape[axis]:
        raise OnnxError(f"TopK of {k} along axis {axis} of {x.shape}")
    m = xp(x)
    if largest and m is jnp:
        values, order = lax.top_k(jnp.moveaxis(x, axis, -1), k)
        return jnp.moveaxis(values, -1, axis), dtypes.cast(jnp.moveaxis(order, -1, axis), np.int64)
    # Ascending and stable. For the largest, the reversed axis is sorted and read backwards: ties come in order again.
    key = m.flip(x, axis) if largest else x
    order = np.argsort(key, axis, kind="stable") if m is np else jnp.argsort(key, axis, stable=True)
    order = x.shape[axis] - 1 - m.flip(order, axis) if largest else order
    order = m.take(order, np.arange(k), axis)
    return m.take_along_axis(x, order, axis), dtypes.cast(order, np.int64)


@operator("OneHot")
def one_hot(indices, depth, values, *, axis=-1):
    """values[1] where the new axis equals the index, values[0] elsewhere and for indices outside [-depth, depth)."""
    (depth,) = ints(depth, "depth")
    check_size((*indices.shape, depth), values.dtype)
    m = xp(indices, values)
    axis %= indices.ndim + 1
    if not jnp.issubdtype(indices.dtype, jnp.signedinteger):
        indices = dtypes.cast(m.asarray(indices), np.int64)
    along = np.arange(depth).reshape([-1 if i == axis else 1 for i in range(indices.ndim + 1)])
    hot = m.expand_dims(_wrapped(indices, depth), axis) == along
    return m.where(hot, values[1], values[0])


@operator("ArrayFeatureExtractor", domain=ML)
def array_feature_extractor(x, y):
    """Elements of the last axis; a vector counts as one row."""
    picked = gather(x, y.reshape(-1), axis=-1)
    return picked.reshape(1, -1) if x.ndim == 1 else picked
