# pyright: reportMissingImports=false
"""Keras models, by Keras' backend: with JAX's the model is a JAX function as it stands; with PyTorch's it is a torch
module, with TensorFlow's a concrete function.

Keras is imported when `source` is called.
"""

from __future__ import annotations

import importlib.util
import inspect
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from zenith_jax.errors import FrontendError
from zenith_jax.frontends._source import Declared, Source, missing
from zenith_jax.ir import _compat

_compat.hide_frames(__file__)  # reports name the layers of models that have no code of their own


def source(obj: Any, *example_inputs: Any) -> Source:
    """obj: a keras.Model, or the path of a .keras file."""
    keras = _keras()
    backend = keras.backend.backend()
    if backend == "tensorflow":
        from zenith_jax.frontends import tensorflow

        return tensorflow.source(obj, *example_inputs)
    if isinstance(obj, str | os.PathLike):
        obj = read(os.fspath(obj))
    if backend == "torch":
        from zenith_jax.frontends import torch

        return torch.source(obj, *example_inputs)
    if backend != "jax":
        raise FrontendError(
            f"Keras computes in {backend} here: set KERAS_BACKEND=jax, or torch or tensorflow, before it is imported"
        )
    return _of_jax(keras, obj, example_inputs)


def read(path: str) -> Any:
    """The model in a .keras file, without the state of its training."""
    if not os.path.exists(path):
        raise FrontendError(f"there is no file {path!r}")
    try:
        return _keras().saving.load_model(path, compile=False)
    except (ValueError, OSError) as error:
        raise FrontendError(f"Keras cannot read {path!r}: {error}") from error


def _keras() -> Any:
    if importlib.util.find_spec("keras") is None:
        raise missing("a Keras model", "keras", "tensorflow")
    try:
        import keras
    except ModuleNotFoundError as error:  # of what it computes in, which is TensorFlow unless KERAS_BACKEND says else
        raise missing("a Keras model", error.name or "tensorflow", "tensorflow") from error
    return keras


def _of_jax(keras: Any, model: Any, examples: Sequence[Any]) -> Source:
    if not isinstance(model, keras.Model):
        raise FrontendError(f"a Keras model is a keras.Model, got {type(model).__name__}: keras.Model(inputs, outputs)")
    if not model.built and examples:
        model(*_packed(keras, model, examples))
    if not model.built:
        raise FrontendError(f"the Keras model {model.name!r} has no weights yet: call it once, or give example inputs")
    variables = {"trainable": model.trainable_variables, "non_trainable": model.non_trainable_variables}
    names = {kind: _distinct(v.path for v in of) for kind, of in variables.items()}
    # Keras takes no word about training for inference, and hands the word to no `call` that does not take it.
    inference = {"training": False} if "training" in inspect.signature(model.call).parameters else {}

    def function(params: Mapping[str, Mapping[str, Any]], *inputs: Any) -> Any:
        trainable, other = ([params[kind][n] for n in of] for kind, of in names.items())
        results, after = model.stateless_call(trainable, other, *_packed(keras, model, inputs), **inference)
        if any(a is not b for a, b in zip(other, after, strict=True)):
            changed = [n for n, a, b in zip(names["non_trainable"], other, after, strict=True) if a is not b]
            raise FrontendError(
                f"{model.name} changes {', '.join(changed)} when it is called, which a compiled model has no place for"
            )
        return results

    return Source(
        function=function,
        params={
            # Copies: fit and evaluate give a model's own arrays away.
            kind: {n: jnp.array(v.value, copy=True) for n, v in zip(names[kind], of, strict=True)}
            for kind, of in variables.items()
        },
        name=model.name,
        framework="keras",
        outputs=tuple(getattr(model, "output_names", None) or ()),
        declared=_declared(model, examples),
    )


def _packed(keras: Any, model: Any, inputs: Sequence[Any]) -> Sequence[Any]:
    """The arguments of a call: several inputs of a functional model go as the one structure that it is made of."""
    structure = getattr(model, "_inputs_struct", None)
    if structure is None or len(inputs) < 2:
        return inputs
    return [keras.tree.pack_sequence_as(structure, list(inputs))]


def _distinct(names: Any) -> list[str]:
    """Layers of nested models may have the same path."""
    found: dict[str, None] = {}
    for name in names:
        count, distinct = 1, name
        while distinct in found:
            count += 1
            distinct = f"{name}_{count}"
        found[distinct] = None
    return list(found)


def _declared(model: Any, examples: Sequence[Any]) -> tuple[Declared, ...]:
    """The inputs in the order of the flattened arguments: a dict's values come by its sorted keys."""
    tensors = list(getattr(model, "inputs", None) or ())
    if len(examples) == 1 and isinstance(examples[0], Mapping):
        by_name = {t.name: t for t in tensors}
        if set(by_name) != set(examples[0]):
            return ()
        tensors = [by_name[name] for name in sorted(by_name)]
    shapes = [tuple("batch" if n is None and i == 0 else n for i, n in enumerate(t.shape)) for t in tensors]
    return tuple(Declared(t.name, shape, str(t.dtype)) for t, shape in zip(tensors, shapes, strict=True))
