"""An ONNX graph as plain data: what is left of the file once it has been read and checked.

No protobuf object outlives `parse`: one submessage would keep the whole file in memory.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from zenith_jax.errors import ZenithError
from zenith_jax.frontends.onnx import dtypes, tensors
from zenith_jax.frontends.onnx.errors import OnnxError, UnsupportedError

# Graphs within graphs. Protobuf's C++ and Python parsers stop at 100 messages within each other, 3 for each graph.
MAX_GRAPH_DEPTH = 32
_MAX_TYPE_DEPTH = 16  # sequences of optionals of sequences
_MAX_KEPT_PROTO = 1 << 16  # bytes; beyond it the node carries tensors or graphs


@dataclasses.dataclass(frozen=True)
class TypeInfo:
    """The type of an input or output as the file declares it.

    kind: "tensor", "sequence", "optional", "map", "sparse_tensor" or "" for none. dtype: of a tensor's elements, None
    where it is not declared. shape: per dimension its size, its symbol, or None; None as a whole where the rank is
    unknown. element: what a sequence or an optional holds.
    """

    kind: str = ""
    dtype: np.dtype | None = None
    shape: tuple[int | str | None, ...] | None = None
    element: TypeInfo | None = None

    def __str__(self) -> str:
        if self.kind != "tensor":
            return f"{self.kind or 'untyped'}({self.element or ''})"
        name = "string" if self.dtype == np.object_ else str(self.dtype)
        return (
            f"{name}[{', '.join('?' if d is None else str(d) for d in self.shape)}]" if self.shape is not None else name
        )


@dataclasses.dataclass(frozen=True)
class ValueInfo:
    name: str
    type: TypeInfo = TypeInfo()

    @property
    def dtype(self) -> np.dtype | None:
        return self.type.dtype

    @property
    def shape(self) -> tuple[int | str | None, ...] | None:
        return self.type.shape

    def __str__(self) -> str:
        return f"{self.name}: {self.type}"


@dataclasses.dataclass(frozen=True)
class Reference:
    """An attribute of a function's node that takes the value of the function's attribute `name`."""

    name: str


@dataclasses.dataclass(frozen=True, eq=False)
class NodeDef:
    """label: the node's name, else that of its first output. proto: the serialised NodeProto, or b"" if large."""

    label: str
    op_type: str
    domain: str
    overload: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, Any]
    proto: bytes

    @property
    def graphs(self) -> Iterator[Graph]:
        for value in self.attributes.values():
            yield from (g for g in (value if isinstance(value, tuple) else (value,)) if isinstance(g, Graph))

    @property
    def reads(self) -> Iterator[str]:
        """Every name of the surrounding graph that the node reads, also from within its subgraphs."""
        yield from (name for name in self.inputs if name)
        for graph in self.graphs:
            yield from graph.captures

    def __str__(self) -> str:
        return f"{self.domain + '.' if self.domain else ''}{self.op_type} {self.label!r}"


@dataclasses.dataclass(frozen=True, eq=False)
class Graph:
    """Nodes in an order in which every value is computed before it is used.

    initializers: for each name the key of its array in the model's weights. captures: names that the graph takes from
    the one around it. read: names that some node or the graph's result reads. frees: for each node the names that
    nobody needs after it.
    """

    name: str
    inputs: tuple[ValueInfo, ...]
    outputs: tuple[ValueInfo, ...]
    initializers: Mapping[str, str]
    nodes: tuple[NodeDef, ...]
    captures: frozenset[str]
    read: frozenset[str]
    frees: tuple[tuple[str, ...], ...]


@dataclasses.dataclass(frozen=True, eq=False)
class FunctionDef:
    """A function: its graph, the versions of the domains its nodes are in, its attributes with their defaults."""

    graph: Graph
    opsets: dict[str, int]
    attributes: frozenset[str]
    defaults: dict[str, Any]


class Parser:
    """Reads protos into the classes above and gathers their arrays in `weights`.

    weights: every initializer, and every Constant outside of functions, under a key that is its name where no other
    graph of the model uses it too; from_constants: the keys of the latter. folder, raw: see `tensors.to_numpy`; raw
    holds the bytes of the main graph's initializers by position.
    """

    def __init__(self, folder: pathlib.Path | None = None, raw: Mapping[int, np.ndarray] | None = None):
        self.folder = folder
        self.raw = raw or {}
        self.weights: dict[str, np.ndarray] = {}
        self.from_constants: set[str] = set()
        self._in_function = False

    def main_graph(self, proto: Any) -> Graph:
        return self._graph(proto, path="", depth=0, raw=self.raw)

    def function(self, proto: Any) -> FunctionDef:
        path = f"{text(proto.domain)}.{text(proto.name)}{':' + text(proto.overload) if proto.overload else ''}/"
        self._in_function = True
        nodes = self._nodes(proto.node, path, depth=0)
        self._in_function = False
        inputs, outputs = (tuple(ValueInfo(text(name)) for name in names) for names in (proto.input, proto.output))
        graph = assembled(text(proto.name), inputs, outputs, {}, nodes, where=f"function {path[:-1]}")
        # A schema's body for a node without its optional outputs does not compute them.
        missing = graph.captures & frozenset(itertools.chain(*(n.reads for n in graph.nodes)))
        if missing:
            raise OnnxError(f"function {path[:-1]} reads {sorted(missing)}, which nothing in it computes")
        defaults = {text(a.name): self._attribute(a, path, 0) for a in proto.attribute_proto}
        opsets = {canonical(o.domain): o.version for o in proto.opset_import}
        return FunctionDef(graph, opsets, frozenset(text(a) for a in proto.attribute), defaults)

    def _graph(self, proto: Any, path: str, depth: int, raw: Mapping[int, np.ndarray] | None = None) -> Graph:
        if depth > MAX_GRAPH_DEPTH:
            raise OnnxError(f"graph {path!r} lies more than {MAX_GRAPH_DEPTH} graphs deep")
        initializers: dict[str, str] = {}
        for position, tensor in enumerate(proto.initializer):
            array = tensors.to_numpy(tensor, self.folder, raw=(raw or {}).get(position))
            self._add_weight(initializers, text(tensor.name), array, path)
        for sparse in proto.sparse_initializer:
            self._add_weight(initializers, text(sparse.values.name), self._sparse(sparse), path)
        nodes = self._nodes(proto.node, path, depth, None if self._in_function else initializers)
        name = text(proto.name)
        inputs = tuple(i for i in map(_value_info, proto.input) if i.name not in initializers)
        outputs = tuple(map(_value_info, proto.output))
        where = f"graph {path or name or 'main'!r}"
        graph = assembled(name, inputs, outputs, initializers, nodes, where)
        if depth == 0 and graph.captures:
            raise OnnxError(_missing(graph))
        return graph

    def _add_weight(self, initializers: dict[str, str], name: str, array: np.ndarray, path: str) -> None:
        if not name:
            raise OnnxError(f"an initializer of graph {path or 'main'!r} has no name")
        if name in initializers:
            raise OnnxError(f"the name {name!r} is given to two initializers or constants")
        key = name if name not in self.weights else f"{path}{name}"
        if key in self.weights:
            raise OnnxError(f"the name {key!r} is given to two initializers or constants")
        initializers[name] = key
        self.weights[key] = array

    def _nodes(
        self, protos: Iterable[Any], path: str, depth: int, initializers: dict[str, str] | None = None
    ) -> list[NodeDef]:
        """The nodes, except constants, which become initializers where the graph can have some."""
        nodes = []
        for index, proto in enumerate(protos):
            label = text(proto.name or next((o for o in proto.output if o), f"{text(proto.op_type)}_{index}"))
            try:
                node = self._node(proto, label, path, depth)
                constant = _constant(node) if initializers is not None else None
                if constant is not None and initializers is not None:
                    self._add_weight(initializers, node.outputs[0], constant, path)
                    self.from_constants.add(initializers[node.outputs[0]])
                else:
                    nodes.append(node)
            except OnnxError as error:
                if "node " in str(error):
                    raise
                raise type(error)(f"node {label!r} ({text(proto.op_type)}): {error}") from error
        return nodes

    def _node(self, proto: Any, label: str, path: str, depth: int) -> NodeDef:
        attributes: dict[str, Any] = {}
        for a in proto.attribute:
            name = text(a.name)
            if name in attributes:
                raise OnnxError(f"attribute {name!r} is given twice")
            attributes[name] = self._attribute(a, f"{path}{label}/", depth)
        return NodeDef(
            label,
            text(proto.op_type),
            canonical(proto.domain),
            text(getattr(proto, "overload", "")),
            tuple(map(text, proto.input)),
            tuple(map(text, proto.output)),
            attributes,
            _serialised(proto),
        )

    def _attribute(self, proto: Any, path: str, depth: int) -> Any:
        if proto.ref_attr_name:
            return Reference(text(proto.ref_attr_name))
        match proto.type:
            case 1:
                return proto.f
            case 2:
                return proto.i
            case 3:
                return proto.s.decode("utf-8", errors="surrogateescape")
            case 4:
                return tensors.to_numpy(proto.t, self.folder)
            case 5:
                return self._graph(proto.g, f"{path}{text(proto.name)}/", depth + 1)
            case 6:
                return tuple(proto.floats)
            case 7:
                return tuple(proto.ints)
            case 8:
                return tuple(s.decode("utf-8", errors="surrogateescape") for s in proto.strings)
            case 9:
                return tuple(tensors.to_numpy(t, self.folder) for t in proto.tensors)
            case 10:
                return tuple(
                    self._graph(g, f"{path}{text(proto.name)}{i}/", depth + 1) for i, g in enumerate(proto.graphs)
                )
            case 11:
                return self._sparse(proto.sparse_tensor)
            case 13:
                return type_info(proto.tp)
        raise UnsupportedError(f"attribute {text(proto.name)!r} has type {proto.type}")

    def _sparse(self, proto: Any) -> np.ndarray:
        """A SparseTensorProto as a dense array."""
        values, indices = (tensors.to_numpy(t, self.folder) for t in (proto.values, proto.indices))
        shape = tuple(proto.dims)
        name = text(proto.values.name)
        size = int(np.prod(shape, dtype=np.float64))
        if any(d < 0 for d in shape) or size > 2**31:
            raise OnnxError(f"sparse tensor {name!r} has dimensions {shape}; made dense they would not fit")
        flat = indices if indices.ndim == 1 else indices @ np.cumprod((1, *shape[:0:-1]))[::-1]
        if values.ndim != 1 or flat.shape != values.shape or (flat.size and not 0 <= flat.min() <= flat.max() < size):
            raise OnnxError(
                f"sparse tensor {name!r}: indices {indices.shape} do not fit {values.shape} values in {shape}"
            )
        dense = np.zeros(size, values.dtype)
        dense[flat] = values
        return dense.reshape(shape)


def assembled(
    name: str,
    inputs: tuple[ValueInfo, ...],
    outputs: tuple[ValueInfo, ...],
    initializers: Mapping[str, str],
    nodes: Iterable[NodeDef],
    where: str,
) -> Graph:
    """A Graph of nodes in any order. where: what errors call it."""
    given = {i.name for i in inputs} | set(initializers)
    if len({i.name for i in inputs}) != len(inputs):
        raise OnnxError(f"{where} has two inputs of the same name: {[i.name for i in inputs]}")
    ordered, captures = _sorted(list(nodes), given, where)
    produced = given.union(*(n.outputs for n in ordered))
    captures |= {o.name for o in outputs} - produced
    read = frozenset(itertools.chain((o.name for o in outputs), *(n.reads for n in ordered)))
    return Graph(
        name, inputs, outputs, initializers, tuple(ordered), frozenset(captures), read, _frees(ordered, outputs)
    )


def with_nodes(graph: Graph, nodes: Iterable[NodeDef]) -> Graph:
    """The graph with other nodes for the same inputs and outputs."""
    where = f"graph {graph.name!r}"
    return assembled(graph.name, graph.inputs, graph.outputs, graph.initializers, nodes, where)


def text(name: str | bytes) -> str:
    """A name of a proto. Protobuf gives bytes where it is no UTF-8, which a damaged file may hold."""
    return name if isinstance(name, str) else name.decode("utf-8", errors="backslashreplace")


def canonical(domain: str | bytes) -> str:
    return "" if domain == "ai.onnx" else text(domain)


def _serialised(proto: Any) -> bytes:
    """The node, unless it is large or nested so deep that protobuf would not read it again."""
    from google.protobuf.message import EncodeError

    try:
        return proto.SerializeToString() if proto.ByteSize() <= _MAX_KEPT_PROTO else b""
    except EncodeError:
        return b""


def _value_info(proto: Any) -> ValueInfo:
    name = text(proto.name)
    try:
        return ValueInfo(name, type_info(proto.type))
    except ZenithError as error:
        raise OnnxError(f"the type of the tensor {name!r}: {error}") from None


def type_info(proto: Any, depth: int = 0) -> TypeInfo:
    """A TypeProto as data."""
    if depth > _MAX_TYPE_DEPTH:
        raise OnnxError(f"it is nested more than {_MAX_TYPE_DEPTH} deep")
    kind = proto.WhichOneof("value")
    if kind in ("tensor_type", "sparse_tensor_type"):
        tensor = getattr(proto, kind)
        shape = None
        if tensor.HasField("shape"):
            shape = tuple(_dimension(d) for d in tensor.shape.dim)
        dtype = dtypes.from_onnx(tensor.elem_type) if tensor.elem_type else None
        return TypeInfo(kind.removesuffix("_type"), dtype, shape)
    if kind in ("sequence_type", "optional_type"):
        return TypeInfo(kind.removesuffix("_type"), element=type_info(getattr(proto, kind).elem_type, depth + 1))
    return TypeInfo((kind or "").removesuffix("_type"))


def _dimension(proto: Any) -> int | str | None:
    """Paddle's exporter writes -1 for a dimension that it does not know."""
    if proto.HasField("dim_value"):
        return proto.dim_value if proto.dim_value >= 0 else None
    return text(proto.dim_param) or None


def _constant(node: NodeDef) -> np.ndarray | None:
    """The value of a Constant, or None: another node, or one whose value a function's caller decides."""
    if node.op_type != "Constant" or node.domain:
        return None
    if len(node.attributes) != 1 or len(node.outputs) != 1:
        raise OnnxError("a Constant has exactly one attribute and one output")
    ((kind, value),) = node.attributes.items()
    if isinstance(value, Reference):
        return None
    dtype = {"value_float": np.float32, "value_int": np.int64, "value_string": np.object_}.get(kind.removesuffix("s"))
    return np.asarray(value, dtype) if dtype is not None else np.asarray(value)


def _sorted(nodes: list[NodeDef], given: set[str], where: str) -> tuple[list[NodeDef], set[str]]:
    """The nodes in an order of computation that keeps the file's where it can, and the names from outside."""
    producer: dict[str, int] = {}
    for index, node in enumerate(nodes):
        for name in node.outputs:
            if not name:
                continue
            if name in producer or name in given:
                raise OnnxError(f"node {node}: {name!r} is already the name of another value in {where}")
            producer[name] = index
    waiting_for = [{producer[n] for n in node.reads if n in producer} for node in nodes]
    needed_by: list[list[int]] = [[] for _ in nodes]
    for index, others in enumerate(waiting_for):
        for other in others:
            needed_by[other].append(index)
    ready = [i for i, others in enumerate(waiting_for) if not others]
    order = []
    while ready:
        index = heapq.heappop(ready)
        order.append(index)
        for user in needed_by[index]:
            waiting_for[user].discard(index)
            if not waiting_for[user]:
                heapq.heappush(ready, user)
    if len(order) < len(nodes):
        stuck = next(node for node, others in zip(nodes, waiting_for, strict=True) if others)
        raise OnnxError(f"node {stuck} of {where} depends on its own result: the graph has a cycle")
    outside = {n for node in nodes for n in node.reads} - given - set(producer)
    return [nodes[i] for i in order], outside


def _frees(nodes: list[NodeDef], outputs: tuple[ValueInfo, ...]) -> tuple[tuple[str, ...], ...]:
    """For each node the names that are read there for the last time."""
    seen = {o.name for o in outputs}
    frees = []
    for node in reversed(nodes):
        last = tuple({n for n in (*node.reads, *node.outputs) if n} - seen)
        seen.update(last)
        frees.append(last)
    return tuple(reversed(frees))


def _missing(graph: Graph) -> str:
    name = sorted(graph.captures)[0]
    for node in graph.nodes:
        if name in node.reads:
            return f"node {node} reads {name!r}, which is no input, no initializer and no node's output"
    return f"the output {name!r} is computed by no node"
