"""A symbolic dimension compiled for a few sizes: inputs are padded with zeros to the next one, results are cut.

This is right where what the model gives for one entry of the dimension does not depend on the others, as for a batch.
Whether it does is the caller's knowledge; whether a result can be cut is found here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from zenith_jax.frontends.onnx.errors import OnnxError
from zenith_jax.frontends.onnx.graph import ValueInfo


@dataclasses.dataclass(frozen=True)
class Padding:
    """sizes: of each symbol in this call; buckets: what it was padded to."""

    sizes: Mapping[str, int]
    buckets: Mapping[str, int]


def checked(dynamic: Mapping[str, Sequence[int]], infos: Sequence[ValueInfo]) -> dict[str, tuple[int, ...]]:
    """`dynamic`, sorted. Raises OnnxError where it names what is no symbol of an input, or no sizes."""
    symbols = sorted({d for i in infos for d in i.shape or () if isinstance(d, str)})
    for symbol, sizes in dynamic.items():
        if symbol not in symbols:
            raise OnnxError(f"dynamic={{{symbol!r}: ...}}: the inputs' symbolic dimensions are {symbols}")
        if not sizes or not all(isinstance(s, int) and s > 0 for s in sizes):
            raise OnnxError(
                f"dynamic={{{symbol!r}: {sizes}}}: a tuple of positive sizes is expected, such as (1, 8, 64)"
            )
    return {symbol: tuple(sorted(sizes)) for symbol, sizes in dynamic.items()}


def padding(dynamic: Mapping[str, Sequence[int]], infos: Sequence[ValueInfo], inputs: Mapping[str, Any]) -> Padding:
    """What inputs of these shapes are padded to. Raises OnnxError where two disagree or one is larger than all."""
    sizes: dict[str, int] = {}
    for info, axis, symbol in _places(dynamic, infos, inputs):
        size = np.shape(inputs[info.name])[axis]
        if sizes.setdefault(symbol, size) != size:
            raise OnnxError(f"input {info}: {symbol} is {size} here, and {sizes[symbol]} in another input")
    buckets = {}
    for symbol, size in sizes.items():
        bucket = min((b for b in dynamic[symbol] if b >= size), default=None)
        if bucket is None:
            raise OnnxError(f"{symbol} is {size}, its largest bucket is {max(dynamic[symbol])}: load(dynamic=...)")
        buckets[symbol] = bucket
    return Padding(sizes, buckets)


def padded(pad: Padding, infos: Sequence[ValueInfo], inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs with zeros behind."""
    result = dict(inputs)
    for info, axis, symbol in _places(pad.sizes, infos, inputs):
        value = result[info.name]
        widths = [(0, 0)] * np.ndim(value)
        widths[axis] = (0, pad.buckets[symbol] - pad.sizes[symbol])
        if widths[axis][1]:
            result[info.name] = np.pad(value, widths) if isinstance(value, np.ndarray) else jnp.pad(value, widths)
    return result


def cut(
    pad: Padding, infos: Sequence[ValueInfo], results: Sequence[Any], shapes: Callable[[], Sequence[Any]]
) -> tuple[Any, ...]:
    """The results without what the padding added.

    shapes: gives the results' shapes without padding, with `.shape`; asked for where the file does not declare them in
    symbols of the inputs. Raises OnnxError for a dimension that is no symbol but computed from one: of a reshape to
    (batch * length) nobody knows where the padding is.
    """
    if pad.sizes == pad.buckets:
        return tuple(results)
    declared = [_declared(pad, info, result) for info, result in zip(infos, results, strict=True)]
    if any(shape is None for shape in declared):
        exact = shapes()
        declared = [d if d is not None else getattr(e, "shape", None) for d, e in zip(declared, exact, strict=True)]
    return tuple(_cut(pad, *triple) for triple in zip(infos, results, declared, strict=True))


def _places(symbols: Any, infos: Sequence[ValueInfo], inputs: Mapping[str, Any]) -> list[tuple[ValueInfo, int, str]]:
    """Input, axis and symbol of each dimension of an input that one of the symbols names."""
    return [
        (info, axis, symbol)
        for info in infos
        if info.shape is not None and info.name in inputs and np.ndim(inputs[info.name]) == len(info.shape)
        for axis, symbol in enumerate(info.shape)
        if isinstance(symbol, str) and symbol in symbols
    ]


def _declared(pad: Padding, info: ValueInfo, result: Any) -> tuple[int, ...] | None:
    """The shape without padding as the file has it, or None where it says too little or other than what came."""
    if info.shape is None or np.ndim(result) != len(info.shape) or isinstance(result, list | tuple):
        return None
    came = tuple(pad.buckets.get(d) if isinstance(d, str) else d for d in info.shape)
    if came != np.shape(result):
        return None
    return tuple(pad.sizes[d] if isinstance(d, str) else int(d or 0) for d in info.shape)


def _cut(pad: Padding, info: ValueInfo, result: Any, shape: tuple[int, ...] | None) -> Any:
    if shape is None:
        raise OnnxError(f"output {info} is no array, and cannot be cut to the size of {', '.join(pad.sizes)}")
    pairs = set(zip(pad.buckets.values(), pad.sizes.values(), strict=True))
    for came, wanted in zip(np.shape(result), shape, strict=True):
        if came != wanted and (came, wanted) not in pairs:
            raise OnnxError(
                f"output {info} has the shape {np.shape(result)} for {dict(pad.buckets)} and {shape} for "
                f"{dict(pad.sizes)}: a dimension that is computed from a padded one cannot be cut; leave it out of "
                f"load(dynamic=...)"
            )
    return result if np.shape(result) == shape else result[tuple(slice(n) for n in shape)]
