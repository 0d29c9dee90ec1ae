"""A Transpose of a Transpose is one Transpose, or none.

    Transpose(Transpose(x; p); q)  ->  Transpose(x; p[q])

Transposes with operators between them stay, though tf2onnx leaves a hundred of them in a MobileNet: XLA chooses layouts
itself, and moves data no less without them. Four inverted bottlenecks of MobileNetV3, channels first as against a
Transpose around each convolution and the activation channels last, in ms: 24 channels of 56 x 56, 3.9 and 3.7; 40 of
28 x 28, 2.0 and 1.9; 80 of 14 x 14, 1.3 and 1.2; 160 of 7 x 7, 2.8 and 2.4 (two cores with AVX2, jax 0.10.2, 2026-11).
"""

from __future__ import annotations

import dataclasses

from zenith_jax.frontends.onnx.graph import Graph, with_nodes
from zenith_jax.frontends.onnx.parsed import Parsed
from zenith_jax.frontends.onnx.passes._nodes import everywhere


def composed(parsed: Parsed) -> Parsed:
    """The inner one may stay, for other readers; the pass `identities` takes one that permutes nothing."""
    return everywhere(parsed, lambda _, graph: _composed(graph))


def _composed(graph: Graph) -> Graph:
    nodes = []
    transposed: dict[str, tuple[str, tuple[int, ...]]] = {}  # name -> what it is a transpose of, and how
    for node in graph.nodes:
        if node.domain == "" and node.op_type == "Identity" and node.inputs[0] in transposed:
            transposed[node.outputs[0]] = transposed[node.inputs[0]]
        elif node.domain == "" and node.op_type == "Transpose" and "perm" in node.attributes:
            source, perm = node.inputs[0], tuple(node.attributes["perm"])
            if source in transposed and len(transposed[source][1]) == len(perm):
                source, inner = transposed[source]
                perm = tuple(inner[axis] for axis in perm)
                attributes = {**node.attributes, "perm": perm}
                node = dataclasses.replace(node, inputs=(source,), attributes=attributes, proto=b"")
            transposed[node.outputs[0]] = source, perm
        nodes.append(node)
    if all(new is old for new, old in zip(nodes, graph.nodes, strict=True)):
        return graph
    return with_nodes(graph, nodes)
