"""Nodes whose operands are constants are computed once, while loading.

Tracing computes what it can from constants anyway, again for each shape. This pass saves that time, and what tracing
leaves to the compiled function: arrays of integers too large to stay NumPy, such as masks and tables of positions.

Parameters are no constants: what is computed from one is computed in each call, and is differentiable by it.

Not folded: what would make the model larger than LIMIT_BYTES allows (weights of 8 bits stay so), operators whose result
has a size that their operands do not bound, random ones, control flow, and the functions of the model.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import numpy as np

from zenith_jax.frontends.onnx import functions, interpret, limits
from zenith_jax.frontends.onnx.errors import OnnxError
from zenith_jax.frontends.onnx.graph import NodeDef, ValueInfo, assembled, with_nodes
from zenith_jax.frontends.onnx.parsed import Parsed
from zenith_jax.frontends.onnx.passes._nodes import fresh

LIMIT_BYTES = 1 << 20  # of one folded node's results; more only if its operands are as large
_LIMIT_WORK = 1 << 24  # elements: the product of the operands' sizes, which bounds what a node computes
_NOT_BOUNDED = frozenset(
    "AffineGrid BlackmanWindow CenterCropPad Col2Im ConstantOfShape ConvTranspose Expand HammingWindow HannWindow "
    "MaxUnpool MelWeightMatrix OneHot Pad Range Resize Tile Upsample".split()
)
_RANDOM = frozenset(
    "Bernoulli Dropout Multinomial RandomNormal RandomNormalLike RandomUniform RandomUniformLike".split()
)


def folded(parsed: Parsed) -> Parsed:
    """Of the main graph. Results become weights that are not trainable, under their own names."""
    graph = parsed.graph
    found = ((name, parsed.constant(graph, name)) for name in graph.initializers)
    known: dict[str, np.ndarray] = {name: value for name, value in found if value is not None}
    results: dict[str, np.ndarray] = {}
    kept = []
    for node in graph.nodes:
        values = _values(parsed, node, known)
        if values is None:
            kept.append(node)
        else:
            known |= values
            results |= values
    if len(kept) == len(graph.nodes):
        return parsed
    initializers, weights = dict(graph.initializers), dict(parsed.weights)
    for name, value in results.items():
        initializers[name] = key = fresh(name, weights)
        weights[key] = value
    graph = with_nodes(dataclasses.replace(graph, initializers=initializers), kept)
    return dataclasses.replace(parsed, graph=graph, weights=weights)


def _values(parsed: Parsed, node: NodeDef, known: Mapping[str, np.ndarray]) -> dict[str, np.ndarray] | None:
    """The node's outputs by name, or None: it is not to be folded."""
    given = {name: known[name] for name in node.reads if name in known}
    opset = parsed.opsets.get(node.domain, functions.NEWEST)
    if (
        not given
        or any(name and name not in known for name in node.inputs)
        or any(True for _ in node.graphs)
        or node.op_type in _NOT_BOUNDED | _RANDOM
        or (node.domain, node.op_type, node.overload) in parsed.functions
        or functions.operator_for(node.domain, node.op_type, opset) is None
        or math.prod(max(v.size, 1) for v in given.values()) > _LIMIT_WORK
    ):
        return None
    outputs = tuple(ValueInfo(o) for o in node.outputs if o in parsed.graph.read)
    inputs = tuple(ValueInfo(name) for name in given)
    alone = assembled(node.label, inputs, outputs, {}, [node], where=f"node {node}")
    largest = max(LIMIT_BYTES, sum(v.nbytes for v in given.values()))
    try:
        with limits.limited(largest):  # before it is computed, where a value decides the size
            frame = interpret.Frame(interpret.Run(parsed.functions, {}), parsed.opsets)
            values = interpret.evaluate(alone, given, frame)
    except OnnxError:
        return None  # the same error comes, with more around it, if the node is reached
    if not all(isinstance(v, np.ndarray) for v in values):
        return None  # a sequence, or a large array of one value, which tracing makes a broadcast
    if sum(v.nbytes for v in values) > largest:
        return None
    return {info.name: value for info, value in zip(outputs, values, strict=True)}
