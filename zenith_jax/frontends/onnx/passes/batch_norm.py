"""BatchNormalization in inference becomes part of the Conv, ConvTranspose or Gemm before it.

    (conv(x, w) + b - mean) / sqrt(variance + epsilon) * scale + bias   =   conv(x, w * f) + ((b - mean) * f + bias)
    with  f = scale / sqrt(variance + epsilon),  one for each output channel

The new weights are computed once, while loading, in float64. They have the names of the old ones and are parameters as
those were: `jax.grad` gives the derivatives by them. To fold as arithmetic on the file's parameters would multiply
every weight again in every call. Who wants to train the file's own scale and bias leaves the pass out,
`load(passes=...)`.

On a CPU this saves parameters and no time, since XLA makes one loop of the normalisation and the activation: three
bottleneck blocks of ResNet-50, batch 2, took 49.0 ms unfolded and 50.4 folded with 256/64 channels of 56 x 56, 39.8 and
39.4 with 1024/256 of 14 x 14 (two cores with AVX2, jax 0.10.2, 2026-11). What it is for is cuDNN, which computes a
convolution with a bias and an activation at once, but not with a factor between them.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping

import numpy as np

from zenith_jax.frontends.onnx.dtypes import is_floating
from zenith_jax.frontends.onnx.graph import NodeDef, with_nodes
from zenith_jax.frontends.onnx.parsed import Parsed
from zenith_jax.frontends.onnx.passes._nodes import times_read

_PRODUCTS = ("Conv", "ConvTranspose", "Gemm")


def into_products(parsed: Parsed) -> Parsed:
    """Of the main graph. Weights that something else reads too stay, and so does their normalisation."""
    times = times_read(parsed.graph)
    weights = dict(parsed.weights)
    nodes: list[NodeDef | None] = []
    position: dict[str, int] = {}  # of the node that computes it
    for node in parsed.graph.nodes:
        at = position.get(node.inputs[0]) if _is_inference(node, times) else None
        product = None if at is None else nodes[at]
        if product is not None and times[node.inputs[0]] == 1 and _are_own(parsed, product, node, times):
            values = {name: weights[parsed.graph.initializers[name]] for name in _operands(product, node)}
            if (folded := _folded(product, node, values)) is not None:
                nodes[position[node.inputs[0]]] = None
                node, arrays = folded
                weights.update((parsed.graph.initializers[name], array) for name, array in arrays.items())
        position.update((o, len(nodes)) for o in node.outputs)
        nodes.append(node)
    if None not in nodes:
        return parsed
    kept = [node for node in nodes if node is not None]
    return dataclasses.replace(parsed, graph=with_nodes(parsed.graph, kept), weights=weights)


def _is_inference(node: NodeDef, times: Mapping[str, int]) -> bool:
    """Before opset 14 a node trains if its other outputs are wanted."""
    by_channel = node.attributes.get("spatial", 1) and not node.attributes.get("training_mode", 0)
    is_norm = node.op_type == "BatchNormalization" and not node.domain and len(node.inputs) == 5
    return is_norm and bool(by_channel) and not any(times[o] for o in node.outputs[1:])


def _operands(product: NodeDef, norm: NodeDef) -> list[str]:
    return [name for name in (*product.inputs[1:3], *norm.inputs[1:]) if name]


def _are_own(parsed: Parsed, product: NodeDef, norm: NodeDef, times: collections.Counter[str]) -> bool:
    """Whether all weights of both are float initializers that nothing else reads and no caller replaces."""
    if product.op_type not in _PRODUCTS or product.domain:
        return False
    names = _operands(product, norm)
    keys = [parsed.graph.initializers.get(name) for name in names]
    are_floats = (k is not None and k not in parsed.overridable and is_floating(parsed.weights[k]) for k in keys)
    return all(times[name] == 1 for name in names) and all(are_floats)


def _folded(
    product: NodeDef, norm: NodeDef, values: Mapping[str, np.ndarray]
) -> tuple[NodeDef, dict[str, np.ndarray]] | None:
    """The product with the normalisation in it and its new weights by name, or None where shapes do not fit."""
    weight, b = (*product.inputs, "")[1:3]
    w = values[weight]
    scale, bias, mean, variance = (values[name].astype(np.float64) for name in norm.inputs[1:])
    with np.errstate(all="ignore"):  # a negative variance gives NaN, as it does unfolded
        factor = scale / np.sqrt(variance + norm.attributes.get("epsilon", 1e-5))
    by_weight = _by_weight(product, w, factor)
    before = values[b].astype(np.float64) * product.attributes.get("beta", 1.0) if b else np.zeros(1)
    is_vector = before.size in (1, factor.size) and before.shape[-1:] in ((), (before.size,))
    if by_weight is None or not is_vector or not scale.shape == bias.shape == mean.shape == variance.shape:
        return None
    with np.errstate(all="ignore"):
        shift = (before.reshape(-1) - mean) * factor + bias
        arrays = {weight: w * by_weight, b or norm.inputs[2]: shift}
    new = dataclasses.replace(
        product,
        inputs=(product.inputs[0], weight, b or norm.inputs[2]),
        outputs=norm.outputs[:1],
        attributes={k: v for k, v in product.attributes.items() if k != "beta"},
        proto=b"",
    )
    return new, {name: array.astype(w.dtype) for name, array in arrays.items()}


def _by_weight(product: NodeDef, w: np.ndarray, factor: np.ndarray) -> np.ndarray | None:
    """`factor`, one for each output channel, so that it broadcasts with w; or None."""
    if product.op_type == "Gemm":
        shape, at = ((-1, 1), 0) if product.attributes.get("transB", 0) else ((1, -1), 1)
        return factor.reshape(shape) if w.ndim == 2 and factor.shape == (w.shape[at],) else None
    if w.ndim < 3:
        return None
    kernel = (1,) * (w.ndim - 2)
    if product.op_type == "Conv":  # (m, c/g, *kernel)
        return factor.reshape(-1, 1, *kernel) if factor.shape == (w.shape[0],) else None
    group = product.attributes.get("group", 1)  # (c, m/g, *kernel): each group of rows has its own channels
    if group < 1 or factor.shape != (w.shape[1] * group,) or w.shape[0] % group:
        return None
    return np.repeat(factor.reshape(group, -1), w.shape[0] // group, axis=0).reshape(*w.shape[:2], *kernel)
