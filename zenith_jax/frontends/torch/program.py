# pyright: reportMissingImports=false
"""A captured module as JAX code: imported from ONNX once, compiled for each combination of sizes that calls have."""

from __future__ import annotations

import contextlib
import functools as ft
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import torch
from torch.utils import _pytree as pytree

from zenith_jax import native
from zenith_jax.api import explain, jit
from zenith_jax.config import configured
from zenith_jax.frontends.onnx import OnnxModel, load
from zenith_jax.frontends.onnx.errors import OnnxError
from zenith_jax.frontends.torch.capture import Alias, Captured, Constant, Fresh, NotDynamicError, to_onnx
from zenith_jax.frontends.torch.errors import TorchError
from zenith_jax.frontends.torch.tensors import Inlet, Outlet, is_wide, order_after_torch
from zenith_jax.frontends.torch.weights import Place, Weights
from zenith_jax.ir import _compat
from zenith_jax.ops._lower import compute_stream
from zenith_jax.passes import known
from zenith_jax.report import Report
from zenith_jax.telemetry import compiling

# An integer weight up to this size is a constant of the program: position ids, window indices, what shapes come from.
_SMALL = 1024


class Program:
    """A captured module. `accepts(shapes)` says for which sizes it holds, `executable(shapes)` compiles for them."""

    def __init__(self, captured: Captured, tensors: Sequence[torch.Tensor], place: Callable[[str], Place]):
        self.captured = captured
        self.example_shapes = tuple(tuple(t.shape) for t in tensors)
        self.wide = bool(jax.config.read("jax_enable_x64")) or any(map(is_wide, (*tensors, *captured.weights.values())))
        self.inlets = [Inlet(t, self.wide) for t in tensors]
        self.onnx, names = _imported(captured)
        self.input_names = [i.name for i in self.onnx.inputs][: len(tensors)]
        self.weights = Weights(captured.weights, names, self.wide, place)
        self.more = {**self.onnx.params, **self.onnx.constants}  # what the exporter computed from constants
        self.platform = native.platform_of(self.inlets[0].device) if self.inlets else None

    def accepts(self, shapes: Sequence[tuple[int, ...]]) -> bool:
        return tuple(shapes) == self.example_shapes or _Guards(self.captured.program).hold(shapes)

    def function(self, shapes: Sequence[tuple[int, ...]]) -> Callable[..., tuple[Any, ...]]:
        """(the weights, what else the ONNX model holds, the tensors), all flat -> the results."""
        weights = self.weights

        def call(*flat: Any) -> tuple[Any, ...]:
            arrays, rest, inputs = (
                flat[: len(weights.names)],
                flat[len(weights.names) : -len(self.inlets)],
                flat[-len(self.inlets) :],
            )
            given = {
                name: inlet.traced(x, s)
                for name, inlet, x, s in zip(self.input_names, self.inlets, inputs, shapes, strict=True)
            }
            for name, inlet, array, tensor in zip(weights.names, weights.inlets, arrays, weights.tensors, strict=True):
                given[name] = inlet.traced(array, tuple(tensor.shape))
            return self.onnx.apply(dict(zip(self.more, rest, strict=True)), **given)

        call.__name__ = call.__qualname__ = "torch_module"
        return call

    def avals(self, shapes: Sequence[tuple[int, ...]]) -> list[Any]:
        inputs = [inlet.aval(s) for inlet, s in zip(self.inlets, shapes, strict=True)]
        return [*map(_struct, self.weights.arrays), *map(_struct, self.more.values()), *inputs]

    def scope(self) -> contextlib.AbstractContextManager:
        """64-bit types where the module computes in them."""
        return jax.enable_x64(True) if self.wide else contextlib.nullcontext()

    def report(self, shapes: Sequence[tuple[int, ...]]) -> Report:
        with self.scope(), configured(platform=self.platform):
            return explain(self.function(shapes))(*self.avals(shapes))

    def executable(self, shapes: Sequence[tuple[int, ...]]) -> Executable:
        try:
            with self.scope(), configured(platform=self.platform):
                return self._executable(shapes)
        except OnnxError as error:
            raise TorchError(f"its ONNX form does not run in JAX: {error}") from error

    def _executable(self, shapes: Sequence[tuple[int, ...]]) -> Executable:
        started = time.perf_counter()
        function, avals = self.function(shapes), self.avals(shapes)
        traced = jit(function, keep_unused=True).trace(*avals)
        platform = self.platform or "cpu"
        split = None
        if not any(kind == "weight" for kind, _ in self.captured.written):
            split = known.split(traced.jaxpr, len(avals) - len(self.inlets), platform)
        if split is None:
            lowered = traced.lower()
            return Executable(self, tuple(shapes), lowered.compile(_compat.least_launches(lowered, platform)), None)
        folded = _Folded(self, split)

        @ft.wraps(function)
        def remaining(*flat: Any) -> Any:
            compiling.resume(started)
            return split.program(*flat)

        bound = [_struct(x) for x in folded(self.weights.arrays)]
        others = len(bound) - len(split.made_of) + len(self.inlets)
        layouts = _compat.free_layouts(bound[: len(split.made_of)], platform)
        jitted = jax.jit(remaining, keep_unused=True)
        if layouts is not None:
            jitted = jax.jit(remaining, keep_unused=True, in_shardings=(*layouts, *[None] * others))
        lowered = jitted.lower(*bound, *avals[-len(self.inlets) :])
        compiled = lowered.compile(_compat.least_launches(lowered, platform))
        if layouts is not None:
            folded.bring_into(compiled.input_formats[0][: len(layouts)])
        return Executable(self, tuple(shapes), compiled, folded)


def _struct(array: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)


def _imported(captured: Captured) -> tuple[OnnxModel, list[str]]:
    """The ONNX model with weights among its inputs, after the module's own, and the names of these weights."""
    exported = to_onnx(captured.program)
    graph = exported.model.graph
    written = {name for kind, name in captured.written if kind == "weight"}
    names = [
        name
        for name, tensor in captured.weights.items()
        if name in graph.initializers
        and (tensor.dtype.is_floating_point or tensor.numel() > _SMALL or name.removeprefix("module.") in written)
    ]
    for name in names:
        value = graph.initializers.pop(name)
        value.const_value = None
        graph.inputs.append(value)
    exported.optimize()
    try:
        model = load(exported.model_proto)
        if unknown := model.unsupported():
            raise TorchError(f"Zenith does not compute the ONNX operators {', '.join(sorted(unknown))}")
    except OnnxError as error:
        raise TorchError(f"its ONNX form cannot be imported: {error}") from error
    if model.static_inputs:
        raise TorchError(
            f"the values of {list(model.static_inputs)} decide shapes, which must be known when it compiles"
        )
    return model, names


class _Folded:
    """What a program computes from its weights alone, computed once, and again when torch has changed one of them."""

    def __init__(self, program: Program, split: known.Split):
        self.weights = program.weights
        self.more = list(program.more.values())
        self.prepare = jax.jit(split.prepare)
        self.kept = split.kept
        # Numbers of weights; what else there is never changes.
        self.read = sorted({i for of in split.made_of for i in of if i < len(self.weights.names)})
        self.followed: list[torch.Tensor] = []
        self.versions: list[int] = []
        self.arrays: list[jax.Array] = []
        self.values: list[jax.Array] = []
        self.formats: Sequence[Any] | None = None

    def bring_into(self, formats: Sequence[Any]) -> None:
        """From now on what is computed comes in these formats."""
        self.formats, self.versions, self.arrays, self.values = formats, [], [], []

    def __call__(self, arrays: list[jax.Array]) -> list[jax.Array]:
        """What the program takes before its inputs."""
        if arrays is not self.arrays:
            tensors = [self.weights.tensors[i] for i in self.read]
            self.followed = [t for t in tensors if not t.is_inference()]  # torch does not count writes to the others
            self.versions = []
        versions = [t._version for t in self.followed]
        if versions != self.versions or arrays is not self.arrays:
            full = [*arrays, *self.more]
            made = self.prepare(*full)
            if self.formats is not None:
                made = map(_compat.relaid, made, self.formats)
            self.values = [*made, *(full[i] for i in self.kept)]
            self.versions, self.arrays = versions, arrays
        return self.values


class _Sized:
    """A tensor as torch.export's guards see it."""

    def __init__(self, shape: tuple[int, ...]):
        self.size = lambda: shape


class _Guards:
    """What torch.export assumed about sizes: fixed ones, ranges, and relations between them."""

    def __init__(self, program: torch.export.ExportedProgram):
        self.program = program
        inputs = set(program.graph_signature.user_inputs)
        nodes = (n for n in program.graph.nodes if n.op == "placeholder" and n.name in inputs)
        self.shapes = [tuple(n.meta["val"].shape) for n in nodes]

    def hold(self, shapes: Sequence[tuple[int, ...]]) -> bool:
        if [len(s) for s in shapes] != [len(s) for s in self.shapes]:
            return False
        sizes: dict[Any, int] = {}
        for expected, shape in zip(self.shapes, shapes, strict=True):
            for dim, size in zip(expected, shape, strict=True):
                symbol = dim.node.expr if isinstance(dim, torch.SymInt) else dim
                if isinstance(symbol, int) or symbol.is_number:
                    if int(symbol) != size:
                        return False
                elif not symbol.is_symbol or sizes.setdefault(symbol, size) != size:
                    return False
        ranges = self.program.range_constraints
        if any(s in ranges and not ranges[s].lower <= size <= ranges[s].upper for s, size in sizes.items()):
            return False
        code = getattr(self.program, "_guards_code", None)
        if code is None:  # a torch that does not say what it assumed
            return not sizes
        names = {"L": {"tensors": [_Sized(s) for s in shapes]}, "torch": torch}
        try:
            return all(eval(guard, names) for guard in code)  # expressions that torch.export wrote, as it runs them
        except (AttributeError, NameError, KeyError, TypeError):
            return False


class Executable:
    """A program compiled for one combination of sizes."""

    def __init__(self, program: Program, shapes: tuple[tuple[int, ...], ...], compiled: Any, folded: _Folded | None):
        self.program, self.shapes, self.compiled, self.folded = program, shapes, compiled, folded
        self.inlets = program.inlets
        self.more = list(program.more.values())
        self.ordinal = ordinal(program)
        self.bound: list[jax.Array] = []
        self.arrays: list[jax.Array] = []
        self.repeated: tuple[Any, Any] | None = None  # see repeated.py: `run` then, and a Repeated or None
        self.dtypes = program.captured.dtypes
        self.fresh_count = len(self.dtypes) - len(program.captured.written)
        self.is_plain = not program.captured.written and all(isinstance(o, Fresh) for o in program.captured.outputs)
        self.spec = program.captured.spec
        self.order = [o.index for o in program.captured.outputs if isinstance(o, Fresh)]
        self.is_single = self.is_plain and self.spec.is_leaf()
        self.is_tuple = self.is_plain and self.spec == pytree.tree_structure((0,) * len(self.order))
        self.stream = None if self.ordinal is None else compute_stream(self.inlets[0].device)
        self.outlet = Outlet(self.inlets[0].device, self.dtypes)
        self.to_clone: frozenset[int] | None = None

    @ft.cached_property
    def report(self) -> Report:
        return self.program.report(self.shapes)

    def __call__(self, tensors: Sequence[torch.Tensor], *, frozen: bool = False) -> Any:
        """The module's return value. Raises weights.Changed where it has become another module."""
        program = self.program
        weights = program.weights.arrays if frozen else program.weights.current()
        if program.captured.written:
            self._check_distinct(tensors)
        is_ordered = self.ordinal is None or order_after_torch(self.stream, self.ordinal)
        inputs = [inlet.of_call(t, is_ordered) for inlet, t in zip(self.inlets, tensors, strict=True)]
        if self.folded is not None:
            weights = self.folded(weights)
        if weights is not self.arrays:
            self._bind(weights)
        results = self.run(inputs)
        if self.to_clone is None:
            self.to_clone = _forwarded(results, (*self.bound, *inputs))
        fresh = self.outlet(results)
        for i in self.to_clone:
            fresh[i] = fresh[i].clone()
        return self.packed(fresh) if self.is_plain else self._assembled(fresh, tensors)

    def packed(self, fresh: list[torch.Tensor]) -> Any:
        """The return value of a plain program, of its results."""
        if self.is_single:
            return fresh[0]
        if self.is_tuple:
            return tuple([fresh[i] for i in self.order])
        return pytree.tree_unflatten([fresh[i] for i in self.order], self.spec)

    def _bind(self, weights: list[jax.Array]) -> None:
        """Makes `run`, inputs -> results with these weights: past JAX's checks of arguments, which were made before, by
        the key of a call and the way in."""
        self.arrays = weights
        self.bound = weights if self.folded is not None else [*weights, *self.more]
        direct = _compat.direct_execution(self.compiled, self.bound)
        if direct is not None:
            self.run = direct
        elif self.program.wide:
            self.run = self._run_wide
        else:
            self.run = lambda inputs: self.compiled(*self.bound, *inputs)

    def _run_wide(self, inputs: list[jax.Array]) -> Any:
        with self.program.scope():
            return self.compiled(*self.bound, *inputs)

    def _assembled(self, results: list[torch.Tensor], tensors: Sequence[torch.Tensor]) -> Any:
        captured, find = self.program.captured, self.program.weights.find
        fetch = lambda of: tensors[of[1]] if of[0] == "input" else find(f"module.{of[1]}")  # noqa: E731
        with torch.no_grad():
            for of, value in zip(captured.written, results[self.fresh_count :], strict=True):
                fetch(of).copy_(value)
        leaves: list[Any] = []
        for output in captured.outputs:
            if isinstance(output, Fresh):
                leaves.append(results[output.index])
            elif isinstance(output, Constant):
                leaves.append(output.value)
            else:
                leaves.append(_view(output, fetch(output.of)))
        return pytree.tree_unflatten(leaves, self.spec)

    def _check_distinct(self, tensors: Sequence[torch.Tensor]) -> None:
        storages = [t.untyped_storage()._cdata for t in tensors]
        if len(set(storages)) != len(storages):
            raise TorchError("it writes into an input that shares its memory with another one")


def ordinal(program: Program) -> int | None:
    """The number of the GPU on which the program computes; None on the CPU."""
    return program.inlets[0].device.local_hardware_id if program.platform == "cuda" else None


def _view(output: Alias, of: torch.Tensor) -> torch.Tensor:
    if output.strided is None:
        return of
    if not of.is_contiguous():
        raise NotDynamicError("an output is a view of an input, which is not contiguous")
    return of.as_strided(*output.strided)


def _forwarded(results: Sequence[jax.Array], operands: Sequence[jax.Array]) -> frozenset[int]:
    """Results in the memory of an operand or of another result, which jit allows and a new tensor must not be."""
    # Waits without Python's lock, as asking for a pointer does not: whoever computes may need it to let go of a tensor.
    jax.block_until_ready(results)
    seen = {a.unsafe_buffer_pointer() for a in operands if a.size}
    shared = set()
    for i, result in enumerate(results):
        pointer = result.unsafe_buffer_pointer()
        if result.size and pointer in seen:
            shared.add(i)
        seen.add(pointer)
    return frozenset(shared)
