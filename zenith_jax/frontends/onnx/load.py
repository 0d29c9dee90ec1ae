"""Files, bytes and protos -> OnnxModel."""

from __future__ import annotations

import logging
import os
import pathlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from zenith_jax.errors import ZenithError
from zenith_jax.frontends.onnx import buckets, calls, dtypes, limits, wire
from zenith_jax.frontends.onnx.device import on_device
from zenith_jax.frontends.onnx.errors import OnnxError
from zenith_jax.frontends.onnx.graph import Graph, Parser, ValueInfo, canonical, text
from zenith_jax.frontends.onnx.model import OnnxModel, Program
from zenith_jax.frontends.onnx.parsed import Parsed, all_graphs
from zenith_jax.frontends.onnx.passes import PASSES
from zenith_jax.frontends.onnx.steering import Steering, steering

logger = logging.getLogger("zenith_jax")

# A weight that is no parameter stays NumPy up to this size, in elements.
_SMALL = 1024
_SMALL_STEERING = 16  # elements; a float weight that a shape is computed from: scales, not a layer's weights


def load(
    model: Any,
    *,
    folder: str | os.PathLike[str] | None = None,
    static: Sequence[str] = (),
    params: Collection[str] = (),
    size_bounds: Mapping[str, int] | None = None,
    dynamic: Mapping[str, Sequence[int]] | None = None,
    passes: Sequence[str] | None = None,
    max_bytes: int | None = None,
) -> OnnxModel:
    """An ONNX model as a JAX function with parameters.

    >>> model = zenith.onnx.load("model.onnx")
    >>> loss = lambda params, x: model.apply(params, x)[0].sum()
    >>> gradients = jax.grad(loss)(model.params, x)

    model: the path of a file, of a folder with one .onnx file in it, the bytes of a file, or an onnx.ModelProto.
    folder: where external data lies if not beside the file; files outside of it are never opened.
    static: inputs whose value is known while tracing, in addition to those found to decide a shape.
    params: scalar or integer weights to have among the parameters, where by default only float arrays are.
    size_bounds: for a node (or an output) whose size depends on data, the size it is to have inside `jax.jit`.
    dynamic: for a symbolic dimension the sizes to compile for, {"batch": (1, 8, 64)}: `model(x)` pads with zeros to the
    next one and cuts the result. Only for dimensions along which the model's results are independent.
    passes: names of those of PASSES to run, by default all of them; (): the model exactly as the file has it. To look
    for the pass that does not do what you expect.
    max_bytes: the largest value that a node may compute, else a quarter of the machine's memory; checked beforehand.

    Raises OnnxError for a file that is no valid model; nothing in the file is executed.
    """
    proto, raw, beside = _proto(model)
    where = pathlib.Path(folder) if folder is not None else beside
    if not proto.HasField("graph"):
        raise OnnxError("the file holds no graph: it is no ONNX model, or it is truncated")
    parser = Parser(where, raw)
    opsets = _opsets(proto)
    functions = {}
    for f in proto.functions:
        key = canonical(f.domain), text(f.name), text(f.overload)
        if key in functions:
            raise OnnxError(f"the function {calls.names([key])} is defined twice")
        functions[key] = parser.function(f)
    calls.check(functions)
    graph = parser.main_graph(proto.graph)
    trainable = _trainable(parser, graph, steering(graph, functions), params)
    parsed = Parsed(graph, opsets, functions, parser.weights, trainable, _overridable(proto))
    limit = limits.default_max_bytes() if max_bytes is None else max_bytes
    with limits.limited(limit):
        parsed = _after_passes(parsed, PASSES if passes is None else passes)
    graph, steers = parsed.graph, steering(parsed.graph, functions)
    unknown = sorted(set(static) - {i.name for i in graph.inputs})
    if unknown:
        raise OnnxError(f"static={unknown}: the model's inputs are {[i.name for i in graph.inputs]}")
    metadata = {"producer": f"{proto.producer_name} {proto.producer_version}".strip(), "ir_version": proto.ir_version}
    statics = {k: v for k, v in parsed.weights.items() if k not in parsed.trainable and _is_static(k, v, steers)}
    return OnnxModel(
        params={k: on_device(v) for k, v in parsed.weights.items() if k in parsed.trainable},
        constants={k: on_device(v) for k, v in parsed.weights.items() if k not in parsed.trainable | set(statics)},
        inputs=graph.inputs,
        outputs=graph.outputs,
        static_inputs=tuple(i.name for i in graph.inputs if i.name in static or _is_static_input(i, steers)),
        program=Program(graph, opsets, functions, statics, metadata),
        size_bounds=dict(size_bounds or {}),
        dynamic=buckets.checked(dynamic or {}, graph.inputs),
        max_bytes=limit,
    )


def _onnx() -> Any:
    try:
        import onnx
    except ImportError as error:
        raise ZenithError("zenith.onnx needs the package onnx: pip install 'zenith-jax[onnx]'") from error
    return onnx


def _proto(model: Any) -> tuple[Any, dict[int, np.ndarray], pathlib.Path | None]:
    """The ModelProto, the bytes of weights that were left outside of it, and the folder of the file it comes from."""
    onnx = _onnx()
    if isinstance(model, onnx.ModelProto):
        return model, {}, None
    if isinstance(model, bytes | bytearray | memoryview):
        return *_parsed(onnx, np.frombuffer(model, np.uint8), "the bytes"), None
    if not isinstance(model, str | os.PathLike):
        raise OnnxError(f"load takes a path, bytes or an onnx.ModelProto, got {type(model).__name__}")
    path = pathlib.Path(model)
    if path.is_dir():
        files = sorted(path.glob("*.onnx"))
        if len(files) != 1:
            raise OnnxError(f"the folder {path} has {len(files)} .onnx files; give the path of one")
        path = files[0]
    if not path.is_file():
        raise OnnxError(f"there is no file {path}")
    is_empty = path.stat().st_size == 0  # which cannot be mapped
    content = np.empty(0, np.uint8) if is_empty else np.memmap(path, np.uint8, mode="c")
    return *_parsed(onnx, content, str(path)), path.parent


def _parsed(onnx: Any, content: np.ndarray, what: str) -> tuple[Any, dict[int, np.ndarray]]:
    small, raw = wire.without_weights(content)
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(small)
    except Exception as error:  # protobuf's DecodeError, whose module depends on its version
        raise OnnxError(f"{what} ({content.size} bytes) cannot be read as an ONNX model: {error}") from error
    return proto, raw


def _opsets(proto: Any) -> dict[str, int]:
    opsets = {canonical(o.domain): o.version for o in proto.opset_import}
    if any(v < 1 for v in opsets.values()):
        raise OnnxError(f"opset versions start at 1, the model declares {opsets}")
    if not opsets and proto.ir_version < 3:
        return {"": 1}  # before IR version 3 there were no operator sets
    return opsets


def _after_passes(parsed: Parsed, passes: Iterable[str]) -> Parsed:
    """`parsed` after these passes, in the order of PASSES."""
    names = set(passes)
    if unknown := sorted(names - set(PASSES)):
        raise OnnxError(f"passes={unknown}: there are {list(PASSES)}")
    for name, run in PASSES.items():
        if name in names:
            try:
                parsed = run(parsed)
            except Exception:  # a file that no pass has been made for; running it says what is wrong with it
                logger.warning("the pass %r left this ONNX model as it was", name, exc_info=True)
    return parsed


def _overridable(proto: Any) -> frozenset[str]:
    """Initializers that are inputs too, and so their defaults. Before IR version 4 every initializer had to be one."""
    inputs = {i.name for i in proto.graph.input} if proto.ir_version >= 4 else set()
    return frozenset(inputs & {i.name for i in proto.graph.initializer})


def _trainable(parser: Parser, graph: Graph, steers: Steering, params: Collection[str]) -> frozenset[str]:
    """The weights that become parameters: floats, except scalars, what a shape is computed from, and the running
    statistics of a BatchNormalization, which no gradient moves."""
    if unknown := sorted(set(params) - set(parser.weights)):
        raise OnnxError(f"params={unknown}: the model has no such weights")

    statistics = {
        g.initializers.get(name)
        for g in all_graphs(graph)
        for node in g.nodes
        if node.op_type == "BatchNormalization" and not node.domain
        for name in node.inputs[3:5]
    }

    def is_parameter(name: str, array: np.ndarray) -> bool:
        if name in statistics or array.dtype == np.object_ or name in steers.direct or not dtypes.is_floating(array):
            return False
        # A scalar is an epsilon or a scale; a Constant with one element too. A bias of one element is a parameter.
        is_scalar = array.ndim == 0 or (name in parser.from_constants and array.size == 1)
        return not is_scalar and not (name in steers.reached and array.ndim == 1 and array.size <= _SMALL_STEERING)

    return frozenset(params) | {name for name, array in parser.weights.items() if is_parameter(name, array)}


def _is_static(key: str, array: np.ndarray, steers: Steering) -> bool:
    """Whether a weight that is no parameter stays NumPy, so that what is computed from it can decide a shape."""
    return array.dtype == np.object_ or array.size <= _SMALL or key in steers.direct | steers.reached


def _is_static_input(info: ValueInfo, steers: Steering) -> bool:
    if info.type.kind == "tensor" and info.dtype == np.object_:
        return True
    if info.name in steers.direct:
        return True
    is_small = info.shape is not None and len(info.shape) <= 1
    return is_small and info.name in (steers.reached | steers.switches)
