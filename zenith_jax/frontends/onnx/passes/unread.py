"""Nodes and weights that nothing reads are left out: what other passes have left over, and what the file carries along.

The parameters are then the weights that the results depend on.
"""

from __future__ import annotations

import dataclasses

from zenith_jax.frontends.onnx.graph import Graph, with_nodes
from zenith_jax.frontends.onnx.parsed import Parsed, all_graphs
from zenith_jax.frontends.onnx.passes._nodes import everywhere


def without_unread(parsed: Parsed) -> Parsed:
    parsed = everywhere(parsed, lambda _, graph: _without_unread_nodes(graph))
    graph = dataclasses.replace(parsed.graph, initializers=_read_initializers(parsed.graph))
    keys = {key for g in all_graphs(graph) for key in g.initializers.values()} | parsed.overridable
    weights = {key: array for key, array in parsed.weights.items() if key in keys}
    return dataclasses.replace(parsed, graph=graph, weights=weights, trainable=parsed.trainable & keys)


def _without_unread_nodes(graph: Graph) -> Graph:
    read = {o.name for o in graph.outputs}
    nodes = []
    for node in reversed(graph.nodes):
        if any(o in read for o in node.outputs):
            nodes.append(node)
            read.update(node.reads)
    return graph if len(nodes) == len(graph.nodes) else with_nodes(graph, reversed(nodes))


def _read_initializers(graph: Graph) -> dict[str, str]:
    return {name: key for name, key in graph.initializers.items() if name in graph.read}
