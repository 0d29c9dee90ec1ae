"""What passes share."""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Callable, Collection, Mapping
from typing import Any

from zenith_jax.frontends.onnx.graph import Graph, NodeDef, with_nodes
from zenith_jax.frontends.onnx.parsed import Parsed


def everywhere(parsed: Parsed, rewrite: Callable[[Parsed, Graph], Graph]) -> Parsed:
    """`parsed` with its graph, and before it the graphs within, rewritten."""
    graph = _everywhere(parsed, parsed.graph, rewrite)
    return parsed if graph is parsed.graph else dataclasses.replace(parsed, graph=graph)


def _everywhere(parsed: Parsed, graph: Graph, rewrite: Callable[[Parsed, Graph], Graph]) -> Graph:
    def inner(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(inner(v) for v in value)
        return _everywhere(parsed, value, rewrite) if isinstance(value, Graph) else value

    def with_inner(node: NodeDef) -> NodeDef:
        graphs = {k: v for k, v in node.attributes.items() if _holds_graph(v)}
        rewritten = {k: inner(v) for k, v in graphs.items()}
        if all(_same(rewritten[k], v) for k, v in graphs.items()):
            return node
        return dataclasses.replace(node, attributes={**node.attributes, **rewritten}, proto=b"")

    nodes = [with_inner(node) for node in graph.nodes]
    if any(new is not old for new, old in zip(nodes, graph.nodes, strict=True)):
        graph = with_nodes(graph, nodes)
    return rewrite(parsed, graph)


def _holds_graph(value: Any) -> bool:
    return isinstance(value, Graph) or (isinstance(value, tuple) and any(isinstance(v, Graph) for v in value))


def _same(new: Any, old: Any) -> bool:
    if isinstance(old, tuple):
        return all(n is o for n, o in zip(new, old, strict=True))
    return new is old


def captured(graph: Graph) -> frozenset[str]:
    """The names that graphs within nodes read: to give them another name would mean to rewrite those as well."""
    return frozenset(itertools.chain.from_iterable(g.captures for node in graph.nodes for g in node.graphs))


def times_read(graph: Graph) -> collections.Counter[str]:
    """How often each name is read, by nodes, by graphs within them and as a result."""
    return collections.Counter(
        itertools.chain((o.name for o in graph.outputs), itertools.chain.from_iterable(n.reads for n in graph.nodes))
    )


def renamed(node: NodeDef, names: Mapping[str, str]) -> NodeDef:
    """The node reading other names."""
    if not any(i in names for i in node.inputs):
        return node
    return dataclasses.replace(node, inputs=tuple(names.get(i, i) for i in node.inputs), proto=b"")


def fresh(name: str, taken: Collection[str]) -> str:
    """`name`, or with a number at its end where it is taken."""
    candidates = itertools.chain([name], (f"{name}_{i}" for i in itertools.count(1)))
    return next(c for c in candidates if c not in taken)
