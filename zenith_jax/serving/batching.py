"""Several requests as one call of a compiled model: rows are gathered, padded to a compiled size, and given back.

Knows NumPy arrays, Specs and a CompiledModel; nothing of Triton.
"""

from __future__ import annotations

import functools as ft
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from zenith_jax.compiled import buckets
from zenith_jax.errors import InputError

# What a call costs besides its program: joining, dispatch, and cutting (backend.py, two EPYC cores, 2026-11-26).
CALL_SECONDS = 0.0002


class Call(NamedTuple):
    """requests: indices of those whose rows are in the call, one behind the other. rows: of each.

    arrays: in the order of the model's inputs, padded. bucket: the sizes of the program that takes them. is_whole: its
    results are, as they are, those of its only request.
    """

    requests: tuple[int, ...]
    rows: tuple[int, ...]
    arrays: list[np.ndarray]
    bucket: Mapping[str, int]
    sizes: Mapping[str, int]
    is_whole: bool


class _Plan(NamedTuple):
    """Of a call: what its requests have, the program that takes it, and the shapes of that one's inputs."""

    sizes: Mapping[str, int]
    bucket: Mapping[str, int]
    padded: Sequence[tuple[int, ...]]
    is_exact: bool  # one request, of a compiled size


class Batcher:
    """For a model whose inputs and outputs all have the dimension `batch` first; None where requests are not joined.

    seconds: of a call of each program, by its sizes in the order of `dynamic`; where it is not known, requests are
    joined to as few calls as possible. It is on a CPU that 9 rows are faster as 8 and 1 than padded to 16.
    """

    def __init__(
        self,
        inputs: Sequence[Any],
        dynamic: Mapping[str, tuple[int, ...]],
        batch: str | None,
        seconds: Mapping[tuple[int, ...], float] | None = None,
    ):
        self.inputs, self.dynamic, self.batch = tuple(inputs), dynamic, batch
        self._seconds = seconds or {}
        # Requests come in few sizes, and Python with cold caches takes four times as long as in a loop.
        self._partition = ft.lru_cache(maxsize=1024)(self._best_partition)
        self._plan = ft.lru_cache(maxsize=1024)(self._planned)
        self._dtypes = [np.dtype(spec.dtype) for spec in self.inputs]
        # Least and largest size of each axis.
        self._sizes = [
            [(1, dynamic[n][-1]) if isinstance(n, str) else (n, n) for n in spec.shape] for spec in self.inputs
        ]
        names = [n for spec in self.inputs for n in spec.shape if isinstance(n, str)]
        self._has_repeated_names = len(names) > len(set(names))

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
        narrow = x.astype(dtype)
        # Whether they come back as they were, by their bytes: a third of what the least and the greatest cost.
        if dtype.kind in "iu" and narrow.astype(x.dtype).tobytes() != x.tobytes():
            raise InputError(
                f"the input {self.inputs[index]} got values from {x.min()} to {x.max()}, which {dtype} does not hold"
            )
        return narrow

    def agree(self, arrays: Sequence[np.ndarray]) -> None:
        """Raises InputError where a dimension of one name has several sizes in a request's inputs: its rows would be
        cut at the wrong places, and another request's with them."""
        if self._has_repeated_names:
            buckets.sizes_of(self.inputs, arrays, self.dynamic)

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

        Raises nothing: arrays have been through `converted` and `agree`.
        """
        if len(requests) == 1 and requests[0] is not None:
            arrays = requests[0]
            plan = self._plan(tuple([x.shape for x in arrays]), None)
            if plan.is_exact:
                rows = (arrays[0].shape[0],) if self.batch is not None else (1,)
                return [Call((0,), rows, list(arrays), plan.bucket, plan.sizes, True)]
            return [self._call((0,), requests)]  # type: ignore[arg-type]
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
        bucket = self._plan(tuple(x.shape for x in requests[group[0]]), 1).bucket
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
                took = after + self._call_seconds(buckets.bucket_of({**sizes, self.batch: total}, self.dynamic))
                if found is None or took <= found[0] + 1e-9:  # of equals, the one whose first call is the largest
                    found = (took, (last - first + 1, *counts))
            assert found is not None  # one request is never larger than the largest size
            best.append(found)
        return best[-1][1]

    def _call_seconds(self, bucket: Mapping[str, int]) -> float:
        return self._seconds.get(tuple(bucket[n] for n in self.dynamic), 0.0) + CALL_SECONDS

    def _planned(self, shapes: tuple[tuple[int, ...], ...], rows: int | None) -> _Plan:
        """shapes: of the inputs of one of the requests. rows: of all of them; None: there are no others."""
        sizes = {
            name: size
            for spec, shape in zip(self.inputs, shapes, strict=True)
            for name, size in zip(spec.shape, shape, strict=True)
            if isinstance(name, str)
        }
        if self.batch is not None and rows is not None:
            sizes[self.batch] = rows
        bucket = buckets.bucket_of(sizes, self.dynamic)
        padded = [tuple(bucket[n] if isinstance(n, str) else n for n in spec.shape) for spec in self.inputs]
        return _Plan(sizes, bucket, padded, rows is None and bucket == sizes and tuple(padded) == shapes)

    def _call(self, members: Sequence[int], requests: Sequence[Sequence[np.ndarray]]) -> Call:
        rows = tuple(r[0].shape[0] for r in requests) if self.batch is not None else (1,)
        plan = self._plan(tuple(x.shape for x in requests[0]), sum(rows))
        arrays = [self._joined([r[i] for r in requests], shape) for i, shape in enumerate(plan.padded)]
        return Call(
            tuple(members), rows, arrays, plan.bucket, plan.sizes, len(members) == 1 and plan.bucket == plan.sizes
        )

    def _joined(self, parts: Sequence[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
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
    if call.is_whole:
        return [[x.copy() for x in results]]
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
