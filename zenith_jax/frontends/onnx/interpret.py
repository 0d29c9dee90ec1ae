"""Runs a graph node by node on values that are static (NumPy) or JAX's: tracing it is converting it.

A node whose inputs are all static is computed while tracing, so that chains such as Shape -> Gather -> Concat ->
Reshape stay values. What it gives is NumPy again, with ONNX's dtypes also where JAX is in 32-bit mode.
"""

from __future__ import annotations

import collections
import dataclasses
import functools as ft
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zenith_jax.frontends.onnx import functions, limits, registry
from zenith_jax.frontends.onnx.errors import NotStaticError, OnnxError, UnsupportedError
from zenith_jax.frontends.onnx.graph import FunctionDef, Graph, NodeDef, Reference
from zenith_jax.frontends.onnx.ops import conv
from zenith_jax.frontends.onnx.values import is_static, is_symbolic

MAX_CALL_DEPTH = 64  # functions within functions
# A computed constant of more elements than this, all equal, becomes a broadcast: weights of a network without any are
# made by ConstantOfShape, and XLA would carry them as literals.
_LARGE = 1 << 12


@dataclasses.dataclass
class Run:
    """What all graphs of one run share. weights: by key. size_bounds: by node label or output name."""

    functions: Mapping[tuple[str, str, str], FunctionDef]
    weights: Mapping[str, Any]
    size_bounds: Mapping[str, int] = dataclasses.field(default_factory=dict)
    nodes: int = 0

    def count(self, nodes: int) -> None:
        """Functions that call each other twice, and loops in loops, would not end while anybody waits."""
        self.nodes += nodes
        if self.nodes > limits.MAX_NODES:
            raise OnnxError(f"more than {limits.MAX_NODES} nodes would run in one call, rounds of loops included")


@dataclasses.dataclass(frozen=True)
class Frame:
    """Where a graph runs: the model or a function body, whose attributes its nodes may refer to."""

    run: Run
    opsets: Mapping[str, int]
    attributes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    depth: int = 0


@dataclasses.dataclass(frozen=True, eq=False)
class Subgraph:
    """A graph attribute as operators get it: a function of the graph's inputs that gives the list of its outputs.

    The values that it takes from the surrounding graph are bound.
    """

    graph: Graph
    captured: Mapping[str, Any]
    frame: Frame

    def __call__(self, *inputs: Any) -> list[Any]:
        if len(inputs) != len(self.graph.inputs):
            raise OnnxError(f"graph {self.graph.name!r} takes {len(self.graph.inputs)} inputs, got {len(inputs)}")
        given = dict(zip((i.name for i in self.graph.inputs), inputs, strict=True))
        return evaluate(self.graph, {**self.captured, **given}, self.frame)


def evaluate(graph: Graph, given: Mapping[str, Any], frame: Frame) -> list[Any]:
    """The graph's outputs. given: a value for each input and each captured name."""
    frame.run.count(len(graph.nodes) + 1)
    values = {name: frame.run.weights[key] for name, key in graph.initializers.items()}
    values.update(given)
    uniform: set[str] = set()  # arrays of one value
    for node, dead in zip(graph.nodes, graph.frees, strict=True):
        with _named(node, frame):
            if node.op_type == "Conv" and not uniform.isdisjoint(node.inputs[1:2]):
                x, w = node.inputs[:2]
                values[w] = conv.not_constant(values[w], values[x])
            results = _results(node, values, graph.read, frame)
            if len(results) < len(node.outputs) and any(o in graph.read for o in node.outputs[len(results) :]):
                raise UnsupportedError(f"output {node.outputs[len(results)]!r} is not computed")
            limits.check_results(results)
        if node.op_type == "ConstantOfShape":
            uniform.update(node.outputs)
        values.update((name, result) for name, result in zip(node.outputs, results, strict=False) if name)
        for name in dead:
            values.pop(name, None)
    return [values.get(o.name) for o in graph.outputs]


class _named:
    """Puts the node into what is raised inside. The innermost node names itself; the ones around it keep quiet."""

    def __init__(self, node: NodeDef, frame: Frame):
        self.node, self.frame = node, frame

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None or not isinstance(error, Exception) or getattr(error, "names_node", False):
            return
        named = _error_type(error)(f"node {self.node}, opset {_opset(self.node, self.frame)}: {_text(error)}")
        named.names_node = True  # type: ignore[attr-defined]
        raise named from error


_NOT_STATIC = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
    jax.errors.TracerBoolConversionError,
    jax.errors.NonConcreteBooleanIndexError,
)


def _error_type(error: Exception) -> type[OnnxError]:
    if isinstance(error, OnnxError):
        return type(error)
    if isinstance(error, _NOT_STATIC):
        return NotStaticError
    return UnsupportedError if isinstance(error, NotImplementedError) else OnnxError


def _text(error: Exception) -> str:
    if isinstance(error, _NOT_STATIC):
        return (
            "a value that must be known while tracing is traced. Pass the input that decides it as NumPy and name it "
            "in load(static=...), bound the node's size by load(size_bounds=...), or call outside of jax.jit"
        )
    return str(error) if isinstance(error, OnnxError) else f"{type(error).__name__}: {error}"


def _results(node: NodeDef, values: Mapping[str, Any], read: frozenset[str], frame: Frame) -> Sequence[Any]:
    inputs = [values[name] if name else None for name in node.inputs]
    while node.inputs[: len(inputs)] and not node.inputs[len(inputs) - 1]:
        inputs.pop()
    attributes = {name: _attribute(value, values, frame) for name, value in node.attributes.items()}
    attributes = {name: value for name, value in attributes.items() if value is not _ABSENT}
    wanted = tuple(name in read for name in node.outputs)
    if (function := frame.run.functions.get((node.domain, node.op_type, node.overload))) is not None:
        return _call(function, inputs, attributes, wanted, frame)
    opset = _opset(node, frame)
    if (operator := functions.operator_for(node.domain, node.op_type, opset)) is not None:
        bounds = (frame.run.size_bounds.get(name) for name in (node.label, *node.outputs))
        bound = next((b for b in bounds if b is not None), None)
        info = registry.Node(node.label, node.op_type, node.domain, opset, wanted, bound)
        _check_call(operator, inputs, attributes)
        if any(isinstance(v, Subgraph) for v in attributes.values()):
            return operator(info, inputs, attributes)
        return _applied(lambda given: operator(info, given, attributes), inputs)
    function = functions.body_of(node, opset, inputs)
    return _call(function, inputs, attributes, wanted, frame)


_ABSENT = object()


def _attribute(value: Any, values: Mapping[str, Any], frame: Frame) -> Any:
    if isinstance(value, Reference):
        return frame.attributes.get(value.name, _ABSENT)
    if isinstance(value, Graph):
        return Subgraph(value, {name: values[name] for name in value.captures}, frame)
    if isinstance(value, tuple) and any(isinstance(v, Graph) for v in value):
        return tuple(_attribute(v, values, frame) for v in value)
    return value


def _opset(node: NodeDef, frame: Frame) -> int:
    """The version of the node's domain; the newest one where the model forgot to declare the domain."""
    return frame.opsets.get(node.domain, functions.NEWEST)


def _call(
    function: FunctionDef, inputs: Sequence[Any], attributes: Mapping[str, Any], wanted: Sequence[bool], frame: Frame
) -> Sequence[Any]:
    graph = function.graph
    if frame.depth >= MAX_CALL_DEPTH:
        raise OnnxError(f"functions call each other more than {MAX_CALL_DEPTH} deep")
    if len(inputs) > len(graph.inputs) or len(wanted) > len(graph.outputs):
        raise OnnxError(
            f"the function has {len(graph.inputs)} inputs and {len(graph.outputs)} outputs, "
            f"its node {len(inputs)} and {len(wanted)}"
        )
    absent = [o.name for o, w in zip(graph.outputs, wanted, strict=False) if w and o.name in graph.captures]
    if absent:
        raise UnsupportedError(f"the function does not compute its outputs {absent}")
    known = {name: v for name, v in attributes.items() if name in function.attributes or name in function.defaults}
    given = {i.name: value for i, value in zip(graph.inputs, [*inputs, *[None] * len(graph.inputs)], strict=False)}
    body = Frame(frame.run, {**frame.opsets, **function.opsets}, {**function.defaults, **known}, frame.depth + 1)
    return evaluate(graph, given, body)


def _applied(operator: Callable[[Sequence[Any]], tuple[Any, ...]], inputs: Sequence[Any]) -> Sequence[Any]:
    limits.check_ahead(operator, inputs)
    if not is_static(list(inputs)):
        return operator(inputs)
    if any(is_symbolic(v) for v in inputs):  # NumPy computes with symbols; JAX can only while it traces
        return [r if isinstance(r, jax.Array) else _folded(r) for r in operator(inputs)]
    # 64 bits, because jnp would else narrow the int64 and double that NumPy holds.
    with jax.ensure_compile_time_eval(), jax.enable_x64(True):
        results = operator(inputs)
    return [_folded(result) for result in results]


def _folded(value: Any) -> Any:
    """A computed constant as NumPy, or as JAX's broadcast where it is large and uniform."""
    if isinstance(value, list | tuple):
        return [_folded(v) for v in value]
    if value is None:
        return None
    array = np.asarray(value)
    if array.size > _LARGE and array.dtype != np.object_:
        first = array.reshape(-1)[0]
        if (array == first).all():
            return jnp.broadcast_to(jnp.asarray(first), array.shape)
    return array


@ft.cache
def _signature(function: Callable[..., Any]) -> tuple[inspect.Signature, bool]:
    signature = inspect.signature(function)
    return signature, any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())


def _check_call(operator: registry.Operator, inputs: Sequence[Any], attributes: Mapping[str, Any]) -> None:
    """Raises where the function does not take these inputs or attributes, before its TypeError would be a riddle."""
    signature, takes_any = _signature(operator.function)
    unknown = [] if takes_any else sorted(set(attributes) - set(signature.parameters))
    if unknown:
        raise UnsupportedError(f"attributes {unknown} are not known to {operator.name} since {operator.since}")
    more = {"node": None} if operator.takes_node else {}
    try:
        signature.bind(*inputs, **attributes, **more)
    except TypeError as error:
        raise OnnxError(f"{len(inputs)} inputs and attributes {sorted(attributes)} do not fit: {error}") from None


def unsupported(graph: Graph, frame: Frame) -> collections.Counter[str]:
    """The node types of a graph that nothing computes, counted, subgraphs and the model's functions included."""
    found: collections.Counter[str] = collections.Counter()
    for node in graph.nodes:
        opset = _opset(node, frame)
        key = (node.domain, node.op_type, node.overload)
        if key not in frame.run.functions and not functions.is_known(node.domain, node.op_type, opset):
            found[f"{node.domain + '.' if node.domain else ''}{node.op_type}"] += 1
        for inner in node.graphs:
            found += unsupported(inner, frame)
    return found
