"""A model as it was read from its file, before it becomes an `OnnxModel`: what passes turn into another one."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping

import numpy as np

from zenith_jax.frontends.onnx.graph import FunctionDef, Graph, NodeDef


@dataclasses.dataclass(frozen=True, eq=False)
class Parsed:
    """weights: the array for each key that an initializer has. trainable: the keys that become parameters. overridable:
    keys that a caller may replace, because the file lists the initializer as an input as well."""

    graph: Graph
    opsets: Mapping[str, int]
    functions: Mapping[tuple[str, str, str], FunctionDef]
    weights: Mapping[str, np.ndarray]
    trainable: frozenset[str] = frozenset()
    overridable: frozenset[str] = frozenset()

    def constant(self, graph: Graph, name: str) -> np.ndarray | None:
        """The value of an initializer of `graph` that neither training nor a caller changes, or None."""
        key = graph.initializers.get(name)
        if key is None or key in self.trainable or key in self.overridable:
            return None
        return self.weights[key]

    def __str__(self) -> str:
        return text(self.graph)


def all_graphs(graph: Graph) -> Iterator[Graph]:
    """The graph and the graphs within it."""
    yield graph
    for node in graph.nodes:
        for inner in node.graphs:
            yield from all_graphs(inner)


def all_nodes(graph: Graph) -> Iterator[NodeDef]:
    """The nodes of the graph and of the graphs within it."""
    return itertools.chain.from_iterable(g.nodes for g in all_graphs(graph))


def text(graph: Graph, indent: str = "") -> str:
    """One line for each node: results = operator(operands; attributes). Graphs within nodes are indented."""
    lines = [f"{indent}({', '.join(str(i) for i in graph.inputs)})"]
    for node in graph.nodes:
        domain = f"{node.domain}." if node.domain else ""
        attributes = [f"{k}={_short(v)}" for k, v in node.attributes.items() if not _is_graph(v)]
        operands = "; ".join(filter(None, (", ".join(i or "-" for i in node.inputs), ", ".join(attributes))))
        lines.append(f"{indent}  {', '.join(o or '-' for o in node.outputs)} = {domain}{node.op_type}({operands})")
        lines += [text(inner, indent + "      ") for inner in node.graphs]
    lines.append(f"{indent}-> {', '.join(o.name for o in graph.outputs)}")
    return "\n".join(lines)


def _is_graph(value: object) -> bool:
    return isinstance(value, Graph) or (isinstance(value, tuple) and any(isinstance(v, Graph) for v in value))


def _short(value: object) -> str:
    if isinstance(value, np.ndarray) and value.size > 1:
        return f"{value.dtype}{list(value.shape)}"
    return str(value)
