"""Cases of every op, shared by tests/ops, and the comparison with formulas.py by error ratio.

A new op is one more function in formulas.py and one more line in CASES.
"""

from __future__ import annotations

import dataclasses
import functools as ft
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from formulas import (
    add_layer_norm,
    add_rms_norm,
    attention,
    conv,
    cross_entropy,
    gated,
    gated_by_the_second_half,
    gated_linear,
    gelu,
    group_norm,
    layer_norm,
    linear,
    paged_attention,
    quantized_linear,
    rms_norm,
    rope,
    silu,
    softmax,
)
from numerics import assert_error_ratio, in_float64

from zenith_jax import ops

SEED = 20260107
DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]


def zenith_attention(q, k, v, *more, **options):
    for x in more:
        options["mask" if x.dtype == bool else "sinks" if x.ndim == 1 else "bias"] = x
    return ops.attention(q, k, v, **options)


# --- cases ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    """shapes: of the operands, floats; masks, labels or integers where the shape is wrapped in `Mask`, `Labels` or
    `Integers`. shared: operands that all examples of a batch have in common."""

    op: str
    name: str
    function: Callable[..., Any]
    formula: Callable[..., Any]
    shapes: tuple[Any, ...]
    shared: tuple[int, ...] = ()

    def __str__(self) -> str:
        return f"{self.op} {self.name}"

    def arguments(self, dtype: Any = jnp.float32, seed: int = SEED) -> list[Any]:
        rng = np.random.default_rng(seed)
        return [
            jnp.asarray(rng.random(s.shape) < 0.7)
            if isinstance(s, Mask)
            else jnp.asarray(rng.integers(s.classes, size=s.shape), jnp.int32)
            if isinstance(s, Labels)
            else jnp.asarray(rng.integers(-8, 8, size=s.shape), s.dtype)
            if isinstance(s, Integers)
            else jnp.asarray(rng.normal(size=s) + (i in self.shared), dtype)
            for i, s in enumerate(self.shapes)
        ]


@dataclasses.dataclass(frozen=True)
class Mask:
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Labels:
    shape: tuple[int, ...]
    classes: int


@dataclasses.dataclass(frozen=True)
class Integers:
    """Of 4 bits, in any dtype."""

    shape: tuple[int, ...]
    dtype: Any


X, W = (3, 5, 37), (37,)  # no size a multiple of a vector's
Q, K, V = (2, 9, 4, 6), (2, 7, 4, 6), (2, 7, 4, 6)


SEGMENTS = np.array([[0, 0, 0, 1, 1, 3, 3, 3, 4], [2, 2, 2, 2, 1, 1, 1, 2, 2]])


def attention_case(name, *more, q=Q, k=K, v=V, shared=(), **options):
    functions = (ft.partial(f, **options) for f in (zenith_attention, attention))
    return Case("attention", name, *functions, (q, k, v, *more), shared)


def linear_case(name, *more, w=(16, 24), **options):
    functions = (ft.partial(f, **options) for f in (ops.linear, linear))
    return Case("linear", name, *functions, ((3, 5, 16), w, *more), shared=(1, 2))


def conv_case(name, *more, w=(3, 2, 3, 5), activation="none", **options):
    """more: bias, residual and scale."""
    function = lambda x, w, b=None, r=None, s=None: ops.conv(x, w, b, r, scale=s, activation=activation, **options)  # noqa: E731
    formula = lambda x, w, b=0.0, r=0.0, s=1.0: conv(x, w, b, r, s, relu=activation == "relu", **options)  # noqa: E731
    return Case("conv", name, function, formula, ((2, 6, 4, 3), w, *more), shared=(1, 2, 4))


def gated_linear_case(name, w=(16, 24), **options):
    functions = (ft.partial(f, **options) for f in (ops.gated_linear, gated_linear))
    return Case("gated_linear", name, *functions, ((3, 5, 16), w, w), shared=(1, 2))


def quantized_case(name, dtype, *more, w=(16, 24), **options):
    functions = (ft.partial(f, **options) for f in (ops.quantized_linear, quantized_linear))
    return Case("quantized_linear", name, *functions, ((3, 5, 16), Integers(w, dtype), *more), shared=(1, 2, 3))


def group_norm_case(name, *parameters, shape=(2, 3, 5, 12), **options):
    functions = (ft.partial(f, **options) for f in (ops.group_norm, group_norm))
    return Case("group_norm", name, *functions, (shape, *parameters), shared=tuple(range(1, 1 + len(parameters))))


def rope_case(name, table, **options):
    functions = (ft.partial(f, **options) for f in (ops.rope, rope))
    return Case("rope", name, *functions, ((2, 5, 4, 8), table, table), shared=(1, 2))


def paged_case(name, q, pages, sequence_pages=4, lengths=20, **options):
    functions = (ft.partial(f, **options) for f in (ops.paged_attention, paged_attention))
    b, number = q[0], pages[options.get("heads_axis", 2) == 0]
    tables = Labels((b, sequence_pages), number), Labels((b,), lengths)
    return Case("paged_attention", name, *functions, (q, pages, (*pages[:3], 9), *tables), shared=(1, 2))


CASES = [
    Case("layer_norm", "", ops.layer_norm, layer_norm, (X,)),
    Case("layer_norm", "scale bias", ops.layer_norm, layer_norm, (X, W, W), (1, 2)),
    Case("layer_norm", "large eps", ft.partial(ops.layer_norm, eps=0.5), ft.partial(layer_norm, eps=0.5), (X, W), (1,)),
    Case("rms_norm", "", ops.rms_norm, rms_norm, (X,)),
    Case("rms_norm", "scale", ops.rms_norm, rms_norm, (X, W), (1,)),
    Case("add_layer_norm", "scale bias", ops.add_layer_norm, add_layer_norm, (X, X, W, W), (2, 3)),
    Case("add_rms_norm", "scale", ops.add_rms_norm, add_rms_norm, (X, X, W), (2,)),
    group_norm_case("channels last", (12,), (12,), groups=3),
    group_norm_case("channels last, silu", (12,), groups=2, eps=0.1, activation="silu"),
    group_norm_case("channels first", groups=4, shape=(2, 4, 37), channel_axis=1),
    group_norm_case(
        "channels first, silu, scale bias", (6,), (6,), groups=2, shape=(2, 6, 5, 7), channel_axis=1, activation="silu"
    ),
    Case("softmax", "", ops.softmax, softmax, (X,)),
    Case("softmax", "axis 1", ft.partial(ops.softmax, axis=1), ft.partial(softmax, axis=1), (X,)),
    Case("cross_entropy", "", ops.cross_entropy, cross_entropy, (X, Labels(X[:-1], X[-1]))),
    Case(
        "cross_entropy",
        "smoothing, z-loss",
        ft.partial(ops.cross_entropy, label_smoothing=0.1, z_loss=1e-2),
        ft.partial(cross_entropy, label_smoothing=0.1, z_loss=1e-2),
        (X, Labels(X[:-1], X[-1])),
    ),
    Case("gelu", "tanh", ops.gelu, gelu, (X,)),
    Case("gelu", "erf", ft.partial(ops.gelu, approximate=False), ft.partial(gelu, approximate=False), (X,)),
    Case("silu", "", ops.silu, silu, (X,)),
    linear_case("relu, bias", (24,), activation="relu"),
    linear_case("relu squared", activation="relu_squared"),
    linear_case("tanh, bias, transposed", (24,), w=(24, 16), activation="tanh", transposed=True),
    linear_case("gelu erf, bias, residual", (24,), (3, 5, 24), activation="gelu_erf"),
    conv_case("", padding=((2, 1), (0, 1)), strides=(2, 1)),
    conv_case("bias, residual, scale, relu", (5,), (2, 2, 3, 5), (5,), dilation=(2, 1), activation="relu"),
    conv_case("bias, max pool", (5,), padding=((1, 1), (0, 1)), pool=(3, 2)),
    gated_linear_case("silu"),
    gated_linear_case("gelu erf, transposed", w=(24, 16), activation="gelu_erf", transposed=True),
    quantized_case("int8", jnp.int8, (24,)),
    quantized_case("int4 groups, bias", jnp.int4, (4, 24), (24,)),
    quantized_case("int8 transposed, groups", jnp.int8, (2, 24), w=(24, 16), transposed=True),
    Case("gated_activation", "silu", ops.gated_activation, gated, (X, X)),
    Case(
        "gated_activation_of_halves",
        "second half",
        ft.partial(ops.gated_activation_of_halves, activation="gelu_erf", gate_half=1),
        gated_by_the_second_half,
        ((3, 5, 38),),
    ),
    rope_case("halves", (5, 1, 4)),
    rope_case("neighbours, tables of each example", (2, 5, 1, 4), interleaved=True),
    rope_case("heads first, first features", (4, 3), rotary_dim=6),
    rope_case("one feature, neighbours", (5, 4, 1), rotary_dim=2, interleaved=True),
    paged_case("pages", (3, 2, 6, 8), (7, 5, 2, 8)),
    paged_case("heads first, window, cap", (3, 1, 4, 8), (4, 7, 5, 8), heads_axis=0, local_window_size=3, softcap=2.0),
    attention_case(""),
    attention_case("causal", is_causal=True),
    attention_case("window", local_window_size=(2, 1)),
    attention_case("causal window, some rows empty", is_causal=True, local_window_size=(1, 0)),
    attention_case("mask", Mask((2, 4, 9, 7))),
    attention_case("mask of keys", Mask((2, 1, 1, 7))),
    attention_case("bias", (2, 4, 9, 7)),
    attention_case("bias of heads", (1, 4, 1, 7)),
    attention_case("mask and bias, causal", Mask((2, 1, 9, 7)), (1, 1, 9, 7), is_causal=True),
    attention_case("grouped", k=(2, 7, 2, 6), v=(2, 7, 2, 6)),
    attention_case("multi-query, mask, bias", Mask((2, 4, 9, 7)), (1, 4, 9, 7), k=(2, 7, 1, 6), v=(2, 7, 1, 6)),
    attention_case("value size", v=(2, 7, 4, 11)),
    attention_case("scale", scale=0.7),
    attention_case("one query", q=(2, 1, 4, 6)),
    attention_case("sinks and window", (4,), shared=(3,), is_causal=True, local_window_size=(2, 0)),
    attention_case(
        "sinks, cap, segments, lengths, mask",
        Mask((2, 1, 9, 7)),
        (4,),
        shared=(4,),
        softcap=1.5,
        query_segments=SEGMENTS[:, :9],
        key_segments=SEGMENTS[:, 1:8],
        key_lengths=np.array([5, 0]),
    ),
]
# One case of each op with parameters, and the hard ones of attention, for the dearer transformations; of pages, which
# attention's derivatives are taken of, in test_paged_attention.py.
MAIN_NAMES = (
    "scale bias",
    "scale",
    "axis 1",
    "tanh",
    "erf",
    "mask and bias, causal",
    "grouped",
    "smoothing, z-loss",
    "second half",
    "channels first, silu, scale bias",
    "sinks, cap, segments, lengths, mask",
    "gelu erf, bias, residual",
    "int4 groups, bias",
    "halves",
)
MAIN = [c for c in CASES if c.name in MAIN_NAMES or c.op in ("silu", "softmax")]

each_case = pytest.mark.parametrize("case", CASES, ids=str)
main_case = pytest.mark.parametrize("case", MAIN, ids=str)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.__name__)

# Ulps at the largest value that are let pass where the plain formula happens to be exact: sums in another order.
VALUE_ULPS, GRADIENT_ULPS, SECOND_ULPS = 4.0, 16.0, 64.0


def float_indices(args: Sequence[Any]) -> tuple[int, ...]:
    return tuple(i for i, a in enumerate(args) if jnp.issubdtype(a.dtype, jnp.floating))


def loss_of(function: Callable) -> Callable:
    """A scalar with unequal weights on all results; in the widened dtype, as training losses are."""

    def loss(*args: Any) -> Any:
        return sum(
            jnp.vdot(
                r.astype(wide := jnp.promote_types(r.dtype, jnp.float32)).ravel(),
                jnp.cos(0.7 * jnp.arange(r.size, dtype=wide)),
            )
            for r in jax.tree.leaves(function(*args))
        )

    return loss


def gradient_of(function: Callable, args: Sequence[Any]) -> Callable:
    return jax.grad(loss_of(function), float_indices(args))


def close(transform: Callable[[Callable], Callable], case: Case, args: Sequence[Any], floor_ulps: float) -> None:
    """transform(op)(*args) against transform(formula): error ratio with float64."""
    fused, plain = transform(case.function), transform(case.formula)
    with np.errstate(all="ignore"):
        assert_error_ratio(
            jax.jit(fused)(*args), jax.jit(plain)(*args), in_float64(plain)(*args), floor_ulps=floor_ulps
        )
