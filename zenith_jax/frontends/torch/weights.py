# pyright: reportMissingImports=false
"""The weights of a module as arrays: made once, in torch's memory, and looked after.

A weight that torch changes in place has changed in JAX too, since both have the same memory. One that torch replaces
(`module.weight = ...`, `module.to(...)`, `load_state_dict(assign=True)`) is found by its address before each call.
"""

from __future__ import annotations

import functools as ft
import operator
from collections.abc import Callable, Mapping
from typing import Any

import jax
import torch

from zenith_jax.frontends.torch.tensors import Inlet, shares_memory

Place = tuple[dict[str, Any], str]


def _address(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Where its elements lie: `w.data = w.data.t()` changes only the last of these."""
    return tensor.data_ptr(), tensor.shape, tensor.stride()


class Changed(Exception):
    """A weight has another shape, dtype or device than the program was made for."""


class Weights:
    """tensors: by name, of which `names` are arrays, in this order, and the rest are constants of the program.

    place: name -> the dictionary that holds the module's tensor of that name, and its key there.
    """

    def __init__(
        self, tensors: Mapping[str, torch.Tensor], names: list[str], wide: bool, place: Callable[[str], Place]
    ):
        self.names, self.place = names, place
        self.tensors = [tensors[name] for name in names]
        self.inlets = [Inlet(t, wide) for t in self.tensors]
        self.places = list(map(place, names))
        self.addresses = list(map(_address, self.tensors))
        self.arrays: list[jax.Array] = [inlet(t) for inlet, t in zip(self.inlets, self.tensors, strict=True)]
        self.copied: dict[int, int] = {}
        for i in range(len(self.arrays)):
            self._note_copy(i)
        self.constants = {k: (t, version(t)) for k, t in tensors.items() if k not in set(names)}

    def find(self, name: str) -> Any:
        """The module's present tensor of that name."""
        holder, key = self.place(name)
        return holder.get(key)

    @property
    def copied_names(self) -> list[str]:
        """Weights that JAX has a copy of: not dense, aligned to less than 64 bytes."""
        return [self.names[i] for i in self.copied]

    def current(self) -> list[jax.Array]:
        """The arrays, after a look at whether the module still has these tensors. Raises Changed."""
        try:
            tensors = [holder[name] for holder, name in self.places]
        except KeyError:  # deleted, or another kind of attribute now
            tensors = list(map(self.find, self.names))
        if not all(map(operator.is_, tensors, self.tensors)) or list(map(_address, tensors)) != self.addresses:
            self._rebind(tensors)
        for i, known in self.copied.items():
            if version(self.tensors[i]) != known:
                self.arrays = [*self.arrays]  # another list, as after any change
                self.arrays[i] = self.inlets[i](self.tensors[i])
                self._note_copy(i)
        for name, (tensor, known) in self.constants.items():
            if self.find(name) is not tensor or version(tensor) != known:
                raise Changed(name)
        return self.arrays

    def _rebind(self, tensors: list[torch.Tensor]) -> None:
        arrays = list(self.arrays)
        for i, (old, new) in enumerate(zip(self.tensors, tensors, strict=True)):
            if new is old and _address(new) == self.addresses[i]:
                continue
            if not isinstance(new, torch.Tensor) or (new.shape, new.dtype) != (self.arrays_shape(i), old.dtype):
                raise Changed(self.names[i])
            if Inlet(new, self.inlets[i].pair is None).device != self.inlets[i].device:
                raise Changed(self.names[i])
            arrays[i] = self.inlets[i](new)
        self.arrays, self.tensors = arrays, tensors
        self.addresses = list(map(_address, tensors))
        for i in range(len(arrays)):
            self._note_copy(i)

    def arrays_shape(self, i: int) -> tuple[int, ...]:
        shape = self.arrays[i].shape
        if self.inlets[i].pair is None:
            return shape
        return shape[:-1] if self.tensors[i].ndim else ()

    def _note_copy(self, i: int) -> None:
        if shares_memory(self.tensors[i], self.arrays[i]):
            self.copied.pop(i, None)
        else:
            self.copied[i] = version(self.tensors[i])


def version(tensor: torch.Tensor) -> int:
    """Counts what is written to the tensor in place."""
    return 0 if tensor.is_inference() else tensor._version  # torch does not count the writes to inference tensors


def finder(module: torch.nn.Module) -> Callable[[str], Place]:
    """name -> where the module's tensor of that name is; each name is resolved once."""

    @ft.cache
    def place(name: str) -> Place:
        path, _, leaf = name.rpartition(".")
        owner = module.get_submodule(path)
        holders = (owner._parameters, owner._buffers, vars(owner))
        return next((h for h in holders if leaf in h), owner._parameters), leaf

    return place
