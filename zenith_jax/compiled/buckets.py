"""Named dimensions of a compiled model, and the sizes that it is compiled for: `dynamic={"batch": (1, 8, 64)}`.

A call is padded to the next size and its results are cut. That is right only where the model computes each position
along the dimension by itself; `compile` tests it on the example inputs.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zenith_jax.errors import FrontendError, InputError
from zenith_jax.frontends._source import Declared

Shape = tuple[int | str, ...]  # a string is the name of a dimension


@dataclasses.dataclass(frozen=True)
class Spec:
    """One array that goes into a model or comes out. dtype: NumPy's name of it, "bfloat16" included."""

    name: str
    shape: Shape
    dtype: str

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype}[{', '.join(map(str, self.shape))}]"

    def struct(self, sizes: Mapping[str, int]) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(tuple(sizes[n] if isinstance(n, str) else n for n in self.shape), self.dtype)


def checked(dynamic: Mapping[str, Sequence[int]] | None) -> dict[str, tuple[int, ...]]:
    """The sizes of each dimension, ascending. Raises FrontendError."""
    if not isinstance(dynamic, Mapping | None):
        raise FrontendError(f'dynamic must name dimensions and their sizes, {{"batch": (1, 8, 64)}}, got {dynamic!r}')
    sizes: dict[str, tuple[int, ...]] = {}
    for name, given in (dynamic or {}).items():
        if isinstance(given, int) or not given or any(not isinstance(n, int) or n < 1 for n in given):
            raise FrontendError(f"dynamic: {name!r} must have sizes to compile for, such as (1, 8, 64), got {given!r}")
        sizes[name] = tuple(sorted(set(given)))
    return sizes


def combinations(dynamic: Mapping[str, tuple[int, ...]]) -> Iterator[dict[str, int]]:
    """Every choice of one size for each dimension, the smallest first; one empty choice where there are none."""
    for sizes in itertools.product(*dynamic.values()):
        yield dict(zip(dynamic, sizes, strict=True))


def named_shapes(
    examples: Sequence[Any], declared: Sequence[Declared], dynamic: Mapping[str, tuple[int, ...]]
) -> list[Shape]:
    """Shapes of the examples with the names of their dynamic dimensions.

    A name comes from a symbolic dimension of the example, from the model's declaration, or is "batch", the first
    dimension of every input. Raises FrontendError where a name is nowhere.
    """
    is_named = any(not isinstance(n, int) for x in examples for n in x.shape)
    declares = len(declared) == len(examples) and any(
        isinstance(n, str) and n in dynamic for d in declared for n in d.shape or ()
    )
    shapes: list[Shape] = []
    for i, x in enumerate(examples):
        shape: list[int | str] = [n if isinstance(n, int) else str(n) for n in x.shape]
        if not is_named and declares and len(declared[i].shape or ()) == len(shape):
            shape = [
                d if isinstance(d, str) and d in dynamic else n
                for n, d in zip(shape, declared[i].shape or (), strict=True)
            ]
        elif not is_named and not declares and "batch" in dynamic and shape:
            shape[0] = "batch"
        shapes.append(tuple(shape))
    found = {n for shape in shapes for n in shape if isinstance(n, str)}
    if found != set(dynamic):
        raise FrontendError(
            f"dynamic names the dimensions {sorted(dynamic)}, the inputs have {sorted(found)}. Name them in an "
            'example: jax.ShapeDtypeStruct(jax.export.symbolic_shape("batch, length"), "int32"). "batch" alone '
            "needs none: it is the first dimension of every input"
        )
    return shapes


def output_shapes(shapes_at: Mapping[tuple[int, ...], Sequence[tuple[int, ...]]], names: Sequence[str]) -> list[Shape]:
    """Named shapes of outputs, from their shapes at two different sizes of every dimension.

    shapes_at: {sizes of the dimensions: shapes}; the first entry is the base, each other differs in one dimension.
    """
    (base, shapes), *others = shapes_at.items()
    named: list[list[int | str]] = [list(s) for s in shapes]
    for sizes, changed in others:
        (position,) = (i for i, (a, b) in enumerate(zip(base, sizes, strict=True)) if a != b)
        for output, shape in enumerate(changed):
            for axis, (was, now) in enumerate(zip(shapes[output], shape, strict=True)):
                if was == now:
                    continue
                if (was, now) != (base[position], sizes[position]):
                    raise FrontendError(
                        f"output {output} has size {was} along axis {axis} where {names[position]} is "
                        f"{base[position]}, and {now} where it is {sizes[position]}: results cannot be cut to the size "
                        "of a call. Compile for each size instead"
                    )
                named[output][axis] = names[position]
    return [tuple(s) for s in named]


def sizes_of(specs: Sequence[Spec], arrays: Sequence[Any], dynamic: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """The size that each named dimension has in a call. Raises InputError for contradictions and for too large ones."""
    sizes: dict[str, int] = {}
    for spec, x in zip(specs, arrays, strict=True):
        for axis, name in enumerate(spec.shape):
            if isinstance(name, str) and axis < np.ndim(x):
                size = np.shape(x)[axis]
                if sizes.setdefault(name, size) != size:
                    raise InputError(f"{spec.name}: {name} is {size}, in an input before it is {sizes[name]}")
                if size > dynamic[name][-1]:
                    raise InputError(
                        f"{spec.name}: {name} is {size}, the model is compiled for up to {dynamic[name][-1]}: split "
                        f"the call, or compile with dynamic={{{name!r}: (..., {size})}}"
                    )
    return sizes


def bucket_of(sizes: Mapping[str, int], dynamic: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """For each dimension the smallest compiled size that holds the call's."""
    return {name: next(n for n in dynamic[name] if n >= size) for name, size in sizes.items()}


def padded(spec: Spec, x: Any, bucket: Mapping[str, int]) -> Any:
    """x with zeros behind it, up to the bucket's sizes."""
    widths = [
        (0, bucket[n] - size if isinstance(n, str) else 0) for n, size in zip(spec.shape, np.shape(x), strict=True)
    ]
    if not any(after for _, after in widths):
        return x
    # On the host there is no program to compile for each size that comes.
    return np.pad(x, widths) if isinstance(x, np.ndarray) else jnp.pad(x, widths)


def cut(spec: Spec, x: Any, sizes: Mapping[str, int]) -> Any:
    """The part of a result that belongs to the call."""
    slices = tuple(slice(sizes[n]) if isinstance(n, str) else slice(None) for n in spec.shape)
    return x if all(s.stop is None or s.stop == n for s, n in zip(slices, x.shape, strict=True)) else x[slices]
