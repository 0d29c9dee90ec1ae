"""Activations, and products and convolutions with what follows them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from zenith_jax import ops
from zenith_jax.frontends.onnx.ops import conv as conv_ops
from zenith_jax.frontends.onnx.ops import linear, shape
from zenith_jax.frontends.onnx.ops import slice as slicing
from zenith_jax.frontends.onnx.ops.microsoft import contrib
from zenith_jax.frontends.onnx.values import UnsupportedError, ints


@contrib("Gelu")
def gelu(x):
    return ops.gelu(jnp.asarray(x), approximate=False)


@contrib("BiasGelu")
def bias_gelu(x, bias):
    return ops.gelu(jnp.asarray(x) + bias, approximate=False)


@contrib("FastGelu")
def fast_gelu(x, bias=None):
    x = jnp.asarray(x)
    return ops.gelu(x if bias is None else x + bias, approximate=True)


@contrib("QuickGelu")
def quick_gelu(x, *, alpha=1.702):
    return x * jax.nn.sigmoid(jnp.asarray(alpha, x.dtype) * x)


@contrib("BiasSplitGelu")
def bias_split_gelu(x, bias):
    value, gate = jnp.split(jnp.asarray(x) + bias, 2, axis=-1)
    return value * ops.gelu(gate, approximate=False)


@contrib("BiasAdd")
def bias_add(x, bias, skip):
    return x + bias + skip


def activated(x: Any, name: str, parameters: Any = ()) -> Any:
    """The activation that ONNX Runtime fused into the node before it."""
    p: tuple[Any, ...] = tuple(parameters or ())
    match name:
        case "":
            return x
        case "Relu":
            return jnp.maximum(x, 0)
        case "Tanh":
            return jnp.tanh(x)
        case "Sigmoid":
            return jax.nn.sigmoid(x)
        case "LeakyRelu":
            return jnp.where(x >= 0, x, jnp.asarray(p[0] if p else 0.01, x.dtype) * x)
        case "Clip":
            return jnp.clip(x, p[0], p[1])
        case "HardSigmoid":
            alpha, beta = p if p else (0.2, 0.5)
            return jnp.clip(alpha * x + beta, 0, 1).astype(x.dtype)
        case "Gelu":
            return ops.gelu(x, approximate=False)
        case "HardSwish":
            return x * jnp.clip(x / 6 + 0.5, 0, 1)
        case "QuickGelu":
            return quick_gelu(x, alpha=p[0] if p else 1.702)
    raise UnsupportedError(f"the fused activation {name!r} is not known")


@contrib("FusedMatMul")
@contrib("TransposeMatMul")
def fused_matmul(a, b, *, alpha=1.0, transA=0, transB=0, transBatchA=0, transBatchB=0):
    """alpha * A' @ B'. transBatchA: A's first axis is its rows, and the axes between are the batch."""
    return fused_matmul_activation(
        a, b, alpha=alpha, transA=transA, transB=transB, transBatchA=transBatchA, transBatchB=transBatchB
    )


@contrib("FusedMatMulActivation")
def fused_matmul_activation(
    a,
    b,
    *,
    alpha=1.0,
    transA=0,
    transB=0,
    transBatchA=0,
    transBatchB=0,
    activation="",
    activation_alpha=None,
    activation_beta=None,
    activation_gamma=None,
    activation_axis=None,
):
    a, b = jnp.asarray(a), jnp.asarray(b)
    a = jnp.moveaxis(a, 0, -2) if transBatchA else a
    b = jnp.moveaxis(b, 0, -2) if transBatchB else b
    a = jnp.swapaxes(a, -1, -2) if transA and a.ndim > 1 else a
    b = jnp.swapaxes(b, -1, -2) if transB and b.ndim > 1 else b
    y = jnp.matmul(a, b)
    y = y if alpha == 1 else (y * alpha).astype(y.dtype)
    return activated(y, activation, [p for p in (activation_alpha, activation_beta, activation_gamma) if p is not None])


@contrib("FusedGemm")
def fused_gemm(
    a,
    b,
    c=None,
    *,
    alpha=1.0,
    beta=1.0,
    transA=0,
    transB=0,
    activation="",
    activation_alpha=None,
    activation_beta=None,
    activation_gamma=None,
):
    y = linear.gemm(a, b, c, alpha=alpha, beta=beta, transA=transA, transB=transB)
    return activated(y, activation, [p for p in (activation_alpha, activation_beta, activation_gamma) if p is not None])


@contrib("FusedConv")
def fused_conv(x, w, b=None, z=None, *, activation="", activation_params=None, **geometry):
    """activation(conv(x, w) + b + z)."""
    y = conv_ops.conv(x, w, b, **geometry)
    return activated(y if z is None else y + z, activation, activation_params)


@contrib("NhwcFusedConv")
@contrib("NhwcConv")
def nhwc_conv(x, w, b=None, z=None, **attributes):
    """x and z: channels last; w as in Conv."""
    x, z = (None if v is None else jnp.moveaxis(jnp.asarray(v), -1, 1) for v in (x, z))
    return jnp.moveaxis(fused_conv(x, w, b, z, **attributes), 1, -1)


@contrib("ConvTransposeWithDynamicPads")
def conv_transpose_with_dynamic_pads(x, w, pads=None, b=None, **geometry):
    return conv_ops.conv_transpose(x, w, b, pads=None if pads is None else ints(pads, "pads"), **geometry)


@contrib("Inverse")
def inverse(x):
    return jnp.linalg.inv(x)


contrib("Trilu")(slicing.trilu)
contrib("Pad")(slicing.pad)
contrib("Range")(shape.range_)
contrib("ExpandDims")(shape.unsqueeze)
