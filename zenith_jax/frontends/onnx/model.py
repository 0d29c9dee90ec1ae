"""`load`: an ONNX model as a JAX function and its parameters."""

from __future__ import annotations

import collections
import dataclasses
import functools as ft
import logging
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zenith_jax.api import jit
from zenith_jax.frontends.onnx import buckets, device, dtypes, interpret, limits
from zenith_jax.frontends.onnx.errors import NotStaticError, OnnxError
from zenith_jax.frontends.onnx.graph import FunctionDef, Graph, ValueInfo
from zenith_jax.frontends.onnx.parsed import all_nodes

logger = logging.getLogger("zenith_jax")


@dataclasses.dataclass(frozen=True)
class Program:
    """A model as it was read: graph, versions, functions. statics: weights that stay NumPy."""

    graph: Graph
    opsets: Mapping[str, int]
    functions: Mapping[tuple[str, str, str], FunctionDef]
    statics: Mapping[str, np.ndarray]
    metadata: Mapping[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class OnnxModel:
    """An ONNX model as a function. Made by `zenith.onnx.load`.

    `model.apply(model.params, x)` is a pure function of the parameters and the inputs: jit, grad, vmap, shard and
    `zenith.jit` it as you like. `model(x)` is the short way: compiled once for each shape, by `zenith.jit`.

    params: the float weights by their name in the file, as JAX arrays; these are what `apply` differentiates by. One
    with a BatchNormalization after it holds that too (`passes.batch_norm`); weights that nothing reads are left out.
    constants: the other large weights (quantised, tables, running statistics). `apply` takes them from here; put them
    into the parameters, `apply({**model.params, **model.constants}, x)`, to have them as arguments of a compiled
    function.
    static_inputs: inputs whose value decides a shape or chooses a variant of the model. Give them as NumPy arrays or
    Python numbers, outside of what is traced, or bind them by `specialise`; another value is another trace.
    """

    params: dict[str, jax.Array]
    constants: dict[str, jax.Array]
    inputs: tuple[ValueInfo, ...]
    outputs: tuple[ValueInfo, ...]
    static_inputs: tuple[str, ...]
    program: Program = dataclasses.field(repr=False)
    size_bounds: Mapping[str, int] = dataclasses.field(default_factory=dict)
    dynamic: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    bound: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    max_bytes: int = dataclasses.field(default_factory=limits.default_max_bytes)

    @property
    def opset(self) -> int:
        """The version of ai.onnx that the model declares."""
        return self.program.opsets.get("", 0)

    def apply(self, params: Mapping[str, Any], *inputs: Any, **inputs_by_name: Any) -> tuple[Any, ...]:
        """The model's outputs, as a tuple in the order of `outputs`.

        Inputs go by position in the order of `inputs`, or by name; an input with a default in the file may be left out.
        Outside of `jax.jit` this runs node by node, with values at hand: then also shapes that depend on data are
        exact. Inside, what decides a shape must be a static input or a constant.
        """
        given = {**self._bind(inputs, inputs_by_name), **self.bound}
        weights = {**self.program.statics, **self.constants, **params}
        values = {name: self._input(name, value) for name, value in given.items() if name not in weights}
        weights.update((name, jnp.asarray(value)) for name, value in given.items() if name in weights)
        run = interpret.Run(self.program.functions, weights, self.size_bounds)
        with limits.limited(self.max_bytes):
            results = interpret.evaluate(self.program.graph, values, interpret.Frame(run, self.program.opsets))
        return tuple(_result(value) for value in results)

    def __call__(self, *inputs: Any, **inputs_by_name: Any) -> tuple[Any, ...]:
        """`apply` with the model's own parameters, compiled for these shapes and these values of the static inputs.

        A model whose shapes depend on data runs node by node instead, which is slower, and says so once in the log.
        """
        given = {k: _as_array(v) for k, v in self._bind(inputs, inputs_by_name).items()}
        statics = {k: v for k, v in given.items() if k in self.static_inputs or not _is_numeric(v)}
        traced = {k: v for k, v in given.items() if k not in statics}
        if not self._compiled.eager:
            pad = buckets.padding(self.dynamic, self.inputs, traced)
            weights = {**self.params, **self.constants}
            compiled = self._compiled(statics)
            try:
                results = compiled(weights, buckets.padded(pad, self.inputs, traced))
                return buckets.cut(pad, self.outputs, results, lambda: jax.eval_shape(compiled, weights, traced))
            except NotStaticError as error:
                logger.warning("this ONNX model runs node by node, not compiled: %s", error)
                self._compiled.eager = True
        return self.apply(self.params, **traced, **statics)

    def specialise(self, **values: Any) -> OnnxModel:
        """The model with these inputs bound to values, which are known while tracing."""
        unknown = sorted(set(values) - {i.name for i in self.inputs})
        if unknown:
            raise OnnxError(f"specialise: the model has no inputs {unknown}; it has {[i.name for i in self.inputs]}")
        bound = {info.name: self._static(info, values[info.name]) for info in self.inputs if info.name in values}
        return dataclasses.replace(
            self,
            inputs=tuple(i for i in self.inputs if i.name not in values),
            static_inputs=tuple(n for n in self.static_inputs if n not in values),
            bound={**self.bound, **bound},
        )

    def unsupported(self) -> dict[str, int]:
        """How often each node type that Zenith does not compute occurs; empty: all are known."""
        run = interpret.Run(self.program.functions, {})
        return dict(interpret.unsupported(self.program.graph, interpret.Frame(run, self.program.opsets)))

    def node_counts(self) -> collections.Counter[str]:
        """How often each node type occurs, graphs within nodes included."""
        return collections.Counter(str(n.op_type) for n in all_nodes(self.program.graph))

    def summary(self) -> str:
        """What is in the model, as text."""
        counts = self.node_counts()
        lines = [f"ONNX model {self.program.graph.name!r}, opset {self.opset}"]
        more = {d: v for d, v in self.program.opsets.items() if d}
        if more:
            lines[0] += ", " + ", ".join(f"{d} {v}" for d, v in sorted(more.items()))
        lines += [f"  in   {i}{'  (static)' if i.name in self.static_inputs else ''}" for i in self.inputs]
        lines += [f"  out  {o}" for o in self.outputs]
        size = sum(p.size for p in self.params.values())
        size_bytes = sum(p.nbytes for p in self.params.values())
        lines.append(f"  {len(self.params)} parameters with {size:,} elements, {size_bytes / 1e6:.1f} MB")
        lines.append(f"  {sum(counts.values())} nodes: " + ", ".join(f"{n} {c}" for n, c in counts.most_common()))
        if missing := self.unsupported():
            lines.append("  not computed: " + ", ".join(f"{n} {c}" for n, c in sorted(missing.items())))
        return "\n".join(lines)

    @ft.cached_property
    def _compiled(self) -> _Compiled:
        return _Compiled(self)

    def _bind(self, inputs: tuple[Any, ...], by_name: Mapping[str, Any]) -> dict[str, Any]:
        names = [i.name for i in self.inputs]
        if len(inputs) > len(names):
            raise OnnxError(f"the model takes {len(names)} inputs {names}, got {len(inputs)}")
        given = dict(zip(names, inputs, strict=False))
        twice = sorted(set(given) & set(by_name))
        defaults = self.program.graph.initializers
        unknown = sorted(n for n in by_name if n not in names and n not in defaults)
        missing = [n for n in names if n not in given and n not in by_name]
        if twice or unknown or missing:
            raise OnnxError(
                f"inputs of the model are {names}: given twice {twice}, unknown {unknown}, missing {missing}"
            )
        given.update(by_name)
        for name, value in given.items():
            if name not in self.static_inputs:
                _check_width(name, value)
        return given

    def _input(self, name: str, value: Any) -> Any:
        """An input as a value of the interpreter: JAX's, or NumPy where it is static or JAX has no such type."""
        info = next((i for i in self.inputs if i.name == name), ValueInfo(name))
        if name in self.bound:
            return value
        if value is None or (isinstance(value, list | tuple) and info.type.kind in ("sequence", "optional")):
            return value if value is None else [_leaf(v) for v in value]
        if name in self.static_inputs and not isinstance(value, jax.Array):
            return self._static(info, value)
        if not isinstance(value, jax.Array):
            array = np.asarray(value)
            if not isinstance(value, np.ndarray | np.generic) and info.dtype is not None:
                array = array.astype(info.dtype)  # Python numbers and lists have no dtype of their own
            if array.dtype.kind in "OUS":
                return array.astype(object)
            value = jnp.asarray(array)
        _check(info, value)
        return value

    def _static(self, info: ValueInfo, value: Any) -> np.ndarray:
        array = np.asarray(value)
        if array.dtype.kind in "OUS":
            return array.astype(object)
        return array if isinstance(value, np.ndarray) or info.dtype is None else array.astype(info.dtype)


class _Compiled:
    """The compiled functions of a model, one for each combination of values of its static inputs."""

    def __init__(self, model: OnnxModel):
        self.model = model
        self.eager = False
        self.functions: dict[Any, Callable[..., Any]] = {}

    def __call__(self, statics: Mapping[str, Any]) -> Callable[..., Any]:
        key = tuple(sorted((name, _key(value)) for name, value in statics.items()))
        if key not in self.functions:
            model = self.model

            @jit
            def compiled(params: dict[str, Any], inputs: dict[str, Any]) -> tuple[Any, ...]:
                results = model.apply(params, **inputs, **statics)
                for info, leaves in zip(model.outputs, map(jax.tree.leaves, results), strict=True):
                    if any(isinstance(leaf, np.ndarray) for leaf in leaves):
                        raise NotStaticError(f"output {info.name!r} holds strings, which jax.jit cannot give")
                return results

            self.functions[key] = _Trimmed(compiled)
        return self.functions[key]


class _Trimmed:
    """A jitted function that gives the compiler's memory back before it runs first: with a ViT of 97 MB, 30 MB that the
    C library would keep beside the arrays of that call."""

    def __init__(self, jitted: Any):
        self.jitted = jitted
        self.compiled: set[Any] = set()

    def __call__(self, params: Any, inputs: Any) -> Any:
        leaves, structure = jax.tree.flatten(inputs)  # the parameters are always the model's own
        key = structure, tuple((np.shape(x), x.dtype) for x in leaves)
        if key not in self.compiled:
            self.jitted.lower(params, inputs).compile()  # which the call then finds
            device.release_freed_memory()
            self.compiled.add(key)
        return self.jitted(params, inputs)


def _key(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return tuple(_key(v) for v in value)
    array = np.asarray(value)
    content = tuple(array.reshape(-1)) if array.dtype == object else array.tobytes()
    return array.dtype.str, array.shape, content


def _as_array(value: Any) -> Any:
    return value if value is None or isinstance(value, jax.Array | list | tuple) else np.asarray(value)


def _is_numeric(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_numeric(v) for v in value)
    return value is not None and np.asarray(value).dtype.kind not in "OUS"


def _leaf(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_leaf(v) for v in value]
    if value is None or isinstance(value, jax.Array):
        return value
    array = np.asarray(value)
    return array.astype(object) if array.dtype.kind in "OUS" else jnp.asarray(array)


def _check_width(name: str, value: Any) -> None:
    """Raises where JAX would wrap 64-bit integers around, silently, to make 32-bit ones of them."""
    is_wide = isinstance(value, np.ndarray) and value.dtype.kind in "iu" and value.dtype.itemsize == 8 and value.size
    if not is_wide or dtypes.held(value.dtype) == value.dtype:
        return
    limits = np.iinfo(dtypes.held(value.dtype))
    if value.min() < limits.min or value.max() > limits.max:
        raise OnnxError(
            f"input {name!r} holds {value.min()} to {value.max()}, which needs 64 bits: turn jax_enable_x64 on, or "
            f"make the input static, load(static=[{name!r}])"
        )


def _check(info: ValueInfo, value: jax.Array) -> None:
    """Raises where the array cannot be what the file declares. Widths of floats and integers may differ."""
    if info.type.kind != "tensor":
        return
    if info.shape is not None:
        fits = len(info.shape) == value.ndim and all(
            not isinstance(d, int) or d == s for d, s in zip(info.shape, value.shape, strict=True)
        )
        if not fits:
            raise OnnxError(f"input {info} got an array of shape {value.shape}")
    if info.dtype is not None and _family(info.dtype) != _family(np.dtype(value.dtype)):
        raise OnnxError(f"input {info} got an array of {value.dtype}; convert it first")


def _family(dtype: np.dtype) -> str:
    if dtype.kind in "bcO":
        return dtype.kind
    return "float" if jnp.issubdtype(dtype, jnp.floating) else "integer"


def _result(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_result(v) for v in value]
    if isinstance(value, np.ndarray | np.generic) and value.dtype != np.object_:
        return jnp.asarray(value)
    return value
