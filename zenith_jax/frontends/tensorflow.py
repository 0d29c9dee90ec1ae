# pyright: reportMissingImports=false, reportMissingModuleSource=false
"""TensorFlow and Keras models run in JAX: `zenith.tensorflow.compile(model)`, tf.Tensor in, tf.Tensor out.

A model becomes a concrete function, tf2onnx makes an ONNX model of that, and the importer the JAX function. Variables
are copied then: a model that is trained further is compiled again. TensorFlow is imported when `compile` is called.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import importlib.util
import logging
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zenith_jax.api import explain, jit
from zenith_jax.borrowed import BorrowedArrays
from zenith_jax.errors import FrontendError, InputError
from zenith_jax.frontends._source import Source, missing
from zenith_jax.frontends.keras import read as read_keras
from zenith_jax.frontends.onnx import OnnxModel, load
from zenith_jax.ir import _compat
from zenith_jax.report import Report

__all__ = ["CompiledFunction", "compile"]

_OPSET = 18  # the newest that tf2onnx 1.17 writes
_converting = threading.Lock()  # tf2onnx keeps its state in globals


def compile(model: Any, *, signature: Sequence[Any] | None = None) -> CompiledFunction:
    """The inference of a model as a function that runs in JAX with Zenith's kernels.

    model: a Keras model, a tf.function or tf.Module with a `__call__` of one, a concrete function, the folder of a
    SavedModel, or a .keras file.
    signature: tf.TensorSpecs of the inputs, for a tf.function that has none; sizes of None may differ between calls,
    each combination of sizes is compiled at its first call.

    >>> fast = zenith.tensorflow.compile(keras_model)
    >>> probabilities = fast(images)
    """
    _require()
    return CompiledFunction(_imported(_concrete(model, signature)))


@dataclasses.dataclass(frozen=True)
class _Imported:
    """specs: of the inputs, which `onnx` calls `names`. structure: of the outputs, a leaf for each of `dtypes`."""

    onnx: OnnxModel
    name: str
    specs: tuple[Any, ...]
    names: tuple[str, ...]
    structure: Any
    dtypes: tuple[Any, ...]


class CompiledFunction:
    """Made by `compile`. Call it as the model: positional tensors, or by the names of the inputs.

    Inputs may be tf.Tensors, NumPy arrays or what tf.convert_to_tensor takes. params: the variables as JAX arrays.
    """

    def __init__(self, imported: _Imported):
        self._imported, self._crossing = imported, _Crossing(imported)
        self.params = {**imported.onnx.params, **imported.onnx.constants}
        self._jitted = jit(self._function)
        self._shapes: Any = None

    @property
    def report(self) -> Report:
        """What is fused for the sizes of the latest call."""
        if self._shapes is None:
            raise InputError("nothing is compiled yet: call the model once")
        return explain(self._function)(self.params, *self._shapes)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        tf, crossing = self._crossing.tf, self._crossing
        tensors = [
            x if crossing.is_tensor(x) else tf.convert_to_tensor(x, spec.dtype)
            for x, spec in zip(self._bound(args, kwargs), self._imported.specs, strict=True)
        ]
        arrays = crossing.arrays(tensors)
        self._shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arrays]
        return self._crossing.restored(self._jitted(self.params, *arrays))

    def _function(self, params: Mapping[str, Any], *inputs: Any) -> tuple[Any, ...]:
        return self._imported.onnx.apply(params, **dict(zip(self._imported.names, inputs, strict=True)))

    def _bound(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """The inputs in order: positional, by name, or as Keras takes several: one list or dict of them."""
        names = [spec.name for spec in self._imported.specs]
        if len(args) == 1 and not kwargs and len(names) > 1 and isinstance(args[0], list | tuple | dict):
            (args, kwargs) = ((), dict(args[0])) if isinstance(args[0], dict) else (tuple(args[0]), {})
        given = dict(zip(names, args, strict=False))
        if len(args) > len(names) or set(given) & set(kwargs) or {*given, *kwargs} != set(names):
            raise InputError(
                f"{self._imported.name} takes {names}, got {len(args)} inputs and {sorted(kwargs)} by name"
            )
        return [{**given, **kwargs}[name] for name in names]


def source(obj: Any, *example_inputs: Any) -> Source:
    """For `zenith.compile`."""
    _require()
    imported = _imported(_concrete(obj, None, example_inputs))
    if len(example_inputs) != len(imported.specs):
        names = [spec.name for spec in imported.specs]
        raise FrontendError(
            f"{imported.name} takes the inputs {names}: give an example of each, got {len(example_inputs)}"
        )
    compiled = CompiledFunction(imported)

    crossing = compiled._crossing

    def adapt(args: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(crossing.arrays(args))  # `restore` gives tensors whatever came

    return Source(
        function=compiled._function,
        params=compiled.params,
        name=imported.name,
        framework="tensorflow",
        arguments=[spec.name for spec in imported.specs],
        outputs=[o.name for o in imported.onnx.outputs],
        adapt=adapt,
        restore=crossing.restored,
    )


def _require() -> None:
    for package in ("tensorflow", "tf2onnx", "onnx"):
        if importlib.util.find_spec(package) is None:
            raise missing("zenith.tensorflow", package, "tensorflow")


def _concrete(model: Any, signature: Sequence[Any] | None, examples: Sequence[Any] = ()) -> Any:
    """The concrete function of a model's inference, its inputs' unknown sizes left open."""
    import keras
    import tensorflow as tf

    if isinstance(model, str | os.PathLike):
        path = os.fspath(model)
        if os.path.isfile(os.path.join(path, "saved_model.pb")):
            return _of_saved_model(_loaded(tf, path), path)
        if not path.endswith(".keras"):
            raise FrontendError(f"{path!r} is neither the folder of a SavedModel nor a .keras file")
        model = read_keras(path)
    if isinstance(model, keras.Model):
        if keras.backend.backend() != "tensorflow":
            raise FrontendError(f"Keras computes in {keras.backend.backend()} here: zenith.compile takes its models")
        return _of_keras(tf, model, examples)
    if hasattr(model, "structured_outputs") and hasattr(model, "captured_inputs"):
        return model
    if isinstance(model, tf.Module) and not hasattr(model, "get_concrete_function"):
        model = getattr(model, "__call__", model)  # noqa: B004, the tf.function itself is wanted
    if not hasattr(model, "get_concrete_function"):
        raise FrontendError(
            f"zenith.tensorflow.compile takes a Keras model, a tf.function, a tf.Module whose __call__ is one, a "
            f"concrete function, or the path of a SavedModel or .keras file; got {type(model).__name__}"
        )
    specs = signature or [tf.TensorSpec(np.shape(x), _dtype_of(x)) for x in examples]
    try:
        function: Any = model
        return function.get_concrete_function(*specs)
    except (TypeError, ValueError) as error:
        raise FrontendError(
            f"the tf.function does not take {specs or 'no inputs'}: give signature=[tf.TensorSpec(...)] ({error})"
        ) from error


def _loaded(tf: Any, path: str) -> Any:
    try:
        return tf.saved_model.load(path)
    except (ValueError, OSError) as error:
        raise FrontendError(f"TensorFlow cannot read {path!r}: {error}") from error


def _dtype_of(x: Any) -> Any:
    return x.dtype if hasattr(x, "dtype") else np.asarray(x).dtype


def _of_saved_model(loaded: Any, path: str) -> Any:
    signatures = loaded.signatures
    if len(signatures) == 1 or "serving_default" in signatures:
        name = "serving_default" if "serving_default" in signatures else next(iter(signatures))
        concrete = signatures[name]
        concrete._zenith_owner = loaded  # the variables live as long as what was loaded
        return concrete
    if hasattr(loaded, "serve"):  # what keras.Model.export writes
        return loaded.serve.concrete_functions[0]
    raise FrontendError(
        f"the SavedModel {path!r} has the signatures {sorted(signatures)}, of which none is serving_default"
    )


def _of_keras(tf: Any, model: Any, examples: Sequence[Any]) -> Any:
    if getattr(model, "inputs", None):
        named = zip(model.inputs, getattr(model, "input_names", [i.name for i in model.inputs]), strict=True)
        specs = [tf.TensorSpec(i.shape, i.dtype, name=name) for i, name in named]
    elif examples:
        specs = [tf.TensorSpec(np.shape(x), _dtype_of(x), name=f"input_{n}") for n, x in enumerate(examples)]
    else:
        raise FrontendError(f"the Keras model {model.name!r} does not know its inputs: call it once before")
    packed = getattr(model, "_inputs_struct", None)

    @tf.function
    def inference(*inputs: Any) -> Any:
        given = inputs if packed is None else (tf.nest.pack_sequence_as(packed, inputs),)
        return model(*given, training=False)

    concrete = inference.get_concrete_function(*specs)
    concrete._zenith_name = model.name
    return concrete


def _imported(concrete: Any) -> _Imported:
    import tensorflow as tf
    import tf2onnx

    name = getattr(concrete, "_zenith_name", None) or tf.compat.as_str(concrete.name).removeprefix("__inference_")
    specs = _specs(tf, concrete)
    tensors = [t for t in tf.nest.flatten(concrete.structured_outputs) if t is not None]
    loud = logging.getLogger("tf2onnx")
    level = loud.level
    with _converting, _collecting():
        loud.setLevel(logging.CRITICAL)  # it reports Erfc, which it leaves in the graph and Zenith computes
        try:
            proto, _ = tf2onnx.convert.from_function(
                _Given(_flat(tf, concrete, specs)), input_signature=specs, opset=_OPSET
            )
        except Exception as error:
            raise FrontendError(f"tf2onnx cannot convert {name}: {type(error).__name__}: {error}") from error
        finally:
            loud.setLevel(level)
    onnx = load(proto)
    if unknown := onnx.unsupported():
        raise FrontendError(f"{name}: Zenith does not compute the operators {', '.join(sorted(unknown))}")
    if onnx.static_inputs:
        raise FrontendError(f"{name}: the values of the inputs {list(onnx.static_inputs)} decide shapes")
    if len(onnx.outputs) != len(tensors):
        raise FrontendError(f"{name} has {len(tensors)} outputs, tf2onnx gave {len(onnx.outputs)}")
    return _Imported(
        onnx=onnx,
        name=name,
        specs=specs,
        names=_input_names(onnx, specs, name),
        structure=concrete.structured_outputs,
        dtypes=tuple(t.dtype for t in tensors),
    )


@contextlib.contextmanager
def _collecting() -> Iterator[None]:
    """Garbage is collected often, and looked for among new objects only.

    tf2onnx copies the graph with its weights for each of some 40 passes, and the copies hold themselves: they die when
    Python collects, which it hardly does, as it counts objects and not bytes. Two layers of BERT-base took 5.2 GB and
    14 s to convert, and take 2.0 and 9 (tf2onnx 1.17, Python 3.11, 2026-11-26).
    """
    thresholds, is_free = gc.get_threshold(), gc.isenabled() and not gc.get_freeze_count()
    if is_free:
        gc.freeze()
        gc.set_threshold(700, 2, 1)
    try:
        yield
    finally:
        if is_free:
            gc.set_threshold(*thresholds)
            gc.unfreeze()


def _specs(tf: Any, concrete: Any) -> tuple[Any, ...]:
    captured = len(concrete.captured_inputs)
    inputs = concrete.inputs[: len(concrete.inputs) - captured]
    return tuple(tf.TensorSpec(t.shape, t.dtype, name=t.name.removesuffix(":0")) for t in inputs)


@dataclasses.dataclass(frozen=True)
class _Given:
    """A concrete function in the place where tf2onnx expects the tf.function that makes it."""

    concrete: Any

    def get_concrete_function(self, *_: Any) -> Any:
        return self.concrete


def _flat(tf: Any, concrete: Any, specs: Sequence[Any]) -> Any:
    """The concrete function, its outputs in a flat list where it returns a dict of other things than tensors, which
    tf2onnx does not take."""
    outputs = concrete.structured_outputs
    if not isinstance(outputs, dict) or not any(map(tf.nest.is_nested, outputs.values())):
        return concrete

    @tf.function
    def flat(*inputs: Any) -> Any:
        return [t for t in tf.nest.flatten(concrete(*inputs)) if t is not None]

    return flat.get_concrete_function(*specs)


def _input_names(onnx: OnnxModel, specs: Sequence[Any], name: str) -> tuple[str, ...]:
    """The model's names for the inputs of the concrete function. tf2onnx keeps their order, and drops the unread."""
    names = [i.name for i in onnx.inputs]
    if len(names) == len(specs):
        return tuple(names)
    raise FrontendError(
        f"{name} has the inputs {[s.name for s in specs]}, of which only {names} are read: leave out the others"
    )


class _Crossing:
    """The inputs of a model as arrays, and its results as tensors.

    All of this is beside the program and runs with the caches that a program leaves, where each function that is called
    costs 20 to 50 us: so it calls few. The MNIST network, 64 images, took 0.8 ms longer than through the fastest door,
    and takes 0.25 (2 EPYC cores, AVX2, TensorFlow 2.21, 2026-11-26).
    """

    def __init__(self, imported: _Imported):
        import tensorflow as tf

        self.tf, self.imported = tf, imported
        self.eager = tf.__internal__.EagerTensor
        self.on_cpu = jax.default_backend() == "cpu"
        # A tensor on a GPU has a buffer too, a copy.
        borrows = self.on_cpu and not tf.config.list_physical_devices("GPU")
        device = jax.local_devices(backend="cpu")[0]
        self.inlets = [
            _Inlet(tf, spec, BorrowedArrays.of(self.eager, device) if borrows else None) for spec in imported.specs
        ]
        self.is_single = len(imported.dtypes) == 1 and not tf.nest.is_nested(imported.structure)
        self.from_dlpack = tf.experimental.dlpack.from_dlpack
        self.checked: set[Any] = set()  # sizes of inputs, for which no result is an input
        self.unchecked: dict[int, _Unchecked] = {}  # by thread

    def is_tensor(self, x: Any) -> bool:
        return type(x) is self.eager or isinstance(x, self.tf.Tensor)

    def arrays(self, args: Sequence[Any]) -> list[Any]:
        """Tensors as arrays in their memory, which the caller keeps until the results are `restored`; others as they
        are."""
        if self.unchecked:  # of a call that failed
            self.unchecked.pop(threading.get_ident(), None)
        found, borrowed = [], []
        for x, inlet in zip(args, self.inlets, strict=False):
            array = inlet.kept(x)
            if array is None:
                array = inlet(x) if self.is_tensor(x) else x
                borrowed.append((inlet, x, array))
            found.append(array)
        if borrowed or len(found) > 1:
            shapes = tuple([np.shape(a) for a in found])
            if borrowed or shapes not in self.checked:
                self.unchecked[threading.get_ident()] = _Unchecked(shapes, found, borrowed)
        return found

    def restored(self, results: Sequence[Any]) -> Any:
        """The results in the model's own structure."""
        if self.unchecked and (unchecked := self.unchecked.pop(threading.get_ident(), None)) is not None:
            results = self._checked(results, unchecked)
        if self.is_single:
            return self._tensor(results[0], self.imported.dtypes[0])
        tensors = [self._tensor(r, d) for r, d in zip(results, self.imported.dtypes, strict=True)]
        return self.tf.nest.pack_sequence_as(self.imported.structure, tensors)

    def _checked(self, results: Sequence[Any], unchecked: _Unchecked) -> Sequence[Any]:
        """The results, none in the memory of an input, as jit may give them: that is not theirs to keep. Where one was,
        inputs are not borrowed any more; else their arrays are kept."""
        if not any(inlet.borrowed for inlet in self.inlets):
            return results
        jax.block_until_ready(results)
        inputs = {a.unsafe_buffer_pointer() for a in unchecked.arrays if isinstance(a, jax.Array) and a.size}
        is_input = [bool(r.size) and r.unsafe_buffer_pointer() in inputs for r in results]
        if any(is_input):
            for inlet in self.inlets:
                inlet.borrowed = None
            return [jnp.array(r, copy=True) if taken else r for r, taken in zip(results, is_input, strict=True)]
        for inlet, tensor, array in unchecked.borrowed:
            if inlet.borrowed is not None:
                inlet.borrowed.keep(tensor, array)
        self.checked.add(unchecked.shapes)
        return results

    def _tensor(self, array: Any, dtype: Any) -> Any:
        array.block_until_ready()
        tensor = self.from_dlpack(_compat.dlpack_of_array(array, None) if self.on_cpu else array.__dlpack__())
        return tensor if tensor.dtype is dtype else self.tf.cast(tensor, dtype)


@dataclasses.dataclass(frozen=True)
class _Unchecked:
    """A call whose inputs are in memory, or of sizes, that were not seen before. borrowed: (inlet, tensor, array)."""

    shapes: tuple[tuple[int, ...], ...]
    arrays: Sequence[Any]
    borrowed: Sequence[tuple[_Inlet, Any, Any]]


class _Inlet:
    """How tensors of one input become arrays: in their memory, but for small or unaligned ones, and 64-bit integers."""

    def __init__(self, tf: Any, spec: Any, borrowed: BorrowedArrays | None):
        self.tf, self.spec = tf, spec
        self.is_wide = spec.dtype in (tf.int64, tf.uint64, tf.float64)
        self.borrowed = None if self.is_wide else borrowed

    def kept(self, x: Any) -> Any:
        """The array that was made for the memory of the tensor; None where there is none, or `x` is no tensor."""
        borrowed = self.borrowed
        return None if borrowed is None else borrowed.find(x)

    def __call__(self, tensor: Any) -> Any:
        tf, spec = self.tf, self.spec
        if tensor.dtype != spec.dtype:
            raise InputError(f"input {spec.name!r} is {spec.dtype.name}, got {tensor.dtype.name}: tf.cast it first")
        if not spec.shape.is_compatible_with(tensor.shape):
            raise InputError(f"input {spec.name!r} has shape {spec.shape}, got {tensor.shape}")
        if not self.is_wide or jax.config.read("jax_enable_x64"):
            array = None
            if self.borrowed is not None:
                array = self.borrowed.array(tensor, tuple(tensor.shape), tensor.dtype.as_numpy_dtype)
            return jax.dlpack.from_dlpack(tensor) if array is None else array
        if tensor.dtype == tf.float64:
            raise InputError(f"input {spec.name!r} is float64, which JAX has only with jax_enable_x64 set")
        array = tensor.numpy()
        narrow = array.astype(np.int32)
        if (narrow != array).any():
            raise InputError(f"input {spec.name!r} has integers beyond 32 bits: set jax_enable_x64")
        return jnp.asarray(narrow)
