"""Which inputs and weights decide shapes, and therefore must be known while tracing.

A backward slice from the operands of STEERING. It ends at Shape and Size, which are known whatever their input holds,
and takes whole nodes else: too much is found rather than too little, and the caller keeps what is small.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

from zenith_jax.frontends.onnx.graph import FunctionDef, Graph, NodeDef

# Operands, by position, whose values decide the shape of a result. -1: all of them.
STEERING: dict[str, tuple[int, ...]] = {
    "AffineGrid": (1,),
    "BlackmanWindow": (0,),
    "CenterCropPad": (1,),
    "Col2Im": (1, 2),
    "ConstantOfShape": (0,),
    "ConvTransposeWithDynamicPads": (2,),
    "CumProd": (1,),
    "CumSum": (1,),
    "DFT": (1, 2),
    "Expand": (1,),
    "ExpandDims": (1,),
    "GroupQueryAttention": (6,),
    "HammingWindow": (0,),
    "HannWindow": (0,),
    "MaxUnpool": (2,),
    "MelWeightMatrix": (-1,),
    "NonMaxSuppression": (2,),
    "OneHot": (1,),
    "Pad": (1, 3),
    "Range": (-1,),
    "ReduceL1": (1,),
    "ReduceL2": (1,),
    "ReduceLogSum": (1,),
    "ReduceLogSumExp": (1,),
    "ReduceMax": (1,),
    "ReduceMean": (1,),
    "ReduceMin": (1,),
    "ReduceProd": (1,),
    "ReduceSum": (1,),
    "ReduceSumSquare": (1,),
    "Reshape": (1,),
    "Resize": (1, 2, 3),
    "STFT": (1, 3),
    "SequenceAt": (1,),
    "SequenceErase": (1,),
    "SequenceInsert": (2,),
    "Slice": (1, 2, 3, 4),
    "Split": (1,),
    "SplitToSequence": (1,),
    "Squeeze": (1,),
    "Tile": (1, 2),
    "TopK": (1,),
    "Unsqueeze": (1,),
    "Upsample": (1,),
}
_STOP = frozenset({"Shape", "Size"})
# An If whose condition a graph input decides through a comparison is a switch between variants; one whose condition is
# an input itself, or computed from data, is left to lax.cond.
_SWITCH = "If"


@dataclasses.dataclass(frozen=True)
class Steering:
    """direct: names that are such an operand themselves. reached: all names that one is computed from. switches: names
    that the condition of an If is computed from."""

    direct: frozenset[str]
    reached: frozenset[str]
    switches: frozenset[str]


Functions = Mapping[tuple[str, str, str], FunctionDef]


def steering(graph: Graph, functions: Functions, known: dict[FunctionDef, Steering] | None = None) -> Steering:
    """Of the graph's inputs, initializers and captures. The functions must not call themselves.

    known: what was found of functions, each of which is looked at once, however often it is called.
    """
    known = {} if known is None else known
    direct: set[str] = set()
    switches: set[str] = set()
    reached: set[str] = set()
    for node in graph.nodes:
        operands = _operands(node, functions, known)
        direct |= operands
        for inner in node.graphs:
            found = steering(inner, functions, known)
            outside = inner.captures
            direct |= found.direct & outside
            reached |= found.reached & outside
            switches |= found.switches & outside
            bound = _bound(node, inner)
            direct |= {bound[n] for n in found.direct if n in bound}
            reached |= {bound[n] for n in found.reached if n in bound}
        if node.op_type == _SWITCH and node.inputs:
            switches.add(node.inputs[0])
    leaves = {i.name for i in graph.inputs} | set(graph.initializers) | graph.captures
    computed = {o for node in graph.nodes for o in node.outputs}
    return Steering(
        frozenset(direct & leaves),
        frozenset(_slice(graph, direct | reached) & leaves),
        frozenset(_slice(graph, switches & computed) & leaves),
    )


def _operands(node: NodeDef, functions: Functions, known: dict[FunctionDef, Steering]) -> set[str]:
    function = functions.get((node.domain, node.op_type, node.overload))
    if function is not None:
        if function not in known:
            known[function] = steering(function.graph, functions, known)
        found = known[function].reached
        pairs = zip(function.graph.inputs, node.inputs, strict=False)
        return {actual for formal, actual in pairs if actual and formal.name in found}
    positions = STEERING.get(node.op_type, ())
    if positions == (-1,):
        return {n for n in node.inputs if n}
    return {node.inputs[p] for p in positions if p < len(node.inputs) and node.inputs[p]}


def _bound(node: NodeDef, inner: Graph) -> dict[str, str]:
    """The outer name for each input of a subgraph that gets one: Loop's carried values, Scan's states and inputs."""
    offset = {"Loop": 0, "Scan": 0, "SequenceMap": 0}.get(node.op_type)
    if offset is None:
        return {}
    pairs = zip(inner.inputs, node.inputs, strict=False)
    return {formal.name: actual for formal, actual in pairs if actual}


def _slice(graph: Graph, wanted: Iterable[str]) -> set[str]:
    """All names that `wanted` are computed from, themselves included."""
    found = set(wanted)
    for node in reversed(graph.nodes):
        if node.op_type not in _STOP and any(o in found for o in node.outputs):
            found.update(node.reads)
    return found
