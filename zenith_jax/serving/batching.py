"""Several requests as one call of a compiled model: rows are gathered, padded to a compiled size, and given back.

Knows NumPy arrays, Specs and a CompiledModel; nothing of Triton.
"""

from __future__ import annotations

import dataclasses
import functools as ft
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from zenith_jax.errors import InputError

# What a call costs besides its program: joining, dispatch, and cutting (backend.py, two EPYC cores, 2026-11-26).
CALL_SECONDS = 0.0002


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
    """For a model whose inputs and outputs all have the dimension `batch` first; None where requests are not joined.

    seconds: of a call of each program, by its sizes in the order of `dynamic`; where it is not known, requests are
    joined to as few calls as possible. It is on a CPU that 9 rows are faster as 8 and 1 than padded to 16.
    """

    def __init__(
        self,
        inputs: Sequence[Any],
        dynamic: Mapping[str, Sequence[int]],
        batch: str | None,
        seconds: Mapping[tuple[int, ...], float] | None = None,
    ):
        self.inputs, self.dynamic, self.batch = tuple(inputs), dynamic, batch
        self._seconds = seconds or {}
        self._partition = ft.lru_cache(maxsize=1024)(self._best_partition)
        self._dtypes = [np.dtype(spec.dtype) for spec in self.inputs]
        self._limits = [np.iinfo(d) if d.kind in "iu" else None for d in self._dtypes]
        # Least and largest size of each axis.
        self._sizes = [
            [(1, dynamic[n][-1]) if isinstance(n, str) else (n, n) for n in spec.shape] for spec in self.inputs
        ]

    def converted(self, index: int, x: np.ndarray) -> np.ndarray:
        """An input as the model takes it. Raises InputError for a wrong dtype, rank or size, and for integers that do
        not fit: a request that was sent in 64 bits is never wrapped."""
        sizes, dtype = self._sizes[index], self._dtypes[index]
        if len(x.shape) != len(sizes):
            raise self._misshapen(index, x)
        for size, (least, largest) in zip(x.shape, sizes, strict=True):
            if not least <= size <= largest:
                raise self._misshapen(index, x)
        if x.dtype == dtype:
            return x
        if x.dtype.kind != dtype.kind:
            raise InputError(f"the input {self.inputs[index]} got {x.dtype}")
        limits = self._limits[index]
        if limits is not None and x.size:
            # Not x.min(): its detour through Python costs as much again.
            low, high = np.minimum.reduce(x, axis=None), np.maximum.reduce(x, axis=None)
            if low < limits.min or high > limits.max:
                raise InputError(
                    f"the input {self.inputs[index]} got values from {low} to {high}, which {dtype} does not hold"
                )
        return x.astype(dtype)

    def _misshapen(self, index: int, x: np.ndarray) -> InputError:
        spec = self.inputs[index]
        fits = x.ndim == len(spec.shape) and all(
            isinstance(n, str) or n == size for n, size in zip(spec.shape, x.shape, strict=True)
        )
        if fits:
            for name, size in zip(spec.shape, x.shape, strict=True):
                if isinstance(name, str) and not 1 <= size <= self.dynamic[name][-1]:
                    return InputError(
                        f"the input {spec} got {name} {size}; the model is compiled for 1 to {self.dynamic[name][-1]}"
                    )
        return InputError(f"the input {spec} got shape {list(x.shape)}")

    def calls(self, requests: Sequence[Sequence[np.ndarray] | None]) -> list[Call]:
        """The requests (None: one that was refused) in the calls that take the least time together.

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
            start = 0
            for count in self._counts(group, requests):
                members = group[start : start + count]
                calls.append(self._call(members, [requests[i] for i in members]))  # type: ignore[arg-type]
                start += count
        return calls

    def _counts(self, group: Sequence[int], requests: Sequence[Any]) -> Sequence[int]:
        """How many requests of a group each call takes."""
        if self.batch is None or len(group) == 1:
            return (len(group),)
        bucket = self._bucket(self._sizes_of(requests[group[0]]))
        return self._partition(tuple(requests[i][0].shape[0] for i in group), tuple(bucket.items()))

    def _best_partition(self, rows: tuple[int, ...], bucket: tuple[tuple[str, int], ...]) -> tuple[int, ...]:
        """Counts of requests with so many rows that follow each other, whose calls take the least time together.
        bucket: of any of them; the batch's size in it does not matter."""
        assert self.batch is not None
        sizes = dict(bucket)
        best: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]  # of the last requests, of one more each time
        for first in reversed(range(len(rows))):
            total, found = 0, None
            for last in range(first, len(rows)):
                total += rows[last]
                if total > self.dynamic[self.batch][-1]:
                    break
                after, counts = best[len(rows) - 1 - last]
                took = after + self._call_seconds(self._bucket({**sizes, self.batch: total}))
                if found is None or took <= found[0] + 1e-9:  # of equals, the one whose first call is the largest
                    found = (took, (last - first + 1, *counts))
            assert found is not None  # one request is never larger than the largest size
            best.append(found)
        return best[-1][1]

    def _call_seconds(self, bucket: Mapping[str, int]) -> float:
        return self._seconds.get(tuple(bucket[n] for n in self.dynamic), 0.0) + CALL_SECONDS

    def _bucket(self, sizes: Mapping[str, int]) -> dict[str, int]:
        return {name: next(n for n in self.dynamic[name] if n >= size) for name, size in sizes.items()}

    def _sizes_of(self, arrays: Sequence[np.ndarray]) -> dict[str, int]:
        return {
            name: size
            for spec, x in zip(self.inputs, arrays, strict=True)
            for name, size in zip(spec.shape, x.shape, strict=True)
            if isinstance(name, str)
        }

    def _call(self, members: Sequence[int], requests: Sequence[Sequence[np.ndarray]]) -> Call:
        rows = tuple(r[0].shape[0] for r in requests) if self.batch is not None else (1,)
        sizes = self._sizes_of(requests[0])
        if self.batch is not None:
            sizes[self.batch] = sum(rows)
        bucket = self._bucket(sizes)
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
