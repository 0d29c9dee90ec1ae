"""Flax modules, nnx and linen, as a Source."""

from __future__ import annotations

import functools as ft
from typing import Any

import jax
from flax import nnx

from zenith_jax.errors import FrontendError
from zenith_jax.frontends._source import Source
from zenith_jax.frontends.functions import argument_names


def source(obj: Any, *example_inputs: Any) -> Source:
    """obj: an nnx.Module; (linen module, variables); or a bound linen module. The module as it stands: `.eval()` it
    before, or bind `train=False`, where it behaves differently in training."""
    del example_inputs
    if isinstance(obj, nnx.Module):
        return _nnx(obj)
    if isinstance(obj, tuple):
        module, variables = obj
    elif obj.scope is not None:
        module, variables = obj.unbind()
    else:
        raise FrontendError(
            f"{type(obj).__name__} has no variables: give (module, variables), where variables = "
            "module.init(jax.random.key(0), *inputs), or module.bind(variables)"
        )
    return Source(
        function=module.apply,
        params=variables,
        name=type(module).__name__,
        framework="flax.linen",
        arguments=argument_names(module),
    )


def _nnx(module: nnx.Module) -> Source:
    # Keys and counters of random streams are no parameters; where they would advance, `_called` says so.
    graph, random, params = nnx.split(module, nnx.RngState, ...)
    return Source(
        function=ft.partial(_called, graph, random, type(module).__name__),
        params=params,
        name=type(module).__name__,
        framework="flax.nnx",
        arguments=argument_names(module),
    )


def _called(graph: Any, random: Any, name: str, params: Any, *args: Any) -> Any:
    random = jax.tree.map(lambda x: x, random)  # its variables anew, as part of this trace
    module = nnx.merge(graph, random, params)
    before = jax.tree.leaves((random, params))
    results = module(*args)
    _, random_after, params_after = nnx.split(module, nnx.RngState, ...)
    after = jax.tree.leaves((random_after, params_after))
    if len(before) != len(after) or any(a is not b for a, b in zip(before, after, strict=True)):
        raise FrontendError(
            f"{name} changes its state when it is called (batch statistics, dropout keys, a cache), which a compiled "
            "model has no place for: call its .eval() first, or keep the module and use zenith.flax.wrap(module)"
        )
    return results
