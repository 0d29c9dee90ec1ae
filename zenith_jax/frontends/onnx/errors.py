"""What can be wrong with an ONNX model, or with what it asks for."""

from __future__ import annotations

from zenith_jax.errors import ZenithError


class OnnxError(ZenithError, ValueError):
    """The file or a call of the model is wrong. The text names the node or the tensor."""


class UnsupportedError(OnnxError, NotImplementedError):
    """The model is valid as far as we know, but asks for what Zenith does not compute."""


class NotStaticError(OnnxError):
    """An operand whose value must be known while tracing is traced."""
