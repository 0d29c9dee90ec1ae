"""JAX functions, and callables that are pytrees of their own parameters, such as equinox modules."""

from __future__ import annotations

import functools as ft
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax

from zenith_jax.frontends._source import Source


def source(obj: Any, *example_inputs: Any) -> Source:
    """obj: `function(*inputs)`; `(function, params)`, where `function(params, *inputs)`; or a callable pytree."""
    del example_inputs
    if isinstance(obj, tuple):
        function, params = obj
        return Source(function, params, name_of(function), "jax", argument_names(function)[1:])
    if _is_pytree(obj):
        # Its leaves, activation functions among them, are the parameters: what is no array is bound when compiled.
        framework = type(obj).__module__.partition(".")[0] if _is_equinox(obj) else "jax"
        return Source(_called, obj, type(obj).__name__, framework, argument_names(obj))
    return Source(_without_params(obj), {}, name_of(obj), "jax", argument_names(obj))


def _called(module: Callable[..., Any], *args: Any) -> Any:
    return module(*args)


def _without_params(function: Callable[..., Any]) -> Callable[..., Any]:
    def apply(params: Any, *args: Any) -> Any:
        del params
        return function(*args)

    return apply


def _is_pytree(obj: Any) -> bool:
    return not jax.tree_util.all_leaves([obj])


def _is_equinox(obj: Any) -> bool:
    return any(c.__module__.startswith("equinox.") for c in type(obj).__mro__)


def name_of(function: Any) -> str:
    while isinstance(function, ft.partial):
        function = function.func
    return getattr(function, "__name__", type(function).__name__)


def argument_names(function: Any) -> Sequence[str]:
    """Names of the positional arguments; () where Python does not tell."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return ()
    return tuple(p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))
