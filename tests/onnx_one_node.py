"""Models of one node, run by Zenith and by ONNX Runtime."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zenith_jax.frontends import onnx as zenith_onnx

onnx = pytest.importorskip("onnx")

MICROSOFT = "com.microsoft"


def model(op_type: str, inputs: list[Any], attributes: dict[str, Any], *, outputs: int, domain: str, opset: int) -> Any:
    """A ModelProto with one node. inputs: arrays, or None for one left out."""
    from zenith_jax.frontends.onnx import dtypes

    names = ["" if v is None else f"in{i}" for i, v in enumerate(inputs)]
    results = [f"out{i}" for i in range(outputs)]
    node = onnx.helper.make_node(op_type, names, results, domain=domain, **attributes)
    infos = [
        onnx.helper.make_tensor_value_info(n, dtypes.to_onnx(v.dtype), v.shape)
        for n, v in zip(names, inputs, strict=True)
        if v is not None
    ]
    graph = onnx.helper.make_graph([node], "one", infos, [onnx.ValueInfoProto(name=r) for r in results])
    opsets = {"": opset, domain: 1} if domain else {"": opset}
    imports = [onnx.helper.make_opsetid(d, v) for d, v in opsets.items()]
    return onnx.helper.make_model(graph, opset_imports=imports, ir_version=10)


def zenith(proto: Any, inputs: list[Any], *, static: tuple[int, ...] = ()) -> list[np.ndarray]:
    """Under `jax.jit`, with all inputs traced except those at the positions in `static`."""
    loaded = zenith_onnx.load(proto, static=[f"in{i}" for i in static])
    given = {f"in{i}": v for i, v in enumerate(inputs) if v is not None}
    known = {name: given.pop(name) for name in [f"in{i}" for i in static]}
    results = jax.jit(lambda traced: loaded.apply(loaded.params, **traced, **known))(
        {name: jnp.asarray(v) for name, v in given.items()}
    )
    return [None if r is None else np.asarray(r) for r in results]


def runtime(proto: Any, inputs: list[Any]) -> list[np.ndarray]:
    """By ONNX Runtime on the CPU, without its optimiser."""
    onnxruntime = pytest.importorskip("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    # Without it, sums of products of 8-bit integers saturate on CPUs without VNNI.
    options.add_session_config_entry("session.x64quantprecision", "1")
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {f"in{i}": v for i, v in enumerate(inputs) if v is not None})
