"""Products of dequantised integers, as models with Q and DQ nodes hold them, become products of integers.

    DequantizeLinear(a), DequantizeLinear(b) -> MatMul, Gemm or Conv   becomes   zenith.IntegerMatMul, ...Gemm, ...Conv

The result is float32 as before: what follows (a bias, an activation, QuantizeLinear) is elementwise and XLA fuses it.
The sum is exact in int32 and scaled once, where the float model rounds every term, so a later QuantizeLinear may round
to the neighbouring integer where a value lies between two.

The pass matches names only. Whether dtypes and scales permit it is known when the node is traced; where they do not
(weights of 4 or 16 bits, 8-bit floats, blocks, a scale along a summed axis) it computes what the file says.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from zenith_jax.frontends.onnx.graph import Graph, NodeDef, with_nodes
from zenith_jax.frontends.onnx.ops import conv, linear, quant
from zenith_jax.frontends.onnx.ops._windows import windows
from zenith_jax.frontends.onnx.parsed import Parsed
from zenith_jax.frontends.onnx.passes._nodes import everywhere
from zenith_jax.frontends.onnx.registry import operator
from zenith_jax.frontends.onnx.values import is_static

DOMAIN = "zenith"
_PRODUCTS = {"MatMul": "IntegerMatMul", "Gemm": "IntegerGemm", "Conv": "IntegerConv"}


def in_integers(parsed: Parsed) -> Parsed:
    """The model with products of integers, in subgraphs as well."""
    return everywhere(parsed, lambda _, graph: _with_integers(graph))


def _with_integers(graph: Graph) -> Graph:
    source = {n.outputs[0]: n for n in graph.nodes if _is_dequantize(n)}
    nodes = [_in_integers(node, source) for node in graph.nodes]
    if all(new is old for new, old in zip(nodes, graph.nodes, strict=True)):
        return graph
    return with_nodes(graph, nodes)


def _is_dequantize(node: NodeDef) -> bool:
    plain = not node.attributes.get("block_size") and node.attributes.get("output_dtype", 0) in (0, 1)
    return node.op_type == "DequantizeLinear" and node.domain == "" and plain and len(node.outputs) == 1


def _in_integers(node: NodeDef, source: dict[str, NodeDef]) -> NodeDef:
    """a, b, more.. -> a, a's scale, a's zero point, b, b's scale, b's zero point, more.."""
    factors = [source[name] for name in node.inputs[:2] if name in source]
    if node.domain or node.op_type not in _PRODUCTS or len(factors) < 2:
        return node
    axes = {f"{letter}_axis": f.attributes.get("axis", 1) for letter, f in zip("ab", factors, strict=True)}
    operands = [name for f in factors for name in (*f.inputs, "")[:3]]
    return dataclasses.replace(
        node,
        op_type=_PRODUCTS[node.op_type],
        domain=DOMAIN,
        inputs=(*operands, *node.inputs[2:]),
        attributes={**node.attributes, **axes},
        proto=b"",
    )


def _scale_of_columns(b: Any, scale: Any, axis: int, columns: int) -> bool:
    """Whether the scale is one number, or one for each entry of the axis `columns`, which is not summed over."""
    return scale.size == 1 or (scale.ndim == 1 and axis % b.ndim == columns % b.ndim and b.ndim > 1)


def _applies(a: Any, a_scale: Any, b: Any, b_scale: Any, b_axis: int, columns: int) -> bool:
    bytes_ = all(v.dtype in (np.int8, np.uint8) for v in (a, b))
    floats = all(s.dtype == np.float32 for s in (a_scale, b_scale))
    traced = not is_static([a, b])  # constants are folded as the file says
    return bytes_ and floats and traced and a_scale.size == 1 and _scale_of_columns(b, b_scale, b_axis, columns)


def _dequantized(x: Any, scale: Any, zero_point: Any, axis: int) -> Any:
    return quant.dequantize_linear(x, scale, zero_point, axis=axis)


def _scalar(x: Any) -> Any:
    return None if x is None else x.reshape(())


@operator("IntegerMatMul", domain=DOMAIN)
def integer_matmul(a, a_scale, a_zero, b, b_scale, b_zero, *, a_axis=1, b_axis=1):
    if not _applies(a, a_scale, b, b_scale, b_axis, -1) or (b.ndim != 2 and b_scale.size > 1):
        return linear.matmul(_dequantized(a, a_scale, a_zero, a_axis), _dequantized(b, b_scale, b_zero, b_axis))
    return _product(a, a_scale, a_zero, b, b_scale, b_zero)


def _product(a: Any, a_scale: Any, a_zero: Any, b: Any, b_scale: Any, b_zero: Any) -> Any:
    b_scale, b_zero = (_scalar(v) if v is not None and v.size == 1 else v for v in (b_scale, b_zero))
    sums = linear.integer_matmul(a, b, _scalar(a_zero), b_zero)
    return sums.astype(jnp.float32) * (a_scale.reshape(()) * b_scale)


@operator("IntegerGemm", domain=DOMAIN)
def integer_gemm(
    a, a_scale, a_zero, b, b_scale, b_zero, c=None, *, a_axis=1, b_axis=1, alpha=1.0, beta=1.0, transA=0, transB=0
):
    if not _applies(a, a_scale, b, b_scale, b_axis, 0 if transB else 1):
        a, b = _dequantized(a, a_scale, a_zero, a_axis), _dequantized(b, b_scale, b_zero, b_axis)
        return linear.gemm(a, b, c, alpha=alpha, beta=beta, transA=transA, transB=transB)
    y = _product(a.T if transA else a, a_scale, a_zero, b.T if transB else b, b_scale, b_zero)
    y = y if alpha == 1 else alpha * y
    return y if c is None else y + (c if beta == 1 else beta * c)


@operator("IntegerConv", domain=DOMAIN)
def integer_conv(
    a,
    a_scale,
    a_zero,
    b,
    b_scale,
    b_zero,
    bias=None,
    *,
    a_axis=1,
    b_axis=1,
    auto_pad="NOTSET",
    dilations=None,
    group=1,
    kernel_shape=None,
    pads=None,
    strides=None,
):
    """a: the image, b: the filters."""
    geometry = {"strides": strides, "dilations": dilations, "pads": pads, "auto_pad": auto_pad}
    if not _applies(a, a_scale, b, b_scale, b_axis, 0):
        a, b = _dequantized(a, a_scale, a_zero, a_axis), _dequantized(b, b_scale, b_zero, b_axis)
        return conv.conv(a, b, bias, group=group, **geometry)
    sums = conv.integer_conv(a, b, _scalar(a_zero), b_zero, windows(a.shape[2:], b.shape[2:], **geometry), group)
    by_filter = (-1, *(1,) * (a.ndim - 2))
    y = sums.astype(jnp.float32) * (a_scale.reshape(()) * b_scale.reshape(by_filter))
    return y if bias is None else y + bias.reshape(by_filter)
