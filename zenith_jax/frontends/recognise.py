"""Any model -> its Source: one row of DOORS for each kind. A new kind is one row and its module.

Frameworks are recognised without importing them: an object of one that is not in `sys.modules` cannot exist.
"""

from __future__ import annotations

import importlib
import os
import pathlib
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from zenith_jax.errors import FrontendError
from zenith_jax.frontends._source import Source


class Door(NamedTuple):
    """module: has `source(obj, *example_inputs) -> Source`; imported when `recognises(obj)` is true."""

    kind: str
    recognises: Callable[[Any], bool]
    module: str


def source_of(obj: Any, *example_inputs: Any) -> Source:
    """The Source of a model. Raises FrontendError for what is none."""
    for door in DOORS:
        if door.recognises(obj):
            return importlib.import_module(f"zenith_jax.frontends.{door.module}").source(obj, *example_inputs)
    raise FrontendError(f"cannot compile {_described(obj)}. A model is one of: {'; '.join(d.kind for d in DOORS)}")


def _described(obj: Any) -> str:
    if isinstance(obj, str | os.PathLike):
        path = pathlib.Path(obj)
        if path.suffix == ".zenith":
            return f"{os.fspath(obj)!r}, which is compiled already: zenith.load({os.fspath(obj)!r})"
        return f"the path {os.fspath(obj)!r}" + ("" if path.exists() else ", where there is no file")
    if isinstance(obj, type):
        return f"the class {obj.__name__}: give an instance of it"
    if isinstance(obj, tuple):
        return f"a tuple of {', '.join(type(x).__name__ for x in obj) or 'nothing'}"
    return f"an object of type {type(obj).__module__}.{type(obj).__qualname__}"


def is_instance(obj: Any, module: str, *names: str) -> bool:
    """Whether obj is an instance of one of the module's classes; False where nobody has imported the module."""
    loaded = sys.modules.get(module)
    classes = tuple(c for n in names if isinstance(c := getattr(loaded, n, None), type))
    return bool(classes) and isinstance(obj, classes)


def _has_suffix(obj: Any, *suffixes: str) -> bool:
    return isinstance(obj, str | os.PathLike) and pathlib.Path(obj).suffix.lower() in suffixes


def _is_onnx(obj: Any) -> bool:
    if is_instance(obj, "onnx", "ModelProto") or is_instance(obj, "zenith_jax.frontends.onnx.model", "OnnxModel"):
        return True
    return isinstance(obj, bytes | bytearray | memoryview) or _has_suffix(obj, ".onnx")


def _is_saved_model(obj: Any) -> bool:
    return isinstance(obj, str | os.PathLike) and (pathlib.Path(obj) / "saved_model.pb").is_file()


def _is_keras(obj: Any) -> bool:
    return is_instance(obj, "keras", "Model", "KerasTensor") or _has_suffix(obj, ".keras")


def _is_tensorflow(obj: Any) -> bool:
    if _is_saved_model(obj):
        return True
    functions = "tensorflow.python.eager.polymorphic_function"
    return (
        is_instance(obj, "tensorflow", "Module")
        or is_instance(obj, f"{functions}.polymorphic_function", "Function")
        or is_instance(obj, f"{functions}.concrete_function", "ConcreteFunction")
    )


def _is_linen(obj: Any) -> bool:
    module = obj[0] if isinstance(obj, tuple) and len(obj) == 2 else obj
    return is_instance(module, "flax.linen", "Module")


def _is_function(obj: Any) -> bool:
    function = obj[0] if isinstance(obj, tuple) and len(obj) == 2 else obj
    return callable(function) and not isinstance(function, type)


# In this order: every torch or nnx module is also a callable.
DOORS = (
    Door("a torch.nn.Module", lambda obj: is_instance(obj, "torch.nn", "Module"), "torch"),
    Door("a Keras model or .keras file", _is_keras, "keras"),
    Door("a tf.function, tf.Module or the folder of a SavedModel", _is_tensorflow, "tensorflow"),
    Door("an ONNX file, its bytes or a ModelProto", _is_onnx, "onnx.source"),
    Door("a flax nnx module", lambda obj: is_instance(obj, "flax.nnx", "Module"), "flax"),
    Door("a flax linen module with its variables, (module, variables) or module.bind(variables)", _is_linen, "flax"),
    Door("a JAX function; (function, params); an equinox module or other callable pytree", _is_function, "functions"),
)  # fmt: skip
