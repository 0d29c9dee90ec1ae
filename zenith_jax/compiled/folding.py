"""What a model computes from its parameters alone, computed once when it is compiled: `passes/known.py` says what."""

from __future__ import annotations

import dataclasses
import functools as ft
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from zenith_jax.api import current_context, jit
from zenith_jax.config import config
from zenith_jax.passes import known
from zenith_jax.passes.panels import with_panels
from zenith_jax.passes.products import with_fast_products
from zenith_jax.telemetry import compiling


class Arrays:
    """What programs take, by name: the parameters, and values made of them, each held once."""

    def __init__(self, parameters: Mapping[str, jax.Array]):
        self.parameters = parameters
        self.folded: dict[str, jax.Array] = {}

    def __getitem__(self, name: str) -> jax.Array:
        return self.parameters[name] if name in self.parameters else self.folded[name]

    def added(self, value: jax.Array, made_of: Sequence[str]) -> str:
        """The name of a value made of these parameters; another program may have made the same."""
        stem = f"folded.{made_of[0]}"
        name, count = stem, 1
        while name in self.folded or name in self.parameters:
            other = self.folded.get(name)
            if other is not None and (other.shape, other.dtype) == (value.shape, value.dtype):
                if np.array_equal(np.asarray(other), np.asarray(value), equal_nan=value.dtype.kind == "f"):
                    return name
            count += 1
            name = f"{stem}.{count}"
        self.folded[name] = value
        return name


@dataclasses.dataclass(frozen=True)
class Folded:
    """jitted(arrays, inputs) -> outputs. names: of the arrays. replaced: parameters that values stand for."""

    jitted: Any
    names: tuple[str, ...]
    replaced: frozenset[str] = frozenset()


def folded(function: Callable[..., Any], arrays: Arrays, structs: Sequence[Any]) -> Folded:
    """`zenith.jit` of `function(params, inputs)` for inputs like `structs`, less what needs no inputs."""
    names, params = tuple(arrays.parameters), list(arrays.parameters.values())
    # A new function each time: JAX's caches must not answer for an earlier trace, whose sites are elsewhere.
    fresh = jit(ft.wraps(function)(lambda params, inputs: function(params, inputs)))
    started = time.perf_counter()
    platform = current_context(config()).platform
    jaxpr = with_panels(fresh.trace(params, structs).jaxpr, len(params), platform)
    if all(len(p.devices()) == 1 for p in params):  # weights side by side would be divided elsewhere
        jaxpr = with_fast_products(jaxpr, len(params), platform)
    split = known.split(jaxpr, len(params), platform)
    if split is None:
        return Folded(fresh, names)

    @ft.wraps(function)
    def remaining(arguments: Sequence[Any], inputs: Sequence[Any]) -> Any:
        compiling.resume(started)
        return split.program(*arguments, *inputs)

    values = jax.jit(split.prepare)(*params)
    made = [arrays.added(v, [names[i] for i in of]) for v, of in zip(values, split.made_of, strict=True)]
    kept = [names[i] for i in split.kept]
    used = {names[i] for of in split.made_of for i in of}
    return Folded(jax.jit(remaining), (*made, *kept), frozenset(used.difference(kept)))
