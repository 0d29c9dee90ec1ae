"""Several requests as one call of a compiled model: rows are gathered, padded to a compiled size, and given back.

Knows NumPy arrays, Specs and a CompiledModel; nothing of Triton.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from zenith_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Call:
    """requests: indices of those whose rows are in the call, one behind the other. rows: of each.

    arrays: in the order of the model's inputs, padded. bucket: the sizes of the program that takes them.
    """

    requests: tuple[int, ...]
    rows: tuple[int, ...]
    arrays: list[np.ndarray]
    bucket: dict[str, int]
    sizes: dict[str, int]


class Batcher:
    """For a model whose inputs and outputs all have the dimension `batch` first; None where requests are not joined."""

    def __init__(self, inputs: Sequence[Any], dynamic: Mapping[str, Sequence[int]], batch: str | None):
        self.inputs, self.dynamic, self.batch = tuple(inputs), dynamic, batch

    def converted(self, index: int, x: np.ndarray) -> np.ndarray:
        """An input as the model takes it. Raises InputError for a wrong dtype, rank or size, and for integers that do
        not fit: a request that was sent in 64 bits is never wrapped."""
        spec = self.inputs[index]
        fits = x.ndim == len(spec.shape) and all(
            isinstance(n, str) or n == size for n, size in zip(spec.shape, x.shape, strict=True)
        )
        if not fits:
            raise InputError(f"the input {spec} got shape {list(x.shape)}")
        for axis, name in enumerate(spec.shape):
            if isinstance(name, str) and not 1 <= x.shape[axis] <= self.dynamic[name][-1]:
                raise InputError(
                    f"the input {spec} got {name} {x.shape[axis]}; the model is compiled for 1 to "
                    f"{self.dynamic[name][-1]}"
                )
        dtype = np.dtype(spec.dtype)
        if x.dtype == dtype:
            return x
        if x.dtype.kind != dtype.kind:
            raise InputError(f"the input {spec} got {x.dtype}")
        if dtype.kind in "iu" and x.size:
            limits, low, high = np.iinfo(dtype), x.min(), x.max()
            if low < limits.min or high > limits.max:
                raise InputError(f"the input {spec} got values from {low} to {high}, which {dtype} does not hold")
        return x.astype(dtype)

    def calls(self, requests: Sequence[Sequence[np.ndarray] | None]) -> list[Call]:
        """The requests (None: one that was refused) in as few calls as their shapes and the largest size allow.

        Raises nothing: arrays have been through `converted`.
        """
        groups: dict[Any, list[int]] = {}
        for index, arrays in enumerate(requests):
            if arrays is None:
                continue
            key = index if self.batch is None else tuple(a.shape[1:] for a in arrays)
            groups.setdefault(key, []).append(index)
        calls = []
        for group in groups.values():
            for members in self._fitting(group, requests):
                calls.append(self._call(members, [requests[i] for i in members]))  # type: ignore[arg-type]
        return calls

    def _fitting(self, group: Sequence[int], requests: Sequence[Any]) -> list[list[int]]:
        if self.batch is None:
            return [list(group)]
        largest, found, rows = self.dynamic[self.batch][-1], [], largest_plus_one(self.dynamic[self.batch])
        for index in group:
            n = requests[index][0].shape[0]
            if rows + n > largest:
                found.append([])
                rows = 0
            found[-1].append(index)
            rows += n
        return found

    def _call(self, members: Sequence[int], requests: Sequence[Sequence[np.ndarray]]) -> Call:
        rows = tuple(r[0].shape[0] for r in requests) if self.batch is not None else (1,)
        sizes: dict[str, int] = {}
        for spec, x in zip(self.inputs, requests[0], strict=True):
            for name, size in zip(spec.shape, x.shape, strict=True):
                if isinstance(name, str):
                    sizes[name] = size
        if self.batch is not None:
            sizes[self.batch] = sum(rows)
        bucket = {name: next(n for n in self.dynamic[name] if n >= size) for name, size in sizes.items()}
        arrays = [self._joined(i, [r[i] for r in requests], bucket) for i in range(len(self.inputs))]
        return Call(tuple(members), rows, arrays, bucket, sizes)

    def _joined(self, index: int, parts: Sequence[np.ndarray], bucket: Mapping[str, int]) -> np.ndarray:
        spec = self.inputs[index]
        shape = tuple(bucket[n] if isinstance(n, str) else n for n in spec.shape)
        if len(parts) == 1 and parts[0].shape == shape:
            return parts[0]
        joined = np.zeros(shape, parts[0].dtype)
        start = 0
        for part in parts:
            stop = start + part.shape[0] if self.batch is not None else None
            joined[(slice(start, stop), *(slice(n) for n in part.shape[1:]))[: part.ndim]] = part
            start = stop or 0
        return joined


def largest_plus_one(sizes: Sequence[int]) -> int:
    return sizes[-1] + 1  # more than any call holds: the first request opens one


def split(outputs: Sequence[Any], results: Sequence[np.ndarray], call: Call, batch: str | None) -> list[list[Any]]:
    """The results that each request of a call gets, without padding, each contiguous and of its own memory."""
    sizes = call.sizes
    given: list[list[Any]] = [[] for _ in call.requests]
    for spec, x in zip(outputs, results, strict=True):
        rest = [slice(sizes[n]) if isinstance(n, str) else slice(None) for n in spec.shape]
        start = 0
        for request, rows in enumerate(call.rows):
            if batch is not None:
                rest[0] = slice(start, start + rows)
                start += rows
            given[request].append(np.array(x[tuple(rest)], order="C"))
    return given
