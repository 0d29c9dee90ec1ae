# pyright: reportMissingImports=false
"""The backend of `torch.compile(module, backend="zenith")`: each graph that Dynamo captures runs in JAX.

Dynamo splits a function where it cannot be captured, guards on what it assumed, and hands over the parameters as inputs
of the graph. Those become the weights of a program: bound once, shared with torch.
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch

from zenith_jax.frontends.torch import require
from zenith_jax.frontends.torch.errors import TorchError, warn_fallback
from zenith_jax.frontends.torch.module import Engine
from zenith_jax.frontends.torch.program import Executable
from zenith_jax.frontends.torch.repeated import MISSED, Repeated, after
from zenith_jax.frontends.torch.state import runs_in_torch
from zenith_jax.frontends.torch.weights import Changed

_OPTIONS = {"strict": False, "frozen": False}


def zenith(
    graph_module: torch.fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: dict[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """What Dynamo calls with a graph: the function that runs in its place.

    options: of torch.compile, strict and frozen as in `zenith.torch.compile`.
    """
    require()
    if mode not in (None, "default"):
        raise TorchError(f"backend='zenith' has no mode {mode!r}; leave it out")
    if unknown := sorted(set(options or {}) - set(_OPTIONS)):
        raise TorchError(f"backend='zenith' has no options {unknown}, only {sorted(_OPTIONS)}")
    settings = {**_OPTIONS, **(options or {})}
    # Dynamo compiles anew when gradients are switched on or off, or an input starts to require them.
    if torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in example_inputs):
        reason = (
            "gradients are on and an input or a parameter requires them, which Zenith's inference does not compute: "
            "call it under torch.inference_mode() or torch.no_grad()"
        )
        return _in_torch(graph_module, reason, settings["strict"])
    if not any(isinstance(x, torch.Tensor) for x in example_inputs):
        return graph_module.forward  # arithmetic on sizes
    return _Graph(graph_module, settings["strict"], settings["frozen"])


def _in_torch(graph_module: torch.fx.GraphModule, reason: str, strict: bool) -> Callable[..., Any]:
    if strict:
        raise TorchError(reason)
    warn_fallback("a graph of torch.compile", reason)
    return graph_module.forward


class _Graph:
    """One graph of Dynamo's, called with all its inputs in their order."""

    def __init__(self, graph_module: torch.fx.GraphModule, strict: bool, frozen: bool):
        self.graph_module, self.strict, self.frozen = graph_module, strict, frozen
        nodes = [n for n in graph_module.graph.nodes if n.op == "placeholder"]
        self.values = [n.meta.get("example_value") for n in nodes]
        self.weight_positions = [i for i, node in enumerate(nodes) if _is_weight(node)]
        self.sizes = _sizes(self.values)
        known = {*self.weight_positions, *self.sizes}
        self.input_positions = [i for i in range(len(nodes)) if i not in known]
        self.module: _WithWeights | None = None
        self.is_fixed = all(_has_fixed_shape(self.values[i]) for i in self.input_positions)
        self.executable: Executable | None = None
        self.repeated: Repeated | None = None
        self.__name__ = "zenith"  # torch asks for it in each call
        self.lock = threading.RLock()  # modules of one class share a graph: a call binds its own weights, then runs

    def __call__(self, *args: Any) -> Any:
        try:
            if (repeated := self.repeated) is not None:
                result = repeated.call(args)
                if result is not MISSED:
                    return result
            if reason := runs_in_torch():
                raise TorchError(reason)
            with self.lock:
                return self._usual(args)
        except TorchError as error:
            if self.strict:
                raise
            warn_fallback("a graph of torch.compile", str(error))
            return self.graph_module(*args)

    def _usual(self, args: tuple[Any, ...]) -> Any:
        if self.module is None:
            # Not before the first call: an export while Dynamo compiles this frame would add to its guards.
            module = _WithWeights(self, args)
            self.engine = Engine(module, module, dynamic=self._axes, frozen=self.frozen, repeats=False)
            self.module = module
        if self.module.follow(args):  # modules of one class share a graph, which is then no module's own to freeze
            self.frozen = self.engine.frozen = False
        inputs = tuple([args[i] for i in self.input_positions])
        if self.executable is not None:
            try:
                result = self.executable(inputs, frozen=self.frozen)
                self._repeat(args)
                return result
            except Changed:
                self.executable = self.repeated = None
        result = self.engine(inputs, {})
        if self.is_fixed and len(self.engine.ready) == 1:  # by Dynamo's guards: there is nothing to look up
            (self.executable,) = self.engine.ready.values()
            self._repeat(args)
        return result

    def _repeat(self, args: tuple[Any, ...]) -> None:
        """Makes the next call like this one a short one."""
        if self.executable is not None and all(type(args[i]) is torch.Tensor for i in self.input_positions):
            self.repeated = after(
                self.executable, args, self.input_positions, weights=self.weight_positions, frozen=self.frozen
            )

    def _axes(self, tensors: Sequence[torch.Tensor]) -> list[tuple[int, ...]]:
        """The axes whose sizes are symbols in Dynamo's own trace."""
        shapes = [self.values[i].shape for i in self.input_positions if isinstance(self.values[i], torch.Tensor)]
        return [tuple(axis for axis, n in enumerate(shape) if not isinstance(n, int)) for shape in shapes]


def _has_fixed_shape(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and all(isinstance(n, int) for n in value.shape)


def _is_weight(node: torch.fx.Node) -> bool:
    """Whether the input is a parameter or a buffer: the same tensor in each call."""
    if isinstance(node.meta.get("example_value"), torch.nn.Parameter):
        return True
    # What Dynamo knows of the tensor itself; the example in its place has none of it.
    return node.meta.get("tensor_dict", {}).get("_dynamo_static_input_type") is not None


def _sizes(values: Sequence[Any]) -> dict[int, tuple[int, int]]:
    """For the inputs that are only the size of another one: where they are read, (input, axis)."""
    axes = {}
    for i, value in enumerate(values):
        if isinstance(value, torch.Tensor):
            for axis, n in enumerate(value.shape):
                if isinstance(n, torch.SymInt):
                    axes.setdefault(str(n.node.expr), (i, axis))
    found = {i: axes.get(str(v.node.expr)) for i, v in enumerate(values) if isinstance(v, torch.SymInt)}
    return {i: place for i, place in found.items() if place is not None}


class _WithWeights(torch.nn.Module):
    """The graph as a module that owns the tensors that Dynamo passes for parameters and buffers."""

    graph: Any
    positions: Any
    weight_names: Any
    weights: Any

    def __init__(self, graph: _Graph, args: Sequence[Any]):
        super().__init__()
        self.graph = graph.graph_module
        self.__dict__["positions"] = graph
        self.__dict__["weight_names"] = tuple(f"weight_{i}" for i in graph.weight_positions)
        self.__dict__["weights"] = [None] * len(graph.weight_positions)
        self.follow(args)

    def follow(self, args: Sequence[Any]) -> bool:
        """Takes this call's tensors; whether they are others than before."""
        tensors = [args[i] for i in self.positions.weight_positions]
        if all(map(operator.is_, tensors, self.weights)):
            return False
        self.__dict__["weights"] = tensors
        self._buffers.update(zip(self.weight_names, tensors, strict=True))
        return True

    def forward(self, *inputs: Any) -> Any:
        positions = self.positions
        args: dict[int, Any] = dict(zip(positions.input_positions, inputs, strict=True))
        for name, i in zip(self.weight_names, positions.weight_positions, strict=True):
            args[i] = self._buffers[name]
        args.update({i: args[j].shape[axis] for i, (j, axis) in positions.sizes.items()})
        return self.graph(*(args[i] for i in range(len(args))))
