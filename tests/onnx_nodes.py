"""One operator, called as the converter calls it."""

import numpy as np

from zenith_jax.frontends.onnx import ops as _ops  # noqa: F401  registers the operators
from zenith_jax.frontends.onnx import registry


def call(name, *inputs, opset=28, outputs=1, **attributes):
    """The outputs of a node, as the operator gives them: one value, or a tuple where `outputs` is more than 1."""
    operator = registry.lookup(name, "", opset)
    assert operator is not None, f"{name} is not there at opset {opset}"
    node = registry.Node(f"a_{name}", name, "", opset, (True,) * outputs)
    results = operator(node, inputs, attributes)
    return results[0] if outputs == 1 else results[:outputs]


def f32(*values):
    return np.array(values, np.float32)
