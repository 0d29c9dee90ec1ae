"""Everything that differs between JAX versions, and every private name of JAX that Zenith uses.

Supported: jax 0.10.2 to 0.12. What changed between them that matters here:
  0.11  ClosedJaxpr and Jaxpr became one class; `j.jaxpr` returns `j` itself.
  0.11  scan's params num_consts/num_carry became ft_in/ft_out (never read here: sub-jaxprs are swapped whole).
"""

from __future__ import annotations

import ctypes
import functools as ft
import itertools
import math
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax._src import config as _config
from jax._src import core as _core
from jax._src.custom_partitioning_sharding_rule import (
    sdy_sharding_rule_to_mlir,
    str_to_sdy_sharding_rule,
)
from jax._src.interpreters import ad as _ad
from jax._src.lib import _jax, jaxlib_extension_version, xla_client
from jax._src.lib.mlir import ir
from jax._src.source_info_util import register_exclusion as _register_exclusion
from jax._src.source_info_util import user_frames as _user_frames
from jax.experimental import layout
from jax.extend.core import ClosedJaxpr, Jaxpr, Primitive
from jax.interpreters import ad, batching, mlir

if TYPE_CHECKING:  # JAX types avals as AbstractValue, which has no shape; all that reach Zenith have one

    class Var:
        aval: Any

        def __init__(self, aval: Any) -> None: ...

    class DropVar(Var): ...

    class Literal:
        aval: Any
        val: Any

    class JaxprEqn:
        primitive: Any
        invars: list[Any]
        outvars: list[Any]
        params: dict[str, Any]
        effects: Any
        source_info: Any

        def replace(self, **changes: Any) -> JaxprEqn: ...

else:
    from jax.extend.core import DropVar, JaxprEqn, Literal, Var

MERGED = ClosedJaxpr is Jaxpr
DLPACK_CPU, DLPACK_CUDA = 1, 2  # DLDeviceType, dlpack.h

__all__ = [
    "ClosedJaxpr",
    "DropVar",
    "Jaxpr",
    "JaxprEqn",
    "Literal",
    "Primitive",
    "Var",
    "ad",
    "batching",
    "mlir",
]


# --- jaxprs -----------------------------------------------------------------------------------------------------------


def is_jaxpr(x: Any) -> bool:
    return isinstance(x, (Jaxpr, ClosedJaxpr))


def opened(jaxpr: Any) -> Any:
    """The open jaxpr inside `jaxpr`."""
    return jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) and not MERGED else jaxpr


def constants(jaxpr: Any) -> Sequence[Any]:
    """Values of `opened(jaxpr).constvars`; empty for an open jaxpr of 0.10 (whose constvars have no values)."""
    return getattr(jaxpr, "consts", ())


def rebuilt(
    jaxpr: Any,
    eqns: Sequence[JaxprEqn],
    outvars: Sequence[Any],
    constvars: Sequence[Any] | None = None,
    consts: Sequence[Any] | None = None,
    invars: Sequence[Var] | None = None,
) -> Any:
    """`jaxpr` with other equations and outputs (constants and inputs, when given), open or closed as it was."""
    old = opened(jaxpr)
    effects = _core.join_effects(*(e.effects for e in eqns)) if eqns else _core.no_effects
    changes: dict[str, Any] = dict(eqns=list(eqns), outvars=list(outvars), effects=effects, debug_info=old.debug_info)
    if invars is not None:  # whose names, and those of the outputs, are no longer the function's
        changes["invars"] = list(invars)
        changes["debug_info"] = old.debug_info._replace(arg_names=None, result_paths=None)
    if constvars is None:
        constvars, consts = old.constvars, constants(jaxpr)
    consts = list(consts or ())
    changes["constvars"] = list(constvars or ())
    if MERGED:
        return old.replace(**changes, consts=consts)
    new = old.replace(**changes)
    return ClosedJaxpr(new, consts) if isinstance(jaxpr, ClosedJaxpr) else new


def closed(jaxpr: Any) -> Any:
    """`jaxpr` as something `jax.extend.core.jaxpr_as_fun` takes."""
    return jaxpr if MERGED or isinstance(jaxpr, ClosedJaxpr) else ClosedJaxpr(jaxpr, ())


def map_subjaxprs(params: dict[str, Any], function: Callable[[Any], Any]) -> dict[str, Any]:
    """Params of an equation with `function` applied to every jaxpr directly in them."""

    def mapped(value: Any) -> Any:
        if is_jaxpr(value):
            return function(value)
        if isinstance(value, tuple) and any(is_jaxpr(v) for v in value):
            values = [function(v) if is_jaxpr(v) else v for v in value]
            return type(value)(*values) if hasattr(value, "_fields") else tuple(values)
        return value

    return {name: mapped(value) for name, value in params.items()}


def function_source(jaxpr: Any) -> str:
    """Name, file and line of the function that was traced to `jaxpr`; "" when unknown."""
    return getattr(getattr(opened(jaxpr), "debug_info", None), "func_src_info", "") or ""


def is_high(jaxpr: Any) -> bool:
    """Whether the jaxpr holds hijax types or primitives, which Zenith leaves alone."""
    return bool(getattr(opened(jaxpr), "is_high", False))


def evaluated(eqn: JaxprEqn, operands: Sequence[Any]) -> Sequence[Any]:
    """Results of the equation's primitive on values."""
    params = eqn.primitive.get_bind_params(eqn.params)
    functions, params = params if isinstance(params, tuple) else ((), params)  # a pair until jax 0.10
    results = eqn.primitive.bind(*functions, *operands, **params)
    return results if eqn.primitive.multiple_results else [results]


def new_var(aval: Any) -> Var:
    return Var(aval)


def hide_frames(*paths: str) -> None:
    """Functions in these files and folders are no user's code: tracebacks, reports and the metadata of compiled
    programs name the line that called them."""
    for path in paths:
        _register_exclusion(path)


def is_default_precision(product: JaxprEqn) -> bool:
    """Whether a dot_general leaves its precision to XLA, which takes TensorFloat-32 for float32 on a GPU."""
    precision = product.params["precision"]
    both = precision if isinstance(precision, tuple) else (precision,)
    return all(p in (None, jax.lax.Precision.DEFAULT, jax.lax.DotAlgorithmPreset.DEFAULT) for p in both)


def source_line(eqn: JaxprEqn) -> str:
    """file:line of the user's code that made the equation: the innermost frame outside of installed packages. Without
    one the scopes it was made in, which are the layers of a model that a package calls; else the innermost frame that
    JAX shows; "" when unknown."""
    frames = list(_user_frames(eqn.source_info.traceback))
    own = [f"{f.file_name}:{f.start_line}" for f in frames if "site-packages" not in f.file_name]
    shown = [f"{f.file_name}:{f.start_line}" for f in frames]
    return next((place for place in (*own, str(eqn.source_info.name_stack), *shown) if place), "")


# --- types ------------------------------------------------------------------------------------------------------------


def varying_axes(x: Any) -> frozenset[str]:
    """Manual mesh axes along which `x` differs (inside `shard_map` with check_vma), else empty."""
    manual = getattr(jax.typeof(x), "manual_axis_type", None)
    return frozenset(manual.varying) if manual is not None else frozenset()


def vary_alike(operands: Iterable[Any]) -> list[Any]:
    """Operands cast to vary over the union of their manual axes; transposing the cast inserts the psum."""
    operands = list(operands)
    union = frozenset().union(*map(varying_axes, operands)) if operands else frozenset()
    if not union:
        return operands

    def cast(x: Any) -> Any:
        missing = tuple(sorted(union - varying_axes(x)))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return [cast(x) for x in operands]


def shaped_like(aval: Any, shape: Sequence[int], dtype: Any, specs: Sequence[Any]) -> Any:
    """An aval of `shape` and `dtype` in the mesh context of `aval`, sharded by `specs` (one a dimension)."""
    mesh = jax.sharding.get_abstract_mesh()
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*specs))
    return aval.update(shape=tuple(shape), dtype=np.dtype(dtype), weak_type=False, sharding=sharding)


def struct(aval: Any) -> jax.ShapeDtypeStruct:
    """What `jax.make_jaxpr` takes for an argument of type `aval`, its sharding and manual axes included."""
    more: dict[str, Any] = {}
    sharding = getattr(aval, "sharding", None)
    if sharding is not None and not sharding.mesh.empty:
        more["sharding"] = sharding
        manual = getattr(aval, "manual_axis_type", None)
        if manual is not None:
            more["manual_axis_type"] = manual
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=aval.weak_type, **more)


def explicit_spec(aval: Any) -> tuple[Any, ...]:
    """The mesh axes of each dimension of `aval` under Explicit sharding; Nones otherwise."""
    sharding = getattr(aval, "sharding", None)
    if sharding is None or sharding.mesh.empty:
        return (None,) * aval.ndim
    spec = tuple(sharding.spec)
    return spec + (None,) * (aval.ndim - len(spec))


def explicit_sharding(aval: Any) -> Any | None:
    """The sharding of `aval` where its mesh has Explicit axes, else None."""
    sharding = getattr(aval, "sharding", None)
    if sharding is None or sharding.mesh.empty:
        return None
    return sharding if jax.sharding.AxisType.Explicit in sharding.mesh.axis_types else None


def resharded(x: Any, sharding: Any | None) -> Any:
    """x with the explicit sharding, if one is given and x has another."""
    if sharding is None or explicit_sharding(jax.typeof(x)) == sharding:
        return x
    return jax.sharding.reshard(x, sharding)


def partition_count(module_context: Any) -> int:
    """Over how many devices the partitioner will split the module being lowered."""
    context = module_context.axis_context
    if hasattr(context, "mesh") and hasattr(context, "manual_axes"):  # inside shard_map
        auto = [n for name, n in context.mesh.shape.items() if name not in context.manual_axes]
        return int(np.prod(auto, dtype=np.int64))
    return int(getattr(context, "num_devices", 1) or 1)


def sharding_rule_attribute(
    rule: str, replicated: Sequence[str], operand_types: Sequence[Any], result_types: Sequence[Any]
) -> Any:
    """The `sdy.sharding_rule` attribute of a custom call: rule "a b c, c -> a b c" in einsum-like notation."""
    parsed = str_to_sdy_sharding_rule(rule, need_replication_factors=tuple(replicated))
    return sdy_sharding_rule_to_mlir(parsed, list(operand_types), list(result_types))


# --- differentiation inside a traced function -------------------------------------------------------------------------


_HOOKED = "__zenith_hooked__"


def array_from_dlpack(capsule: Any, device: Any, stream: int | None) -> jax.Array:
    """The memory of a DLPack capsule as an array: `jax.dlpack.from_dlpack` without the 25 us around its core.

    Keeps 64-bit types, where the public function narrows them by a copy. Memory that is aligned to less than 64 bytes
    is copied. stream: of the device, for which the producer made the capsule; None: nothing is to be waited for.
    """
    on_gpu = device.platform == "gpu"
    kind = (DLPACK_CUDA if on_gpu else DLPACK_CPU,) if jaxlib_extension_version >= 467 else ()
    return _jax.dlpack_managed_tensor_to_buffer(capsule, device, stream, None, *kind)


def abstract(shape: Sequence[int], dtype: Any) -> Any:
    """The type of an array."""
    return _core.ShapedArray(tuple(shape), dtype)


def array_of_numpy(x: np.ndarray, aval: Any, sharding: Any, device: Any) -> jax.Array:
    """`jax.device_put(x, sharding)`, of one device, in 3 us for 32: x must have the type `aval`, of `abstract`."""
    return xla_client.batched_device_put(aval, sharding, [x], [device])


def array_at(address: int, shape: Sequence[int], dtype: Any, sharding: Any, device: Any) -> jax.Array:
    """An array in memory that it does not own, of the host; a copy where JAX wants it aligned otherwise."""
    dtype = np.dtype(dtype)
    memory = (ctypes.c_ubyte * (math.prod(shape) * dtype.itemsize)).from_address(address)
    view = np.frombuffer(memory, dtype).reshape(shape)
    return array_of_numpy(view, abstract(shape, dtype), sharding, device)


def dlpack_of_array(array: jax.Array, stream: int | None) -> Any:
    """A DLPack capsule of an array on one device: `array.__dlpack__` without the 10 us around its core.

    stream: of the device, made to wait until the array is computed; None on the CPU, where the caller waits.
    """
    return _jax.buffer_to_dlpack_managed_tensor(array, stream=stream)


# () -> the number of this thread's stream for programs, 0 being the usual one.
execution_stream_id: Callable[[], int] = getattr(_jax, "get_execution_stream_id", lambda: 0)


def install_linearize_hook(
    fuse_primal: Callable[[Callable], Callable], is_active: Callable[[], bool], disabled: Callable
) -> str | None:
    """Makes reverse-mode differentiation fuse the primal before it is differentiated.

    `jax.grad`, `jax.vjp`, `nnx.value_and_grad` and equinox's filters all reach `ad.linearize(..., is_vjp=True)`;
    forward mode reaches `ad.jvp`, inside which nothing is fused. Both are module attributes that callers look up
    at each call. Returns None, or why this JAX cannot be hooked.
    """
    plain_linearize, plain_jvp = _ad.linearize, _ad.jvp
    if hasattr(plain_linearize, _HOOKED):
        return None

    @ft.wraps(plain_linearize)
    def linearize(function: Callable, *args: Any, **kwargs: Any) -> Any:
        if not kwargs.get("is_vjp") or not is_active():
            return plain_linearize(function, *args, **kwargs)
        return plain_linearize(fuse_primal(function), *args, **kwargs)

    @ft.wraps(plain_jvp)
    def jvp(function: Callable, *args: Any, **kwargs: Any) -> Any:
        if not is_active():
            return plain_jvp(function, *args, **kwargs)
        return plain_jvp(disabled(function), *args, **kwargs)

    setattr(linearize, _HOOKED, True)
    _ad.linearize, _ad.jvp = linearize, jvp
    return None


def warn_hook_missing(reason: str) -> None:
    warnings.warn(
        f"zenith: jax.grad inside a decorated function is not fused with jax {jax.__version__}: {reason}. "
        "Write jax.grad(zenith.fuse(loss)) instead, which needs no hook.",
        stacklevel=2,
    )


# --- execution --------------------------------------------------------------------------------------------------------


# The kinds of command that XLA has in graphs by default, but for collectives (0.10.2 to 0.12).
_XLAS_COMMANDS = "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION,CONDITIONAL"


def least_launches(lowered: Any, platform: str) -> Any:
    """Options to compile a `jax.stages.Lowered` with: as much as can be in CUDA graphs, from 1 kernel on, 5 by default.

    Convolutions too, which XLA's default leaves out: of a program that has some the host is done in half of the time
    (MNIST's CNN of 64 images 64 us for 104, ResNet-50 of one 0.49 ms for 1.15 on an H100, docs/performance.md).
    """
    if platform != "cuda":
        return None
    options: dict[str, Any] = {"xla_gpu_graph_min_graph_size": 1}
    kinds = "xla_gpu_enable_command_buffer"
    if kinds not in os.environ.get("XLA_FLAGS", "") and _has_convolution(lowered):
        options[kinds] = _XLAS_COMMANDS + ",CONVOLUTION"
    return options


def _has_convolution(lowered: Any) -> bool:
    found = False

    def look(op: Any) -> Any:
        nonlocal found
        found = op.name == "stablehlo.convolution"
        return ir.WalkResult.INTERRUPT if found else ir.WalkResult.ADVANCE

    lowered.compiler_ir("stablehlo").operation.walk(look)
    return found


# Of one array, for which a copy in another order is worth its memory: a filter of 3 x 3 x 1024 x 1024 float32s.
_MOST_RELAID_BYTES = 36 << 20


def free_layouts(structs: Sequence[Any], platform: str) -> list[Any] | None:
    """For in_shardings: leaves it to XLA in what order it wants arrays of four and more dimensions, which are filters.
    None where nothing is to be left to it.

    On a GPU every convolution else brings its filters into its own order in each call.
    """
    free = [x.ndim >= 4 and _is_float(x) and x.size * x.dtype.itemsize <= _MOST_RELAID_BYTES for x in structs]
    if platform != "cuda" or not any(free):
        return None
    return [layout.Format(layout.Layout.AUTO) if f else None for f in free]


def _is_float(x: Any) -> bool:
    return jax.dtypes.issubdtype(x.dtype, np.floating)


def relaid(array: Any, wanted: Any) -> Any:
    """The array in the order that an executable wants, of whose `input_formats` this is one."""
    return array if wanted.layout in (None, array.format.layout) else jax.device_put(array, wanted)


_COLLECTED_CALLS = 1024


def direct_execution(compiled: Any, params: Sequence[jax.Array]) -> Callable[[Sequence[jax.Array]], list[Any]] | None:
    """inputs -> outputs of a `jax.stages.Compiled` of (list of params, list of inputs), its arguments not looked at.

    The caller sees to it that inputs are arrays of the compiled shapes and dtypes on the compiled device. None where
    the program has effects or several devices, or where this JAX has other internals: then call it as it is.
    """
    try:
        run = compiled._executable.unsafe_call
        executable, handlers = run.xla_executable, run.out_handler.handlers
        kept = sorted(run.kept_var_idx)
        unusual = (
            run.has_unordered_effects,
            run.ordered_effects,
            run.has_host_callbacks,
            run.mut,
            run.pgle_profiler,
            len(executable.local_devices()) != 1,
            _config.debug_nans.value or _config.debug_infs.value,
        )
        execute = executable.execute_sharded
        collect = _jax.collect_garbage
    except AttributeError:
        return None
    if any(unusual):
        return None
    bound = [params[i] for i in kept if i < len(params)]
    positions = [i - len(params) for i in kept if i >= len(params)]
    # What the runtime puts aside is let go of when Python collects garbage, which a loop of such calls never starts:
    # 180 bytes a call stayed, where jit's own calls leave nothing (jaxlib 0.10.2, CPU, 2026-11-27).
    number = itertools.count(1).__next__

    reads_all = positions == list(range(len(jax.tree.leaves(compiled.in_avals)) - len(params)))

    def call(inputs: Sequence[jax.Array]) -> list[Any]:
        if not number() % _COLLECTED_CALLS:
            collect()
        read = inputs if reads_all else [inputs[i] for i in positions]
        return execute([*bound, *read]).consume_with_handlers(handlers)

    return call
