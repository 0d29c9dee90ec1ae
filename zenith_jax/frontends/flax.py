"""Flax modules, nnx and linen: as a Source, and as modules whose calls are fused, `zenith.flax.wrap(module)`."""

from __future__ import annotations

import copy
import functools as ft
import logging
from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import linen, nnx

from zenith_jax.api import fuse
from zenith_jax.errors import FrontendError
from zenith_jax.frontends._source import Source
from zenith_jax.frontends.functions import argument_names

logger = logging.getLogger("zenith_jax")


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


# --- modules that keep their own interface ----------------------------------------------------------------------------


def wrap(module: Any, *, methods: Sequence[str] = ("__call__",)) -> Any:
    """The module, an nnx or a linen one, whose calls run Zenith's kernels: a training loop changes by this one line.

    >>> model = zenith.flax.wrap(Model(rngs=nnx.Rngs(0)))
    >>> optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)

    nnx: a module of a subclass of its class with the same variables, shared, under the same paths: checkpoints of one
    load into the other. `nnx.jit`, `nnx.grad`, `.train()`, `.eval()`, random streams and batch statistics work as
    before. methods: those that are fused; one that adds variables when it is called runs as it is written.
    linen: `apply`, of any method and with mutable collections, is fused; `init` is not.
    Outside of `nnx.jit` and `jax.jit` every call is traced anew, which is slow.
    """
    if isinstance(module, nnx.Module):
        return _retyped(module, _fused_nnx_class(type(module), tuple(methods)))
    if isinstance(module, linen.Module):
        if tuple(methods) != ("__call__",):
            raise FrontendError("methods is for nnx modules: a linen module's apply(..., method=) is fused for all")
        return _retyped(module, _fused_linen_class(type(module)))
    raise FrontendError(
        f"zenith.flax.wrap takes an nnx or linen module, got {type(module).__module__}.{type(module).__qualname__}"
        + (": give an instance of it" if isinstance(module, type) else "")
    )


def _retyped(module: Any, cls: type) -> Any:
    new = copy.copy(module)
    object.__setattr__(new, "__class__", cls)
    return new


@ft.cache  # one class for each: JAX's caches compare types
def _fused_nnx_class(cls: Any, methods: tuple[str, ...]) -> type:
    if hasattr(cls, "__zenith_class__"):
        return cls
    unknown = [name for name in methods if not callable(getattr(cls, name, None))]
    if unknown:
        raise FrontendError(f"{cls.__name__} has no methods {unknown}")
    members = {name: _fused_nnx_method(getattr(cls, name)) for name in methods}
    return type(cls)(cls.__name__, (cls,), {**_identity(cls), **members})


def _identity(cls: type) -> dict[str, Any]:
    return {"__module__": cls.__module__, "__doc__": cls.__doc__, "__zenith_class__": cls}


class _StructureChanged(Exception):
    """A call added or removed variables."""


def _fused_nnx_method(plain: Callable[..., Any]) -> Callable[..., Any]:
    @ft.wraps(plain)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        # Other modules among the arguments, random streams above all, change with the call as the module does.
        leaves, tree = jax.tree.flatten((args, kwargs), is_leaf=_is_graph_node)
        nodes = [x for x in leaves if _is_graph_node(x)]
        others = [None if _is_graph_node(x) else x for x in leaves]
        graph, state = nnx.split((self, nodes))

        def pure(state: Any, others: list[Any]) -> Any:
            before = jax.tree.leaves(state)
            module, new_nodes = nnx.merge(graph, state)
            remaining = iter(new_nodes)
            filled = [next(remaining) if _is_graph_node(x) else y for x, y in zip(leaves, others, strict=True)]
            inner_args, inner_kwargs = jax.tree.unflatten(tree, filled)
            results = plain(module, *inner_args, **inner_kwargs)
            graph_after, state_after = nnx.split((module, new_nodes))
            after = jax.tree.leaves(state_after)
            if graph_after != graph or len(after) != len(before):
                raise _StructureChanged
            return results, {i: a for i, (b, a) in enumerate(zip(before, after, strict=True)) if a is not b}

        try:
            results, changed = fuse(pure)(state, others)
        except _StructureChanged:
            logger.info("%s adds or removes variables when it is called, and is not fused", type(self).__name__)
            return plain(self, *args, **kwargs)
        if changed:
            values, state_tree = jax.tree.flatten(state)
            updated = [changed.get(i, value) for i, value in enumerate(values)]
            nnx.update((self, nodes), jax.tree.unflatten(state_tree, updated))
        return results

    return method


def _is_graph_node(x: Any) -> bool:
    return isinstance(x, nnx.Module | nnx.Rngs | nnx.RngStream)


@ft.cache
def _fused_linen_class(cls: Any) -> type:
    if hasattr(cls, "__zenith_class__"):
        return cls

    @ft.wraps(cls.apply)
    def apply(self: Any, variables: Any, *args: Any, rngs: Any = None, **kwargs: Any) -> Any:
        # What chooses how to apply stays as it is; arrays among the arguments are traced.
        options = {n: kwargs.pop(n) for n in ("method", "mutable", "capture_intermediates") if n in kwargs}

        def pure(variables: Any, args: Any, kwargs: Any, rngs: Any) -> Any:
            return cls.apply(self, variables, *args, rngs=rngs, **options, **kwargs)

        return fuse(pure)(variables, args, kwargs, rngs)

    return type(cls)(cls.__name__, (cls,), {**_identity(cls), "apply": apply})
