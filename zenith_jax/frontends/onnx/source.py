"""An ONNX file, its bytes, a ModelProto or an OnnxModel as a Source."""

from __future__ import annotations

from typing import Any

import numpy as np

from zenith_jax.errors import FrontendError
from zenith_jax.frontends._source import Declared, Source
from zenith_jax.frontends.onnx.load import load
from zenith_jax.frontends.onnx.model import OnnxModel


def source(obj: Any, *example_inputs: Any) -> Source:
    """Static inputs, which decide shapes, are bound to the values that the example inputs have for them."""
    model = obj if isinstance(obj, OnnxModel) else load(obj)
    names = [i.name for i in model.inputs]
    positions = [names.index(n) for n in model.static_inputs]
    if positions and not example_inputs:
        raise FrontendError(
            f"the inputs {list(model.static_inputs)} decide shapes of this model: give example inputs with their values"
        )
    if positions and len(example_inputs) < len(names):
        raise FrontendError(f"the model takes {len(names)} inputs {names}, got {len(example_inputs)} example inputs")
    bound = {i: example_inputs[i] for i in positions}
    specialised = model.specialise(**{names[i]: value for i, value in bound.items()}) if bound else model

    def adapt(args: tuple[Any, ...]) -> tuple[Any, ...]:
        for i, value in bound.items():
            if i < len(args) and not np.array_equal(np.asarray(args[i]), np.asarray(value)):
                raise FrontendError(
                    f"input {names[i]!r} decides shapes and is bound to {value!r}, got {args[i]!r}: compile for that"
                )
        return tuple(x for i, x in enumerate(args) if i not in bound)

    return Source(
        function=lambda params, *args: specialised.apply(params, *args),
        params={**specialised.params, **specialised.constants},
        name=specialised.program.graph.name or "onnx",
        framework="onnx",
        arguments=names,
        outputs=[o.name for o in specialised.outputs],
        adapt=adapt if bound else None,
        declared=[_declared(i) for i in specialised.inputs],
    )


def _declared(info: Any) -> Declared:
    if info.type.kind != "tensor" or info.dtype is None:
        raise FrontendError(f"input {info} is no tensor: zenith.onnx.load(model).apply takes it, compile does not")
    return Declared(info.name, info.shape and tuple(info.shape), np.dtype(info.dtype).name)
