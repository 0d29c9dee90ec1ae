"""From a primitive to StableHLO: the only place that makes custom calls.

The default lowering of `call_p` is the reference. For cpu and cuda it is the native kernel's custom call, where the
module is loaded and the kernel supports the case; else the reference again.

Sharding: the custom call carries a Shardy rule and `num_batch_dims`, and its target is registered as batch
partitionable, so that batch dimensions stay sharded without an all-gather. The partitioner slices the leading
`num_batch_dims` dimensions of EVERY operand whose rank reaches that number, also of one that does not have them (seen
on CPU and GPU, jax 0.10.2 to 0.12: garbage, no error). So, when a module is compiled for several devices, operands
that the batch shares are flattened to rank 1, below two batch dimensions, and operands with some batch sizes of 1 are
broadcast to the full batch, as are all of a call with one batch dimension. Handlers check all sizes against each other.
"""

from __future__ import annotations

import functools as ft
import logging
import string
import threading
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.interpreters import mlir

from zenith_jax import native
from zenith_jax.errors import Refusal
from zenith_jax.ir import _compat
from zenith_jax.ops._op import Kernel, Spec, call_p, is_absent, tangent_p, tangents_of

logger = logging.getLogger("zenith_jax")


def _reference(*operands: Any, kernel: Kernel, attributes: tuple) -> tuple[Any, ...]:
    return tuple(kernel.reference(*operands, **dict(attributes)))


@ft.cache
def _has_gpu() -> bool:
    try:
        return bool(jax.devices("cuda"))
    except RuntimeError:
        return False


def unavailable(platform: str) -> Refusal | None:
    """Why no kernel of the platform can be called from this process, or None.

    Lowering for cuda on a host without a GPU (export, tests) is cross-compilation: the call is made by name.
    """
    if platform not in ("cpu", "cuda"):
        return Refusal("there are no kernels for {platform}", dict(platform=platform))
    if platform == "cuda" and not _has_gpu():
        return None
    reason = native.unavailable_reason(platform)
    return Refusal("{reason}", dict(reason=reason)) if reason else None


@ft.cache
def _launch(device: Any) -> tuple[int, bool] | None:
    module = native.module("cuda")
    make_target = getattr(module, "compute_stream_target", None)
    if make_target is None or not hasattr(module, "wait_for_stream"):  # a development build from before
        return None
    jax.ffi.register_ffi_target("zenith_compute_stream", make_target(), platform=native.PLATFORMS["cuda"])
    call = jax.ffi.ffi_call("zenith_compute_stream", jax.ShapeDtypeStruct((4,), jnp.uint32))
    words = np.asarray(jax.jit(call, out_shardings=jax.sharding.SingleDeviceSharding(device))()).tolist()
    stream, thread = (high << 32 | low for low, high in (words[:2], words[2:]))
    return stream, thread == threading.get_ident()


def compute_stream(device: Any) -> int | None:
    """The CUDA stream on which JAX's programs run on a GPU; None where the native module is not there to say.

    PjRt has one for each device, but for threads that ask for another (`_compat.execution_stream_id`).
    """
    launch = _launch(device)
    return launch[0] if launch is not None else None


def is_launched_by_caller(device: Any) -> bool:
    """Whether all of a program is in `compute_stream` when its call returns, as with jax 0.11.2: the thread that calls
    puts it there. False where another thread does, or where that is not known."""
    launch = _launch(device)
    return launch is not None and launch[1]


# The call would have the sizes as one more operand, which the sharding rule does not count, and attributes that are
# computed from sizes would have no value.
_SYMBOLIC = Refusal("a dimension is symbolic, a kernel is called with sizes")

_SPLIT = Refusal("XLA splits it over the devices of the program")


def _native(platform: str, ctx: Any, *operands: Any, kernel: Kernel, attributes: tuple) -> Sequence[Any]:
    symbolic = any(not isinstance(n, int) for a in (*ctx.avals_in, *ctx.avals_out) for n in a.shape)
    partitions = _compat.partition_count(ctx.module_context)
    refusal = (
        unavailable(platform)
        or (_SYMBOLIC if symbolic else None)
        or (_SPLIT if partitions > 1 and not kernel.partitioned else None)
        or kernel.supports(ctx.avals_in, platform, **dict(attributes))
    )
    if refusal is not None:
        logger.info("%s runs as XLA code on %s: %s", kernel.name, platform, refusal)
        return mlir.lower_fun(_reference, multiple_results=True)(ctx, *operands, kernel=kernel, attributes=attributes)
    if (lowered := kernel.lowered) is not None:
        function = lambda *xs: lowered(xs, partitions, **dict(attributes))  # noqa: E731
        return mlir.lower_fun(function, multiple_results=True)(ctx, *operands)
    if platform == "cpu" or _has_gpu():
        native.ensure_registered(platform)
    adapted = _reshaped(ctx, operands, lambda *xs: list(kernel.adapted(xs, platform, **dict(attributes))))
    full = _reshaped(*adapted, lambda *xs: _broadcast_batches(kernel, xs, partitions))
    attrs = kernel.ffi_attributes(full[0].avals_in, **dict(attributes))
    flat = _reshaped(*full, lambda *xs: _flatten_shared(kernel, xs, partitions))
    if platform == "cpu" and partitions == 1 and (changed := kernel.shapes_in_layout(attrs)) is not None:
        return _call_in_layout(*flat, kernel, attributes, attrs | changed)
    return _custom_call(*flat, kernel, attributes, attrs)


def _reshaped(ctx: Any, operands: Sequence[Any], function: Any) -> tuple[Any, list[Any]]:
    """Lowers `function`, which gives operands other shapes; returns the context and values that follow."""
    results = jax.eval_shape(function, *(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in ctx.avals_in))
    if all(a.shape == r.shape for a, r in zip(ctx.avals_in, results, strict=True)):
        return ctx, list(operands)
    avals = [
        a if a.shape == r.shape else _compat.shaped_like(a, r.shape, r.dtype, (None,) * len(r.shape))
        for a, r in zip(ctx.avals_in, results, strict=True)
    ]
    values = mlir.lower_fun(function, multiple_results=True)(ctx.replace(avals_out=avals), *operands)
    values = [v[0] if isinstance(v, (list, tuple)) else v for v in values]
    return ctx.replace(avals_in=avals), values


def _broadcast_batches(kernel: Kernel, operands: Sequence[Any], partitions: int) -> list[Any]:
    """Optional operands in a form that the kernel reads: it has one stride for all batch dimensions but the last, so
    that either all of these are full, or all are 1, unless it is `strided`. With several partitions, batch sizes are
    all full or all 1."""
    if kernel.strided and partitions == 1:
        return list(operands)
    rank = kernel.signature.batch_rank([x.shape for x in operands])
    batch = operands[0].shape[:rank]

    def broadcast(x: Any) -> Any:
        mixed = any(n != 1 for n in x.shape[: rank - 1]) and x.shape[: rank - 1] != batch[:-1]
        shared = all(n == 1 for n in x.shape[:rank]) and rank > 1  # that is flattened below a rank of 2, and 1 is none
        partial = not shared and x.shape[:rank] != batch
        if mixed or (partitions > 1 and partial):
            last = batch[-1] if partitions > 1 else x.shape[rank - 1]
            return jnp.broadcast_to(x, (*batch[:-1], last, *x.shape[rank:]))
        return x

    return [
        broadcast(x) if spec.optional and spec.batched and not is_absent(x) else x
        for spec, x in zip(kernel.signature.operands, operands, strict=True)
    ]


def _flatten_shared(kernel: Kernel, operands: Sequence[Any], partitions: int) -> list[Any]:
    """With several partitions, optional operands that the whole batch shares as rank 1 (see the module's text)."""
    rank = kernel.signature.batch_rank([x.shape for x in operands])

    def is_shared(spec: Spec, x: Any) -> bool:
        return rank > 1 and spec.optional and spec.batched and not is_absent(x) and all(n == 1 for n in x.shape[:rank])

    def flattened(x: Any) -> Any:
        sharding = _compat.explicit_sharding(jax.typeof(x))
        return _compat.resharded(x, sharding and sharding.update(spec=())).reshape(-1)

    return [
        flattened(x) if partitions > 1 and is_shared(spec, x) else x
        for spec, x in zip(kernel.signature.operands, operands, strict=True)
    ]


def _custom_call(
    ctx: Any, operands: Sequence[Any], kernel: Kernel, attributes: tuple, ffi_attributes: dict[str, Any]
) -> Sequence[Any]:
    signature = kernel.signature
    shapes = [a.shape for a in ctx.avals_in]
    rank = signature.batch_rank(shapes)
    operand_layouts = result_layouts = None
    if kernel.layouts is not None:
        orders = kernel.layouts(rank, **dict(attributes))
        # jax.ffi.ffi_lowering reads tuples as minor-to-major.
        operand_layouts, result_layouts = (
            [None if o is None or len(o) != a.ndim else tuple(reversed(o)) for o, a in zip(side, avals, strict=True)]
            for side, avals in zip(orders, (ctx.avals_in, ctx.avals_out), strict=True)
        )
    rule, replicated = _sharding_rule(signature.operands, signature.results, shapes, rank)
    result_types = [mlir.aval_to_ir_type(ctx.module_context, a) for a in ctx.avals_out]
    extra = {
        "mhlo.frontend_attributes": mlir.ir_attribute({"num_batch_dims": str(rank)}),
        "sdy.sharding_rule": _compat.sharding_rule_attribute(
            rule, replicated, [v.type for v in operands], result_types
        ),
    }
    lowering = jax.ffi.ffi_lowering(
        native.target(kernel.name),
        operand_layouts=operand_layouts,
        result_layouts=result_layouts,
        extra_attributes=extra,
        operand_output_aliases=dict(kernel.in_place) or None,
    )
    return lowering(ctx, *operands, **ffi_attributes)


def _call_in_layout(
    ctx: Any, operands: Sequence[Any], kernel: Kernel, attributes: tuple, ffi_attributes: dict[str, Any]
) -> Sequence[Any]:
    """As `_custom_call` on one device, but that the transposes which give operands their layouts are written out, and
    removed by XLA together with the program's own. XLA's CPU compiler takes layouts for copies: those of queries and
    results with jaxlib 0.10.2, of keys and values too with 0.12. Attention b16 h12 s128 d32, two cores, 0.10.2: 4.2 ms
    with copies, 3.4 without; 0.12: 9.8 and 3.6."""
    assert kernel.layouts is not None
    rank = kernel.signature.batch_rank([a.shape for a in ctx.avals_in])
    orders = [
        [o if o is not None and len(o) == a.ndim else tuple(range(a.ndim)) for o, a in zip(side, avals, strict=True)]
        for side, avals in zip(kernel.layouts(rank, **dict(attributes)), (ctx.avals_in, ctx.avals_out), strict=True)
    ]
    given, results = (
        [_compat.shaped_like(a, [a.shape[i] for i in o], a.dtype, (None,) * a.ndim) for o, a in zip(*side, strict=True)]
        for side in zip(orders, (ctx.avals_in, ctx.avals_out), strict=True)
    )

    def transposed(context: Any, values: Sequence[Any], by: Sequence[Any]) -> list[Any]:
        function = lambda *xs: [jnp.transpose(x, o) for x, o in zip(xs, by, strict=True)]  # noqa: E731
        found = mlir.lower_fun(function, multiple_results=True)(context, *values)
        return [v[0] if isinstance(v, (list, tuple)) else v for v in found]

    values = transposed(ctx.replace(avals_out=given), operands, orders[0])
    lowering = jax.ffi.ffi_lowering(native.target(kernel.name), operand_output_aliases=dict(kernel.in_place) or None)
    found = lowering(ctx.replace(avals_in=given, avals_out=results), *values, **ffi_attributes)
    inverses = [tuple(int(i) for i in np.argsort(o)) for o in orders[1]]
    return transposed(
        ctx.replace(avals_in=results), [v[0] if isinstance(v, (list, tuple)) else v for v in found], inverses
    )


def _sharding_rule(
    operands: Sequence[Spec], results: Sequence[Spec], shapes: Sequence[tuple[int, ...]], rank: int
) -> tuple[str, list[str]]:
    """A Shardy rule in which batch dimensions propagate and all other dimensions must be whole."""
    fresh = iter(string.ascii_lowercase + string.ascii_uppercase)
    batch = [next(fresh) for _ in range(rank)]
    letters: dict[str, str] = {}
    replicated: list[str] = []

    def new_factor() -> str:
        replicated.append(next(fresh))
        return replicated[-1]

    def factors(spec: Spec, shape: tuple[int, ...] | None) -> str:
        if shape is not None and len(shape) != rank * spec.batched + len(spec.axes):  # flattened or absent
            return new_factor()
        named = []
        for position, axis in enumerate(spec.axes):
            broadcast = shape is not None and spec.optional and shape[rank * spec.batched + position] == 1
            if broadcast:
                named.append(new_factor())
            else:
                if axis not in letters:
                    letters[axis] = new_factor()
                named.append(letters[axis])
        leading = []
        for position in range(rank * spec.batched):
            broadcast = shape is not None and spec.optional and shape[position] == 1
            leading.append(new_factor() if broadcast else batch[position])
        return " ".join([*leading, *named])

    left = [factors(s, shape) for s, shape in zip(operands, shapes, strict=True)]
    right = [factors(s, None) for s in results]
    rule = f"{', '.join(left)} -> {', '.join(right)}"
    order = [c for c in rule if c.isalpha()]
    return rule, sorted(replicated, key=order.index)  # Shardy wants special factors in factor order


mlir.register_lowering(call_p, mlir.lower_fun(_reference, multiple_results=True))
mlir.register_lowering(tangent_p, mlir.lower_fun(tangents_of, multiple_results=True))
for _platform in ("cpu", "cuda"):
    mlir.register_lowering(call_p, ft.partial(_native, _platform), platform=_platform)
