"""Nodes that give their input as it came are left out.

    Identity(x)                                        -> x
    Dropout(x) without training                        -> x, if nobody reads the mask
    Transpose(x; perm=0,1,2..)                         -> x
    Sum(x), Max(x), Min(x), Mean(x), Concat(x)         -> x, of one operand
    x * 1, x / 1                                       -> x, if the 1 is a scalar constant

Nothing of this costs time once it is compiled. But a pass that looks for Conv -> BatchNormalization, or for the weight
of a Conv, shall not have to look through it: Paddle's exporter writes an Identity before each weight.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from zenith_jax.frontends.onnx.graph import Graph, NodeDef, with_nodes
from zenith_jax.frontends.onnx.parsed import Parsed
from zenith_jax.frontends.onnx.passes._nodes import captured, everywhere, renamed

_OF_ONE = ("Sum", "Max", "Min", "Mean", "Concat")


def without_identities(parsed: Parsed) -> Parsed:
    return everywhere(parsed, _without_identities)


def _without_identities(parsed: Parsed, graph: Graph) -> Graph:
    given: dict[str, str] = {}  # the name that stands for another one from here on
    returned: dict[str, str] = {}  # the same for names whose value is a result, which must keep the result's name
    keep = {o.name for o in graph.outputs} | captured(graph)
    results = {o.name for o in graph.outputs} - captured(graph)
    computed: set[str] = set()
    nodes: list[NodeDef] = []
    for old in graph.nodes:
        node = renamed(old, given)
        source = _same_as(node, parsed, graph)
        result = node.outputs[0] if node.outputs else ""
        if source is not None and result not in keep:
            given[result] = source
        elif source in computed - keep - set(returned) and result in results:
            returned[source] = result
        else:
            nodes.append(node)
            computed.update(node.outputs)
    if len(nodes) == len(graph.nodes):
        return graph
    return with_nodes(graph, [_with_results(renamed(node, returned), returned) for node in nodes])


def _with_results(node: NodeDef, names: Mapping[str, str]) -> NodeDef:
    if not any(o in names for o in node.outputs):
        return node
    return dataclasses.replace(node, outputs=tuple(names.get(o, o) for o in node.outputs), proto=b"")


def _same_as(node: NodeDef, parsed: Parsed, graph: Graph) -> str | None:
    """The name of the operand that the node's first output equals, or None. Other outputs must be unread."""
    if node.domain or any(o in graph.read for o in node.outputs[1:]):
        return None
    x, y, training, *_ = (*node.inputs, "", "", "")

    def is_scalar(name: str, value: float) -> bool:  # which broadcasts nothing
        constant = parsed.constant(graph, name)
        return constant is not None and constant.ndim == 0 and bool(constant == value)

    match node.op_type:
        case "Identity":
            return x
        case "Dropout" if not training or is_scalar(training, False):
            return x
        case "Transpose" if "perm" in node.attributes:
            perm = node.attributes["perm"]
            return x if tuple(perm) == tuple(range(len(perm))) else None
        case "Mul" if is_scalar(x, 1):
            return y
        case "Mul" | "Div" if is_scalar(y, 1):
            return x
        case op if op in _OF_ONE and len(node.inputs) == 1:
            return x
    return None
