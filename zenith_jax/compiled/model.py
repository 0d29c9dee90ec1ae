"""CompiledModel: what `zenith.compile` and `zenith.load` return, whatever the model came from."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.core
import numpy as np

from zenith_jax.compiled import buckets
from zenith_jax.compiled.buckets import Spec
from zenith_jax.compiled.program import Program
from zenith_jax.compiled.structure import Structure, is_array
from zenith_jax.errors import InputError
from zenith_jax.report import Report


@dataclasses.dataclass(frozen=True)
class Interface:
    """What goes in and out. arguments: names of the positional arguments, where known. adapt, restore: see Source."""

    inputs: tuple[Spec, ...]
    outputs: tuple[Spec, ...]
    input_structure: Structure
    output_structure: Structure
    arguments: tuple[str, ...] = ()
    dynamic: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    adapt: Callable[[tuple[Any, ...]], tuple[Any, ...]] | None = None
    restore: Callable[[Any], Any] | None = None


@dataclasses.dataclass(frozen=True)
class Export:
    """program: an Exported of (arguments, inputs) -> outputs, both flat. arguments: their names among the parameters
    and folded values. replaced: parameters that folded values stand for."""

    program: Any
    arguments: tuple[str, ...]
    replaced: frozenset[str] = frozenset()


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """Times of one model. median_ms, fastest_ms: of calls that are waited for, one after the other. host_us: until a
    call returns, while the device still computes; as long as the call itself where the host computes."""

    median_ms: float
    fastest_ms: float
    host_us: float
    calls: int

    def __str__(self) -> str:
        return (
            f"median {self.median_ms:.4g} ms, fastest {self.fastest_ms:.4g} ms, "
            f"host {self.host_us:.3g} us a call ({self.calls} calls)"
        )


@dataclasses.dataclass(frozen=True, eq=False)
class CompiledModel:
    """A model compiled for given shapes: `model(*inputs)` as the original, with its outputs' types.

    params: a pytree of arrays on the device, those of the original where they were there already. report: what is
    fused. inputs, outputs: their names, shapes and dtypes; a dimension of `dynamic` has its name in place of a size.
    Other shapes or dtypes than these raise InputError: nothing is compiled behind a call.
    """

    name: str
    framework: str
    mode: str
    precision: str | None
    parameters: Mapping[str, jax.Array] = dataclasses.field(repr=False)  # by their paths
    # What is computed of parameters once, which programs take in their place.
    folded: Mapping[str, jax.Array] = dataclasses.field(repr=False)
    parameter_structure: Structure | None = dataclasses.field(repr=False)  # None: a dict by path
    report: Report = dataclasses.field(repr=False)
    interface: Interface = dataclasses.field(repr=False)
    # {sizes of the dynamic dimensions: program}; see `warm_up`.
    programs: Mapping[tuple[int, ...], Program] = dataclasses.field(repr=False)
    # Of (platform, sizes).
    exported: Callable[[str, Mapping[str, int]], Export] = dataclasses.field(repr=False)

    @property
    def params(self) -> Any:
        values = list(self.parameters.values())
        return dict(self.parameters) if self.parameter_structure is None else self.parameter_structure.filled(values)

    @property
    def inputs(self) -> tuple[Spec, ...]:
        return self.interface.inputs

    @property
    def outputs(self) -> tuple[Spec, ...]:
        return self.interface.outputs

    @property
    def dynamic(self) -> Mapping[str, tuple[int, ...]]:
        return self.interface.dynamic

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        face = self.interface
        if kwargs:
            args = self._positional(args, kwargs)
        adapted = args if face.adapt is None else face.adapt(args)  # which may lie in the memory of the arguments
        try:
            results = self.flat_call(face.input_structure.arrays(adapted))
        except (InputError, TypeError, ValueError, AttributeError) as error:
            raise self._explained(adapted, error) from error
        outputs = face.output_structure.filled(results)
        return outputs if face.restore is None else face.restore(outputs)

    def flat_call(self, arrays: Sequence[Any]) -> Sequence[Any]:
        """JAX or NumPy arrays in the order of `inputs` -> JAX arrays in the order of `outputs`."""
        if not self.interface.dynamic:
            return self.programs[()](arrays)
        sizes = buckets.sizes_of(self.inputs, arrays, self.dynamic)
        bucket = buckets.bucket_of(sizes, self.dynamic)
        program = self.programs[tuple(bucket[n] for n in self.dynamic)]
        if bucket == sizes:
            return program(arrays)
        results = program([buckets.padded(s, x, bucket) for s, x in zip(self.inputs, arrays, strict=True)])
        return [buckets.cut(s, x, sizes) for s, x in zip(self.outputs, results, strict=True)]

    def _positional(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
        names = self.interface.arguments[len(args) :]
        unknown = sorted(set(kwargs) - set(names))
        present = [n for n in names if n in kwargs]
        if unknown or present != list(names[: len(present)]):
            raise InputError(
                f"{self.name} takes the arguments {list(self.interface.arguments)}, got {len(args)} positional and "
                f"{sorted(kwargs)} by name"
            )
        return (*args, *(kwargs[n] for n in present))

    def _explained(self, args: tuple[Any, ...], error: Exception) -> Exception:
        """What is wrong with a call's inputs; the error itself where nothing is."""
        expected = f"{self.name} was compiled for {', '.join(map(str, self.inputs))}"
        given, arrays = Structure.of(args)
        odd = next((x for x in given.leaves if not is_array(x) and hasattr(x, "shape")), None)
        if odd is not None:
            return InputError(f"{expected}; a {type(odd).__module__}.{type(odd).__name__} is no JAX or NumPy array")
        if any(isinstance(x, jax.core.Tracer) for x in arrays):
            return InputError(
                f"{expected}, and is a program of its own, which jit, grad and vmap cannot look into: call the "
                "function that it was compiled from, under zenith.jit"
            )
        if len(arrays) != len(self.inputs):
            return InputError(f"{expected}; got {len(args)} arguments with {len(arrays)} JAX or NumPy arrays in them")
        if given.tree != self.interface.input_structure.tree:
            tree = self.interface.input_structure.tree
            return InputError(f"{expected}; the inputs must have the structure {tree}, got {given.tree}")
        for spec, x in zip(self.inputs, arrays, strict=True):
            fits = len(spec.shape) == np.ndim(x) and all(
                isinstance(n, str) or n == size for n, size in zip(spec.shape, np.shape(x), strict=True)
            )
            if not fits:
                return InputError(
                    f"{expected}; {spec.name} has shape {np.shape(x)}. Compile for that shape, or with dynamic="
                    '{"batch": (1, 8, 64)} for a first dimension that changes'
                )
            if dtype_name(x) != spec.dtype:
                return InputError(f"{expected}; {spec.name} is {x.dtype}, convert it first")
        return InputError(f"{expected}; {error}") if isinstance(error, InputError) else error

    def __deepcopy__(self, memo: Any) -> CompiledModel:
        return self  # nothing of it changes

    def __reduce__(self) -> Any:
        raise TypeError(f"{self.name} is not pickled: model.save(path) writes it, zenith.load(path) reads it")

    def warm_up(self) -> None:
        """Compiles and runs every program once, on zeros, so that no call has to wait for a compiler."""
        for sizes in buckets.combinations(self.dynamic):
            inputs = [np.zeros(s.shape, s.dtype) for s in (spec.struct(sizes) for spec in self.inputs)]
            jax.block_until_ready(self.programs[tuple(sizes.values())](inputs))

    def benchmark(self, *inputs: Any, seconds: float = 1.0) -> Benchmark:
        """Times `flat_call` on these inputs, or on random ones of the largest sizes; inputs lie on the device before.

        Runs for about `seconds`. The framework's own conversion of inputs and outputs is not in the times.
        """
        if inputs:
            args = inputs if self.interface.adapt is None else self.interface.adapt(inputs)
            arrays = self.interface.input_structure.arrays(args)
        else:
            arrays = random_inputs(self.inputs, {n: sizes[-1] for n, sizes in self.dynamic.items()})
        arrays = jax.block_until_ready([jax.device_put(x) for x in arrays])
        for _ in range(2):
            jax.block_until_ready(self.flat_call(arrays))
        waited, queued = [], []
        end = time.perf_counter() + seconds
        while not waited or time.perf_counter() < end:
            start = time.perf_counter()
            results = self.flat_call(arrays)
            queued.append(time.perf_counter() - start)
            jax.block_until_ready(results)
            waited.append(time.perf_counter() - start)
        return Benchmark(
            median_ms=statistics.median(waited) * 1e3,
            fastest_ms=min(waited) * 1e3,
            host_us=statistics.median(queued) * 1e6,
            calls=len(waited),
        )

    def save(self, path: str | os.PathLike[str], *, platforms: Sequence[str] | None = None) -> pathlib.Path:
        """Writes one file that `zenith.load` reads without the model's code or its framework.

        platforms: ("cpu", "cuda"), to run on either; this machine's by default. The file appears whole or not at all.
        Raises SavedModelError where the model cannot be saved, OSError where the file cannot be written.
        """
        from zenith_jax.compiled import saved

        return saved.save(self, pathlib.Path(path), platforms)


def dtype_name(x: Any) -> str:
    """The dtype that an array has inside JAX: 64-bit ones become 32 bits wide where jax_enable_x64 is off."""
    return str(jax.dtypes.canonicalize_dtype(x.dtype))


def random_inputs(specs: Sequence[Spec], sizes: Mapping[str, int]) -> list[np.ndarray]:
    """Standard normal floats, and integers 0 and 1: in the range of any embedding."""
    rng = np.random.default_rng(0)
    structs = [spec.struct(sizes) for spec in specs]
    return [
        (rng.normal(size=s.shape) if jax.numpy.issubdtype(s.dtype, jax.numpy.inexact) else rng.integers(0, 2, s.shape))
        .astype(s.dtype)
        for s in structs
    ]  # fmt: skip
