"""The contract of an op: what a kernel is, and the two primitives through which JAX sees it.

A `Kernel` is one custom call: a signature, a reference in jnp, and what it can run on. Everything else is derived:

- shapes and errors, vmap and the sharding rule from the signature `"*b d, d -> *b d"`;
- the lowering where no kernel runs, forward-mode and higher derivatives from the reference;
- reverse mode from `backward`, which calls the backward kernel.

Signatures are written in canonical shapes. `*b` stands for the batch dimensions (one more with each vmap), over which
the kernel is independent, at least two of them where operands are shared by the whole batch; the other letters are
single dimensions. An operand without `*b` is shared by the whole batch and has rank 1. A result's letter that no
operand has is the attribute of that name. An operand marked `?` may be absent (shape (0,)) and may have size 1 along
any dimension; it is broadcast. A result with `*k` is summed over the batch, but for the dimensions that vmaps have put
in front: the attribute `kept` counts them.

Derivatives: `call_p`'s JVP binds `tangent_p`, a primitive linear in the tangents whose lowering is the reference's JVP
and whose transpose is the fused backward. So jvp, grad, hessian and any nesting of them work, and a reverse-mode pass
holds one fused forward and one fused backward call.
"""

from __future__ import annotations

import dataclasses
import functools as ft
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from zenith_jax.errors import Refusal, ShapeError
from zenith_jax.ir import _compat
from zenith_jax.ir._compat import Primitive, ad, batching

KERNEL_DTYPES = (jnp.float32, jnp.float16, jnp.bfloat16)
WIDENED = "widened"  # as the dtype of a result: that of `widened(first operand)`


KERNEL_NAMES: set[str] = set()  # of all that `kernel` declares, which is what custom calls are made of


@dataclasses.dataclass(frozen=True)
class Spec:
    """One operand or result of a signature."""

    axes: tuple[str, ...]  # letters after the batch dimensions
    batched: bool
    optional: bool = False  # may be absent, or of size 1 along any dimension
    summed: bool = False  # of a result: over the batch, but for what vmaps have put in front

    @classmethod
    def parse(cls, text: str) -> Spec:
        words = text.replace("?", "? ").split()
        return cls(
            axes=tuple(w for w in words if w not in ("?", "*b", "*k")),
            batched="*b" in words,
            optional="?" in words,
            summed="*k" in words,
        )


@dataclasses.dataclass(frozen=True)
class Signature:
    """`"*b d, d -> *b d"`."""

    text: str
    operands: tuple[Spec, ...]
    results: tuple[Spec, ...]

    @classmethod
    def parse(cls, text: str) -> Signature:
        operands, results = (tuple(Spec.parse(part) for part in side.split(",")) for side in text.split("->"))
        return cls(text, operands, results)

    def batch_rank(self, shapes: Sequence[tuple[int, ...]]) -> int:
        """Number of batch dimensions, read off the first operand."""
        return len(shapes[0]) - len(self.operands[0].axes)

    def bind_sizes(self, name: str, shapes: Sequence[tuple[int, ...]]) -> tuple[tuple[int, ...], dict[str, int]]:
        """Batch sizes and the size of each letter. Raises ShapeError where shapes contradict the signature."""
        rank = self.batch_rank(shapes)
        batch: tuple[int, ...] = tuple(shapes[0][:rank])
        sizes: dict[str, int] = {}
        for index, (spec, shape) in enumerate(zip(self.operands, shapes, strict=True)):
            if spec.optional and tuple(shape) == (0,):
                continue
            expected_rank = rank * spec.batched + len(spec.axes)
            if len(shape) != expected_rank:
                raise ShapeError(
                    f"{name}: operand {index} must have rank {expected_rank} ({self.text!r}), got shape {shape}"
                )
            expected = (*(batch if spec.batched else ()), *(sizes.get(a, -1) for a in spec.axes))
            for axis, (size, want) in enumerate(zip(shape, expected, strict=True)):
                if want == -1:
                    sizes[spec.axes[axis - rank * spec.batched]] = size
                elif size != want and not (spec.optional and size == 1):
                    raise ShapeError(
                        f"{name}: operand {index} must have size {want} along axis {axis} "
                        f"({self.text!r}), got shape {shape}"
                    )
        return batch, sizes

    def result_shapes(
        self, name: str, shapes: Sequence[tuple[int, ...]], attributes: Mapping[str, Any]
    ) -> list[tuple[int, ...]]:
        batch, sizes = self.bind_sizes(name, shapes)
        sizes = {a: attributes[a] for s in self.results for a in s.axes if a not in sizes} | sizes
        kept = attributes.get("kept", 0)
        return [(*batch[: leading(s, len(batch), kept)], *(sizes[a] for a in s.axes)) for s in self.results]


def leading(result: Spec, rank: int, kept: int) -> int:
    """How many of the `rank` batch dimensions a result has."""
    return rank if result.batched else kept if result.summed else 0


@dataclasses.dataclass(frozen=True, eq=False)
class Kernel:
    """One custom call and everything that JAX must know of it. Attributes are static keyword arguments.

    reference: (*operands, **attributes) -> tuple of results, in jnp; float32 inside for narrower dtypes.
    result_dtypes: for each result the index of the operand whose dtype it has, a dtype, or WIDENED.
    visible: the first results, those that callers see; cotangents reach only these.
    backward: (operands, results, cotangents, needed, **attributes) -> {operand index: cotangent}. Cotangents are those
    of visible results, some of them symbolic zeros: `dense` makes arrays of them.
    ffi_attributes: (operand avals, **attributes) -> attributes of the custom call; handlers check every size.
    layouts: (batch rank, **attributes) -> per operand and result a major-to-minor order or None for row-major.
    shapes_in_layout: of ffi_attributes, those to call with instead where shapes, too, are given in the order of the
    layouts; None where the handler cannot read that.
    supports: (operand avals, platform, **attributes) -> why the kernel cannot run, or None.
    in_place: (operand index, result index), where the kernel may write a result over an operand of its shape and dtype;
    XLA copies the operand first if it is needed later.
    adapted: (operands, platform, **attributes) -> operands of the same meaning that the platform's kernel takes.
    scratch: how many of the last results are room for the kernel to work in: hidden, and no residuals.
    saving: (operands, **attributes) -> the kernel that runs in the place of this one where it is differentiated, with
    the same visible results and more hidden ones, or None.
    linear: whether it is linear in its first operand: where only that moves, the tangent is the kernel of the tangent,
    and neither operand nor result is kept for the transpose, `backward` with None in the place of that operand.
    strided: whether the kernel reads optional operands with any of their batch sizes 1.
    partitioned: whether the call is made in a program for several devices; otherwise its reference, which XLA splits.
    merged: (operands, mapped dimensions) -> operands in which the mapped dimension is part of one that the kernel has
    anyway, and before which dimension of each result it is to be split off again; None for the derived rule.
    lowered: (operands, number of devices, **attributes) -> results, by calls of other kernels: what is lowered in the
    place of a call.
    """

    name: str
    signature: Signature
    reference: Callable[..., tuple[Any, ...]]
    result_dtypes: tuple[Any, ...]
    visible: int = 1
    scratch: int = 0
    backward: Callable[..., dict[int, Any]] | None = None
    ffi_attributes: Callable[..., dict[str, Any]] = lambda avals, **attributes: attributes
    layouts: Callable[..., tuple[list, list]] | None = None
    shapes_in_layout: Callable[[Mapping[str, Any]], dict[str, Any] | None] = lambda ffi_attributes: None
    supports: Callable[..., Refusal | None] = lambda avals, platform, **attributes: None
    in_place: tuple[tuple[int, int], ...] = ()
    adapted: Callable[..., Sequence[Any]] = lambda operands, platform, **attributes: operands
    saving: Callable[..., Kernel | None] = lambda operands, **attributes: None
    linear: bool = False
    strided: bool = False
    partitioned: bool = True
    merged: Callable[..., tuple[list[Any], int] | None] = lambda operands, dims: None
    lowered: Callable[..., Sequence[Any]] | None = None

    def __call__(self, *operands: Any, **attributes: Any) -> list[Any]:
        """All results, hidden ones too."""
        frozen = tuple(sorted(attributes.items()))
        # Reaches the compiled program's metadata, and so profiles: zenith.attention, zenith.attention_bwd.
        with jax.named_scope(f"zenith.{self.name.removesuffix('_fwd')}"):
            return call_p.bind(*_compat.vary_alike(operands), kernel=self, attributes=frozen)

    def __repr__(self) -> str:
        return self.name

    @property
    def residuals(self) -> tuple[Spec, ...]:
        """The results that `backward` gets."""
        return self.signature.results[: len(self.signature.results) - self.scratch]

    def visible_reference(self, *operands: Any, **attributes: Any) -> tuple[Any, ...]:
        return tuple(self.reference(*operands, **attributes))[: self.visible]


def kernel(name: str, signature: str, result_dtypes: Sequence[Any], **rest: Any) -> Callable[[Callable], Kernel]:
    """Decorates a reference: @kernel("softmax_fwd", "*b d -> *b d", (0,), backward=...)."""

    KERNEL_NAMES.add(name)

    def wrap(reference: Callable) -> Kernel:
        return Kernel(name, Signature.parse(signature), reference, tuple(result_dtypes), **rest)

    return wrap


def absent(dtype: Any = jnp.float32) -> jax.Array:
    """What stands for an optional operand that is not given."""
    return jnp.zeros((0,), dtype)


def is_absent(x: Any) -> bool:
    return tuple(x.shape) == (0,)


def dense(cotangents: Sequence[Any]) -> list[Any]:
    """Arrays in the place of symbolic zeros."""
    return [ad.instantiate_zeros(c) for c in cotangents]


def is_zero(cotangent: Any) -> bool:
    return type(cotangent) is ad.Zero


# --- call_p: (*operands) -> results -----------------------------------------------------------------------------------

call_p = Primitive("zenith_call")
call_p.multiple_results = True


def _result_dtype(dtype: Any, avals: Sequence[Any]) -> Any:
    if dtype == WIDENED:
        return jnp.promote_types(avals[0].dtype, jnp.float32)
    return avals[dtype].dtype if isinstance(dtype, int) else dtype


def _call_abstract(*avals: Any, kernel: Kernel, attributes: tuple) -> list[Any]:
    shapes = [a.shape for a in avals]
    rank, kept = kernel.signature.batch_rank(shapes), dict(attributes).get("kept", 0)
    batch_spec = _compat.explicit_spec(avals[0])[:rank]
    return [
        _compat.shaped_like(
            avals[0],
            shape,
            _result_dtype(dtype, avals),
            (*batch_spec[: leading(spec, rank, kept)], *(None for _ in spec.axes)),
        )
        for shape, dtype, spec in zip(
            kernel.signature.result_shapes(kernel.name, shapes, dict(attributes)),
            kernel.result_dtypes,
            kernel.signature.results,
            strict=True,
        )
    ]


def _call_jvp(primals: Sequence, tangents: Sequence, *, kernel: Kernel, attributes: tuple):
    live = tuple(i for i, t in enumerate(tangents) if type(t) is not ad.Zero)
    count = len(kernel.signature.results)
    if live:
        kernel = kernel.saving(primals, **dict(attributes)) or kernel
    results = call_p.bind(*primals, kernel=kernel, attributes=attributes)
    if not live:
        return results, [ad.Zero(jax.typeof(r).to_tangent_aval()) for r in results]
    live_tangents = [ad.instantiate_zeros(tangents[i]) for i in live]
    if kernel.linear and live == (0,):
        return results, call_p.bind(*live_tangents, *primals[1:], kernel=kernel, attributes=attributes)
    if kernel.backward is None:
        return results, list(_reference_jvp(kernel, attributes, live, primals, live_tangents, visible=False))
    # Named so that a remat policy can save them: the output and the log-sum-exp together; one alone still recomputes.
    residuals = [checkpoint_name(r, f"zenith_{kernel.name}") for r in results[: len(kernel.residuals)]]
    results = [*residuals, *results[len(residuals) :]]
    present, missing = _without_absent(kernel, primals)
    visible = tangent_p.bind(
        *present, *residuals, *live_tangents, kernel=kernel, attributes=attributes, live=live, missing=missing
    )
    hidden = [ad.Zero(jax.typeof(r).to_tangent_aval()) for r in results[kernel.visible :]]
    return results[:count], [*visible, *hidden][:count]


def _call_transpose(cotangents: Sequence, *operands: Any, kernel: Kernel, attributes: tuple):
    """Of the unknown operands: by the kernel, if that is linear in its first one and only this is unknown, else by the
    reference, which may be linear in any."""
    unknown = [i for i, x in enumerate(operands) if ad.is_undefined_primal(x)]
    if all(map(is_zero, cotangents)):
        return [None] * len(operands)
    if kernel.linear and unknown == [0]:
        assert kernel.backward is not None
        found = kernel.backward([None, *operands[1:]], None, list(cotangents), (0,), **dict(attributes))[0]
        sharding = _compat.explicit_sharding(operands[0].aval)
        return [_compat.resharded(found, sharding)] + [None] * (len(operands) - 1)

    def of_unknown(*values: Any) -> list[Any]:
        full = list(operands)
        for i, value in zip(unknown, values, strict=True):
            full[i] = value
        return list(kernel.reference(*full, **dict(attributes)))

    transpose = jax.linear_transpose(of_unknown, *(operands[i].aval for i in unknown))
    found = dict(zip(unknown, transpose(dense(cotangents)), strict=True))
    return [found.get(i) for i in range(len(operands))]


def _reference_jvp(
    kernel: Kernel, attributes: tuple, live: Sequence[int], operands: Sequence, tangents: Sequence, *, visible: bool
) -> Sequence[Any]:
    """Tangents of the reference's results along `tangents` of the `live` operands."""
    function = kernel.visible_reference if visible else kernel.reference

    def of_live(*values: Any) -> tuple[Any, ...]:
        full = list(operands)
        for i, value in zip(live, values, strict=True):
            full[i] = value
        return tuple(function(*full, **dict(attributes)))

    return jax.jvp(of_live, tuple(operands[i] for i in live), tuple(tangents))[1]


def _call_batch(args: Sequence, dims: Sequence, *, kernel: Kernel, attributes: tuple):
    if (merged := kernel.merged(args, dims)) is not None:
        operands, at = merged
        size = next(x.shape[d] for x, d in zip(args, dims, strict=True) if d is not None)
        results = call_p.bind(*operands, kernel=kernel, attributes=attributes)
        split = [r.reshape(*r.shape[:at], size, r.shape[at] // max(size, 1), *r.shape[at + 1 :]) for r in results]
        return split, (at,) * len(split)
    moved = _batch_to_front(kernel.signature.operands, args, dims)
    if moved is None:
        function = lambda *operands: kernel.reference(*operands, **dict(attributes))  # noqa: E731
        return jax.vmap(function, in_axes=tuple(dims))(*args), (0,) * len(kernel.signature.results)
    if any(spec.summed for spec in kernel.signature.results):
        attributes = tuple((name, value + 1 if name == "kept" else value) for name, value in attributes)
    results = call_p.bind(*moved, kernel=kernel, attributes=attributes)
    return results, (0,) * len(results)


def _batch_to_front(specs: Sequence[Spec], args: Sequence, dims: Sequence) -> list[Any] | None:
    """Operands with the mapped dimension as one more leading batch dimension.

    None if an operand that the batch shares is itself mapped: no kernel takes one such operand per batch entry.
    """
    size = next(x.shape[d] for x, d in zip(args, dims, strict=True) if d is not None)
    moved = []
    for spec, x, dim in zip(specs, args, dims, strict=True):
        if not spec.batched or (spec.optional and dim is None and is_absent(x)):
            if dim is not None:
                return None
            moved.append(x)
        elif dim is not None:
            moved.append(jnp.moveaxis(x, dim, 0))
        elif spec.optional:
            moved.append(x[None])
        else:
            moved.append(jnp.broadcast_to(x, (size, *x.shape)))
    return moved


call_p.def_abstract_eval(_call_abstract)
ad.primitive_jvps[call_p] = _call_jvp
ad.primitive_transposes[call_p] = _call_transpose
batching.primitive_batchers[call_p] = _call_batch


# --- tangent_p: (*operands, *residuals, *tangents of the live operands) -> tangents of the visible results ------------
#
# Absent operands are left out and named by the param `missing`, ((index, dtype), ...): operands and results become
# residuals, and XLA's partitioner crashes on a residual of size 0 that is sharded over devices (`jax.grad` of
# `jax.shard_map`, jaxlib 0.11.2).

tangent_p = Primitive("zenith_tangent")
tangent_p.multiple_results = True


def _without_absent(kernel: Kernel, operands: Sequence) -> tuple[list[Any], tuple[tuple[int, str], ...]]:
    """The operands that are there, and `missing`."""
    is_missing = [s.optional and is_absent(x) for s, x in zip(kernel.signature.operands, operands, strict=True)]
    present = [x for x, gone in zip(operands, is_missing, strict=True) if not gone]
    return present, tuple((i, np.dtype(operands[i].dtype).name) for i, gone in enumerate(is_missing) if gone)


def _split(kernel: Kernel, args: Sequence, missing: tuple) -> tuple[list[Any], list[Any], list[Any]]:
    """(operands that are there, results but for scratch, tangents)."""
    operands = len(kernel.signature.operands) - len(missing)
    results = operands + len(kernel.residuals)
    return list(args[:operands]), list(args[operands:results]), list(args[results:])


def _with_absent(operands: Sequence, missing: tuple) -> list[Any]:
    full = list(operands)
    for index, dtype in missing:  # in ascending order
        full.insert(index, absent(dtype))
    return full


def tangents_of(*args: Any, kernel: Kernel, attributes: tuple, live: tuple[int, ...], missing: tuple) -> Sequence[Any]:
    """What `tangent_p` computes, by the reference."""
    operands, _, tangents = _split(kernel, args, missing)
    return _reference_jvp(kernel, attributes, live, _with_absent(operands, missing), tangents, visible=True)


def _tangent_abstract(
    *avals: Any, kernel: Kernel, attributes: tuple, live: tuple[int, ...], missing: tuple
) -> list[Any]:
    del attributes, live
    return _split(kernel, avals, missing)[1][: kernel.visible]


def _tangent_jvp(primals: Sequence, tangents: Sequence, **params: Any):
    moving = [i for i, t in enumerate(tangents) if type(t) is not ad.Zero]

    def of_moving(*values: Any) -> Sequence[Any]:
        full = list(primals)
        for i, value in zip(moving, values, strict=True):
            full[i] = value
        return tangents_of(*full, **params)

    values = tuple(primals[i] for i in moving)
    directions = tuple(ad.instantiate_zeros(tangents[i]) for i in moving)
    return jax.jvp(of_moving, values, directions)


def _tangent_transpose(
    cotangents: Sequence, *args: Any, kernel: Kernel, attributes: tuple, live: tuple[int, ...], missing: tuple
):
    operands, results, tangents = _split(kernel, args, missing)
    needed = tuple(i for i, t in zip(live, tangents, strict=True) if ad.is_undefined_primal(t))
    assert kernel.backward is not None
    found = kernel.backward(
        _with_absent(operands, missing),
        results,
        list(cotangents),
        needed,
        **dict(attributes),
    )
    # With explicit mesh axes a cotangent has the sharding of its primal, also where the kernel had to have it whole.
    of_live = [
        _compat.resharded(found[i], _compat.explicit_sharding(t.aval)) if i in found and i in needed else found.get(i)
        for i, t in zip(live, tangents, strict=True)
    ]
    return [None] * (len(operands) + len(results)) + of_live


def _tangent_batch(
    args: Sequence, dims: Sequence, *, kernel: Kernel, attributes: tuple, live: tuple[int, ...], missing: tuple
):
    signature = kernel.signature
    gone = {i for i, _ in missing}
    present = [s for i, s in enumerate(signature.operands) if i not in gone]
    specs = [*present, *kernel.residuals, *(signature.operands[i] for i in live)]
    params = dict(kernel=kernel, attributes=attributes, live=live, missing=missing)
    moved = _batch_to_front(specs, args, dims)
    if moved is None:
        out = jax.vmap(ft.partial(tangents_of, **params), in_axes=tuple(dims))(*args)
    else:
        # An optional operand and its tangent, of which one is mapped, have one shape.
        numbers = [i for i in range(len(signature.operands)) if i not in gone]
        for at, i in enumerate(live, len(present) + len(kernel.residuals)):
            of = numbers.index(i)
            shape = np.broadcast_shapes(moved[of].shape, moved[at].shape)
            moved[of], moved[at] = (jnp.broadcast_to(moved[j], shape) for j in (of, at))
        out = tangent_p.bind(*moved, **params)
    return out, (0,) * len(out)


tangent_p.def_abstract_eval(_tangent_abstract)
ad.primitive_jvps[tangent_p] = _tangent_jvp
ad.primitive_transposes[tangent_p] = _tangent_transpose
batching.primitive_batchers[tangent_p] = _tangent_batch


@ft.lru_cache(maxsize=1024)
def _compiled(primitive: Any, params: tuple) -> Callable:
    return jax.jit(ft.partial(primitive.bind, **dict(params)))


for _primitive in (call_p, tangent_p):
    _primitive.def_impl(
        lambda *args, _primitive=_primitive, **params: _compiled(_primitive, tuple(params.items()))(*args)
    )


# --- canonical shapes -------------------------------------------------------------------------------------------------


def widened(x: Any) -> Any:
    """x in the dtype that references compute in: float32, or float64 for a float64 input."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def summed_to(x: Any, shape: tuple[int, ...]) -> Any:
    """x, summed over the axes along which an operand of `shape` was repeated."""
    return jnp.sum(x, [i for i, n in enumerate(shape) if n == 1 and x.shape[i] != 1], keepdims=True)


def as_batches(x: Any, inner: int) -> Any:
    """x with at least two batch dimensions before its last `inner` dimensions."""
    missing = max(0, 2 + inner - x.ndim)
    return x.reshape((1,) * missing + x.shape) if missing else x


def check_kernel_dtype(name: str, dtype: Any) -> Refusal | None:
    """Refusal for a dtype that no kernel computes in."""
    if np.dtype(dtype) in map(np.dtype, KERNEL_DTYPES):
        return None
    return Refusal(
        "{name} has no kernel for {dtype}",
        dict(name=name, dtype=np.dtype(dtype).name),
        "float32, float16 and bfloat16 have one",
    )
