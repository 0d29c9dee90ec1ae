"""`zenith.compile`: any model -> a CompiledModel."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zenith_jax import native
from zenith_jax.api import current_context
from zenith_jax.compiled import buckets
from zenith_jax.compiled.buckets import Spec
from zenith_jax.compiled.folding import Arrays, Folded, folded
from zenith_jax.compiled.int8 import with_int8
from zenith_jax.compiled.model import CompiledModel, Export, Interface, dtype_name
from zenith_jax.compiled.precision import DTYPES, PRECISIONS, with_precision
from zenith_jax.compiled.program import MODES, Program, Relaid, program
from zenith_jax.compiled.structure import Structure
from zenith_jax.compiled.tuning import tuned
from zenith_jax.config import config, configured
from zenith_jax.errors import FrontendError, ZenithError
from zenith_jax.export import export
from zenith_jax.frontends._source import Source
from zenith_jax.frontends.recognise import source_of
from zenith_jax.passes.choose import Choices
from zenith_jax.report import Narrowed, Report, collecting


def compile(
    obj: Any,
    *example_inputs: Any,
    mode: str = "default",
    precision: str | None = None,
    dynamic: Mapping[str, Sequence[int]] | None = None,
) -> CompiledModel:
    """A model of any framework as one compiled function for inference, with Zenith's kernels where they are faster.

    obj: a JAX function; `(function, params)`; a flax nnx module; `(linen module, variables)`; an equinox module; an
    ONNX file or ModelProto; a torch.nn.Module; a Keras model, whatever it computes in; a tf.function or SavedModel.
    example_inputs: arrays, or `jax.ShapeDtypeStruct`s, with the shapes and dtypes to compile for, in the places of the
    model's arguments. Python values among them are bound. An ONNX file that declares all sizes needs none.
    mode: "reduce-overhead" spends the least host time a call; "max-autotune" measures for each fused site whether
    Zenith's kernel or XLA's code is faster here, and keeps the times on disk (`zenith cache`).
    precision: "bf16" or "f16": parameters and computation in it; inputs and outputs keep their dtypes. "int8": the
    weights of dense layers in 8 bits, all else as it was; the report says which, and how much they changed.
    dynamic: {"batch": (1, 8, 64)}: one program for each size, calls padded to the next; see docs/compile.md.

    >>> model = zenith.compile((apply, params), jnp.ones((8, 128)), dynamic={"batch": (1, 8, 64)})
    >>> model(x); print(model.report); model.save("model.zenith")

    Raises FrontendError for an object that is no model and for example inputs that do not fit it.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {MODES}, got {mode!r}")
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {PRECISIONS}, got {precision!r}")
    source = original = source_of(obj, *example_inputs)
    if precision in DTYPES and source.framework == "keras":
        raise FrontendError(
            f"{source.name} computes in the dtypes of its layers' policies: "
            "keras.config.set_dtype_policy('mixed_bfloat16') before it is made, instead of precision="
        )
    sizes = buckets.checked(dynamic)
    narrowed: list[Narrowed] = []
    if precision == "int8":
        source, narrowed = with_int8(original, _smallest(original, example_inputs, sizes))
    elif precision is not None:
        source = with_precision(original, precision)
    model = compiled(source, example_inputs, mode=mode, precision=precision, dynamic=sizes)
    if narrowed:
        model = dataclasses.replace(model, report=dataclasses.replace(model.report, narrowed=tuple(narrowed)))
    if precision in DTYPES:
        _check_range(model, original, example_inputs)
    return model


def compiled(
    source: Source,
    example_inputs: Sequence[Any],
    *,
    mode: str = "default",
    precision: str | None = None,
    dynamic: Mapping[str, tuple[int, ...]],
) -> CompiledModel:
    """`compile` of a Source; example_inputs as its `adapt` takes them."""
    args = _examples(source, example_inputs, dynamic)
    with _where_they_lie(source.params, args) as device:
        return _compiled(source, args, device, mode=mode, precision=precision, dynamic=dynamic)


@contextlib.contextmanager
def _where_they_lie(params: Any, args: Any) -> Iterator[Any]:
    """The device that parameters and examples are committed to, compiled for within; None where it is JAX's default."""
    arrays = [x for x in jax.tree.leaves((params, args)) if isinstance(x, jax.Array) and x.committed]
    devices = {d for x in arrays for d in x.devices()}
    if len(devices) != 1 or devices == {native.default_device()}:
        yield None
        return
    (device,) = devices
    with jax.default_device(device), configured(platform=config().platform or native.platform_of(device)):
        yield device


def _compiled(
    source: Source,
    args: tuple[Any, ...],
    device: Any,
    *,
    mode: str,
    precision: str | None,
    dynamic: Mapping[str, tuple[int, ...]],
) -> CompiledModel:
    input_structure, examples = Structure.of(args)
    shapes = buckets.named_shapes(examples, source.declared, dynamic)
    names = _input_names(source, input_structure)
    specs = tuple(Spec(n, s, _dtype(n, x)) for n, s, x in zip(names, shapes, examples, strict=True))
    param_structure, params = Structure.of(source.params)
    params = [jnp.asarray(p) if device is None else jax.device_put(p, device) for p in params]
    out: dict[str, Structure] = {}

    def flat(params: Sequence[Any], inputs: Sequence[Any]) -> list[Any]:
        results = source.function(param_structure.filled(params), *input_structure.filled(inputs))
        out["structure"], arrays = Structure.of(results)
        return [jnp.asarray(x) for x in arrays]

    flat.__name__ = flat.__qualname__ = source.name  # as profiles, logs and telemetry show it

    def structs(sizes: Mapping[str, int]) -> list[Any]:
        return [s.struct(sizes) for s in specs]

    arrays = Arrays(dict(zip(param_structure.names, params, strict=True)))
    programs: dict[tuple[int, ...], Program] = {}
    made: dict[tuple[int, ...], Folded] = {}
    choices: dict[tuple[int, ...], Choices | None] = {}
    report = Report((), current_context(config()).platform)
    relaid = Relaid()
    for sizes in buckets.combinations(dynamic):
        key = tuple(sizes.values())
        with _trace_errors(source.name, structs(sizes)):
            choices[key] = tuned(flat, params, structs(sizes)) if mode == "max-autotune" else config().choices
            with configured(choices=choices[key]), collecting() as sites:
                started = time.perf_counter()
                found = made[key] = folded(flat, arrays, structs(sizes))
                arguments = [arrays[n] for n in found.names]
                programs[key] = program(found.jitted, arguments, structs(sizes), mode, relaid, started)
        report = Report(tuple(sites), report.platform)
    interface = Interface(
        inputs=specs,
        outputs=_output_specs(source, out["structure"], flat, params, structs, dynamic),
        input_structure=input_structure,
        output_structure=out["structure"],
        arguments=tuple(source.arguments),
        dynamic=dynamic,
        adapt=source.adapt,
        restore=source.restore,
    )

    def exported(platform: str, sizes: Mapping[str, int]) -> Export:
        key = tuple(sizes.values())
        if platform == report.platform:
            found = made[key]
        else:
            # What was measured holds for the device it was measured on.
            with configured(choices=None, platform=platform):
                found = folded(flat, arrays, structs(sizes))
        arguments = [_struct(arrays[n]) for n in found.names]
        with configured(choices=choices[key] if platform == report.platform else None):
            program = export(found.jitted, platforms=(platform,))(arguments, structs(sizes))
        return Export(program, found.names, found.replaced)

    model = CompiledModel(
        name=source.name,
        framework=source.framework,
        mode=mode,
        precision=precision,
        parameters=arrays.parameters,
        folded=arrays.folded,
        parameter_structure=param_structure,
        report=report,
        interface=interface,
        programs=programs,
        exported=exported,
    )
    _check_independence(model, examples)
    return model


@contextlib.contextmanager
def _trace_errors(name: str, structs: Sequence[Any]) -> Iterator[None]:
    try:
        yield
    except (TypeError, ValueError) as error:
        if isinstance(error, ZenithError):
            raise
        shown = ", ".join(f"{s.dtype}{list(s.shape)}" for s in structs) or "nothing"
        raise FrontendError(f"{name} cannot be traced with the example inputs {shown}: {error}") from error


def _struct(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _examples(source: Source, given: Sequence[Any], dynamic: Mapping[str, tuple[int, ...]]) -> tuple[Any, ...]:
    """The arguments to trace with: those given, or what the model declares."""
    if given or not source.declared:
        return tuple(given) if source.adapt is None else source.adapt(tuple(given))
    found = []
    for d in source.declared:
        unknown = [n for n in d.shape or () if not isinstance(n, int) and n not in dynamic]
        if d.shape is None or unknown:
            raise FrontendError(
                f"input {d.name!r} has no fixed shape ({d.shape}): give example inputs, or sizes for its dimensions, "
                f"dynamic={{{(unknown or ['batch'])[0]!r}: (1, 8)}}"
            )
        shape = tuple(dynamic[n][0] if isinstance(n, str) else int(n or 0) for n in d.shape)
        found.append(jax.ShapeDtypeStruct(shape, jax.dtypes.canonicalize_dtype(d.dtype)))
    return tuple(found)


def _smallest(source: Source, given: Sequence[Any], dynamic: Mapping[str, tuple[int, ...]]) -> tuple[Any, ...]:
    """The arguments as structs of the first size that each dynamic dimension is compiled for."""
    structure, examples = Structure.of(_examples(source, given, dynamic))
    shapes = buckets.named_shapes(examples, source.declared, dynamic)
    first = {name: sizes[0] for name, sizes in dynamic.items()}
    specs = [Spec("", shape, dtype_name(x)) for shape, x in zip(shapes, examples, strict=True)]
    return structure.filled([s.struct(first) for s in specs])


def _dtype(name: str, example: Any) -> str:
    if jnp.issubdtype(example.dtype, jax.dtypes.extended):
        raise FrontendError(
            f"{name} is a random key: give jax.random.key_data(key), and jax.random.wrap_key_data inside of the model"
        )
    return dtype_name(example)


def _input_names(source: Source, structure: Structure) -> list[str]:
    """Names of the flattened inputs: the model's own, else those of the arguments with the paths inside of them."""
    if len(source.declared) == len(structure.names):
        return [d.name for d in source.declared]
    names = []
    for path in structure.names:
        first, _, rest = path.partition(".")
        argument = source.arguments[int(first)] if int(first) < len(source.arguments) else f"input_{first}"
        names.append(f"{argument}.{rest}" if rest else argument)
    return names


def _output_specs(
    source: Source,
    structure: Structure,
    flat: Callable[..., Any],
    params: Sequence[Any],
    structs: Callable[[Mapping[str, int]], Sequence[Any]],
    dynamic: Mapping[str, tuple[int, ...]],
) -> tuple[Spec, ...]:
    base = {name: max(sizes) for name, sizes in dynamic.items()}
    # Smaller than the base where possible: a table of positions may end there.
    choices = [base, *({**base, name: min(s) if len(s) > 1 else max(s) - 1 or 2} for name, s in dynamic.items())]
    avals = [jax.eval_shape(flat, params, structs(sizes)) for sizes in choices]
    shapes_at = {tuple(s.values()): [a.shape for a in each] for s, each in zip(choices, avals, strict=True)}
    shapes = buckets.output_shapes(shapes_at, list(dynamic))
    if len(source.outputs) == len(shapes):
        names = list(source.outputs)
    else:
        names = ["output" if not n else f"output_{n}" if n[0].isdigit() else n for n in structure.names]
    return tuple(Spec(n, s, str(a.dtype)) for n, s, a in zip(names, shapes, avals[0], strict=True))


def _check_range(model: CompiledModel, original: Source, examples: Sequence[Any]) -> None:
    """Raises FrontendError where a narrow dtype turns finite results for the examples into infinities or NaN."""
    args = _examples(original, examples, model.dynamic)
    arrays = Structure.of(args)[1]
    if not all(isinstance(x, jax.Array | np.ndarray | np.generic) for x in arrays) or _is_finite(
        model.flat_call(arrays)
    ):
        return
    if _is_finite(jax.tree.leaves(original.function(original.params, *args))):
        raise FrontendError(
            f"{model.name}: results for the example inputs are finite in the model's own dtype and not in "
            f'{model.precision}: the range of float16 ends at 65504, take precision="bf16", or none'
        )


def _is_finite(arrays: Sequence[Any]) -> bool:
    return all(bool(jnp.isfinite(x).all()) for x in arrays if hasattr(x, "dtype"))


def _check_independence(model: CompiledModel, examples: Sequence[Any]) -> None:
    """Raises FrontendError where results depend on what else is in the batch: padding would change them.

    Runs the smallest program that can hold more than one position, with and without the rows behind the first.
    """
    if not model.dynamic or not all(isinstance(x, jax.Array | np.ndarray | np.generic) for x in examples):
        return
    for dimension, sizes in model.dynamic.items():
        bucket = {name: s[0] for name, s in model.dynamic.items()}
        bucket[dimension] = next((n for n in sizes if n > 1), 1)
        if bucket[dimension] == 1:
            continue
        program = model.programs[tuple(bucket.values())]
        keep = bucket[dimension] // 2
        full = [_resized(spec, np.asarray(x), bucket) for spec, x in zip(model.inputs, examples, strict=True)]
        alone = [_zeroed(spec, x, dimension, keep) for spec, x in zip(model.inputs, full, strict=True)]
        pairs = zip(model.outputs, program(full), program(alone), strict=True)
        for spec, a, b in pairs:
            a, b = (np.asarray(buckets.cut(spec, r, {**bucket, dimension: keep}), np.float64) for r in (a, b))
            scale = np.max(np.abs(a), initial=0, where=np.isfinite(a))
            if not np.allclose(a, b, rtol=1e-3, atol=1e-3 * scale, equal_nan=True):
                raise FrontendError(
                    f"{model.name}: {spec.name} at one position of {dimension!r} depends on the others, by up to "
                    f"{np.nanmax(np.abs(a - b)):.2g}: padding would change results, so that {dimension!r} cannot be "
                    "dynamic. Compile for each size instead"
                )


def _resized(spec: Spec, x: np.ndarray, sizes: Mapping[str, int]) -> np.ndarray:
    """The example repeated or cut to these sizes."""
    for axis, n in enumerate(spec.shape):
        if isinstance(n, str):
            x = np.take(x, np.arange(sizes[n]) % x.shape[axis], axis=axis)
    return x


def _zeroed(spec: Spec, x: np.ndarray, dimension: str, keep: int) -> np.ndarray:
    x = x.copy()
    for axis, n in enumerate(spec.shape):
        if n == dimension:
            np.moveaxis(x, axis, 0)[keep:] = 0
    return x
