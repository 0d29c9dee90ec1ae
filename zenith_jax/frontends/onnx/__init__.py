"""ONNX models as JAX functions: `zenith.onnx.load("model.onnx")`."""

from zenith_jax.frontends.onnx.errors import NotStaticError, OnnxError, UnsupportedError
from zenith_jax.frontends.onnx.load import load
from zenith_jax.frontends.onnx.model import OnnxModel
from zenith_jax.frontends.onnx.passes import PASSES
from zenith_jax.frontends.onnx.registry import Node, operator

__all__ = ["PASSES", "Node", "NotStaticError", "OnnxError", "OnnxModel", "UnsupportedError", "load", "operator"]
