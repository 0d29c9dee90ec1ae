"""Short spellings of ONNX protos, for models that a test writes down."""

import numpy as np
import pytest

from zenith_jax.frontends import onnx as zenith_onnx

onnx = pytest.importorskip("onnx")

FLOAT, INT, BOOL, STRING = (
    onnx.TensorProto.FLOAT,
    onnx.TensorProto.INT64,
    onnx.TensorProto.BOOL,
    onnx.TensorProto.STRING,
)


def node(op_type, inputs, outputs, name="", domain="", **attributes):
    return onnx.helper.make_node(op_type, inputs, outputs, name or f"the_{op_type}", domain=domain, **attributes)


def info(name, elem_type=FLOAT, shape=None):
    return onnx.helper.make_tensor_value_info(name, elem_type, shape)


def graph(nodes, inputs=(), outputs=("y",), name="g", **weights):
    tensors = [onnx.numpy_helper.from_array(np.asarray(v), k) for k, v in weights.items()]
    infos = [i if not isinstance(i, str) else info(i) for i in inputs]
    return onnx.helper.make_graph(nodes, name, infos, [info(o) if isinstance(o, str) else o for o in outputs], tensors)


def model(nodes, inputs=(), outputs=("y",), opset=23, functions=(), domains=(), **weights):
    opsets = [onnx.helper.make_opsetid("", opset), *(onnx.helper.make_opsetid(d, 1) for d in domains)]
    made = graph(nodes, inputs, outputs, **weights)
    return onnx.helper.make_model(made, opset_imports=opsets, functions=list(functions), ir_version=10)


def refused(proto, *inputs, match, jit=True):
    """Asserts that the model is refused, when it is loaded or run, with and without jax.jit."""
    with pytest.raises(zenith_onnx.OnnxError, match=match):
        loaded = zenith_onnx.load(proto)
        loaded.apply(loaded.params, *inputs)
    if jit:
        with pytest.raises(zenith_onnx.OnnxError, match=match):
            loaded = zenith_onnx.load(proto)
            loaded(*inputs)


def i64(*values):
    return np.array(values, np.int64)


def leaf(name):
    return onnx.helper.make_function(
        "my", name, ["a"], ["b"], [node("Relu", ["a"], ["b"])], [onnx.helper.make_opsetid("", 23)]
    )
