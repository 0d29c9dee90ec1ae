"""Scale and bias of an InstanceNormalization that change nothing are left out.

    InstanceNormalization(x, [1, 1, ..], [0, 0, ..])  ->  InstanceNormalization(x)

PyTorch exports a group norm so, with a Reshape around it and its own scale and bias behind. Without the ones and zeros,
which are no parameters of the module but would be of the model, it is a group norm to the rewriter again.
"""

from __future__ import annotations

import dataclasses

from zenith_jax.frontends.onnx.graph import Graph, NodeDef, with_nodes
from zenith_jax.frontends.onnx.parsed import Parsed
from zenith_jax.frontends.onnx.passes._nodes import everywhere


def without_unit_parameters(parsed: Parsed) -> Parsed:
    return everywhere(parsed, _without_unit_parameters)


def _without_unit_parameters(parsed: Parsed, graph: Graph) -> Graph:
    nodes = [
        dataclasses.replace(node, inputs=node.inputs[:1], proto=b"")
        if _has_unit_parameters(parsed, graph, node)
        else node
        for node in graph.nodes
    ]
    if all(new is old for new, old in zip(nodes, graph.nodes, strict=True)):
        return graph
    return with_nodes(graph, nodes)


def _has_unit_parameters(parsed: Parsed, graph: Graph, node: NodeDef) -> bool:
    if node.domain or node.op_type != "InstanceNormalization" or len(node.inputs) != 3:
        return False
    keys = [graph.initializers.get(name) for name in node.inputs[1:]]
    return all(
        key is not None and key not in parsed.overridable and bool((parsed.weights[key] == unit).all())
        for key, unit in zip(keys, (1, 0), strict=True)
    )
