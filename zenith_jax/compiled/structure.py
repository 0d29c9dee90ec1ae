"""Pytrees as a list of arrays and what is left: the tree, and the leaves that are no arrays."""

from __future__ import annotations

import dataclasses
import functools as ft
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from zenith_jax.errors import InputError, SavedModelError


class _Array:
    """Stands in `Structure.leaves` where an array is."""

    def __repr__(self) -> str:
        return "array"


ARRAY = _Array()


@dataclasses.dataclass(frozen=True)
class Structure:
    """tree: of all leaves. leaves: ARRAY, or the Python value that is bound. names: of the arrays, from their paths."""

    tree: Any
    leaves: tuple[Any, ...]
    names: tuple[str, ...]

    @classmethod
    def of(cls, value: Any) -> tuple[Structure, list[Any]]:
        """The structure of a pytree, and its arrays."""
        with_paths, tree = jax.tree_util.tree_flatten_with_path(value)
        leaves = tuple(ARRAY if is_array(x) else x for _, x in with_paths)
        names = tuple(_name(path) for path, x in with_paths if is_array(x))
        if len(set(names)) < len(names):  # {1: x, "1": y}
            names = tuple(f"{name}#{i}" for i, name in enumerate(names))
        return cls(tree, leaves, names), [x for _, x in with_paths if is_array(x)]

    @ft.cached_property
    def is_plain(self) -> bool:
        """Whether all leaves are arrays."""
        return all(x is ARRAY for x in self.leaves)

    @ft.cached_property
    def _is_tuple_of_arrays(self) -> bool:
        return self.is_plain and self.tree == jax.tree.structure(tuple(range(len(self.leaves))))

    @ft.cached_property
    def _is_array(self) -> bool:
        return self.is_plain and self.tree == jax.tree.structure(0)

    def arrays(self, value: Any) -> Sequence[Any]:
        """The arrays of a pytree of this structure. Raises InputError for another, or other Python values in it."""
        if self._is_tuple_of_arrays and type(value) is tuple and len(value) == len(self.leaves):
            return list(value)  # the usual case, a microsecond faster; what is no array in it is found by its shape
        leaves, tree = jax.tree.flatten(value)
        if tree != self.tree:
            raise InputError(f"the inputs must have the structure {self.tree}, got {tree}")
        if self.is_plain:
            return leaves
        for mine, given in zip(self.leaves, leaves, strict=True):
            if mine is not ARRAY and not _is_equal(mine, given):
                raise InputError(
                    f"the value {mine!r} was bound when the model was compiled, got {given!r}: compile for that value, "
                    "or give an array as the example of an input that changes"
                )
        return [x for x, mine in zip(leaves, self.leaves, strict=True) if mine is ARRAY]

    def filled(self, arrays: Sequence[Any]) -> Any:
        """The pytree with these arrays."""
        if self._is_array:
            return arrays[0]
        if self.is_plain:
            return jax.tree.unflatten(self.tree, arrays)
        remaining = iter(arrays)
        return jax.tree.unflatten(self.tree, [next(remaining) if x is ARRAY else x for x in self.leaves])


def is_array(x: Any) -> bool:
    return isinstance(x, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct)


def _is_equal(a: Any, b: Any) -> bool:
    return a is b or (type(a) is type(b) and bool(a == b))


def _name(path: Sequence[Any]) -> str:
    parts = (getattr(k, "key", getattr(k, "name", getattr(k, "idx", k))) for k in path)
    return ".".join(str(p) for p in parts)


# --- as JSON ----------------------------------------------------------------------------------------------------------


def to_json(structure: Structure, what: str) -> Any:
    """For a file. Raises SavedModelError where the tree needs Python classes, or a leaf is no JSON value."""
    return _encoded(structure.filled([ARRAY] * len(structure.names)), what)


def _encoded(value: Any, what: str) -> Any:
    if value is ARRAY:
        return "array"
    if value is None or type(value) in (bool, int, float, str):
        return {"value": value}
    if type(value) in (list, tuple):
        return {type(value).__name__: [_encoded(v, what) for v in value]}
    if type(value) is dict and all(isinstance(k, str) for k in value):
        return {"dict": {k: _encoded(v, what) for k, v in value.items()}}
    raise SavedModelError(
        f"{what} hold a {type(value).__module__}.{type(value).__qualname__}, which a file cannot rebuild without its "
        "code: use dicts with string keys, lists, tuples and arrays there"
    )


def from_json(value: Any) -> Structure:
    return Structure.of(_decoded(value))[0]


def _decoded(value: Any) -> Any:
    if value == "array":
        return jax.ShapeDtypeStruct((), np.float32)
    ((kind, content),) = value.items()
    if kind == "value":
        return content
    if kind == "dict":
        return {k: _decoded(v) for k, v in content.items()}
    return {"list": list, "tuple": tuple}[kind](_decoded(v) for v in content)
