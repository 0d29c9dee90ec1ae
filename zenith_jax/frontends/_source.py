"""What every frontend gives: a model as a pure JAX function and its parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from zenith_jax.errors import MissingExtraError


@dataclasses.dataclass(frozen=True)
class Declared:
    """An input as the model itself declares it. shape: a string is the name of a dimension, None one without."""

    name: str
    shape: tuple[int | str | None, ...] | None
    dtype: str


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """A model of any framework as `function(params, *args) -> outputs`, pure and traceable by JAX.

    params: a pytree of arrays, shared with the model that it comes from, never copied.
    framework: "jax", "flax.nnx", "flax.linen", "equinox", "onnx", "torch", "keras", ...
    arguments: names of the positional arguments, where they are known. outputs: names of the flattened outputs.
    adapt: (the tuple of arguments as a caller gives them) -> tuple of JAX arrays or pytrees of them; None: as they are.
      These may lie in the memory of the arguments, which the caller therefore keeps until the outputs are restored.
    restore: (outputs of `function`) -> outputs of the framework's own types; None: JAX arrays.
    declared: the inputs as the model declares them, in the order of the flattened arguments.
    """

    function: Callable[..., Any]
    params: Any
    name: str
    framework: str
    arguments: Sequence[str] = ()
    outputs: Sequence[str] = ()
    adapt: Callable[[tuple[Any, ...]], tuple[Any, ...]] | None = None
    restore: Callable[[Any], Any] | None = None
    declared: Sequence[Declared] = ()


def missing(what: str, package: str, extra: str) -> MissingExtraError:
    """The error of a door whose package is not installed."""
    return MissingExtraError(f"{what} needs the package {package}: pip install 'zenith-jax[{extra}]'")
