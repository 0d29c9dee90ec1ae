"""A convolution or a product with weights, and what multiplies and shifts its channels after it: batch norm with stored
statistics, above all.

    (conv(x, w) - mean) * scale / sqrt(variance + eps) + bias  ->  conv(x, w * a) + b,  a and b of one element a channel

Read upwards from the convolution, along values that are used once, through additions, subtractions, products and
quotients by anything that has the channels as its only axis. Whatever a and b are made of stays as it is written. Of a
product x @ w the channels are w's features, and it must be multiplied and shifted both: a product that is only scaled
is no batch norm, and common.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax

from zenith_jax.errors import Refusal, refuse
from zenith_jax.ir import _compat
from zenith_jax.ir._compat import JaxprEqn, Var
from zenith_jax.ir.graph import Atom, Graph
from zenith_jax.ir.term import Axis, Term, Terms, is_float
from zenith_jax.passes.match._match import CASTS, Match, Order, arranged, order_of

_ARITHMETIC = ("add", "sub", "mul", "div")
_CONV_PARAMS = (
    "window_strides padding lhs_dilation rhs_dilation dimension_numbers feature_group_count batch_group_count "
    "precision preferred_element_type"
).split()


_DOT_PARAMS = ("dimension_numbers", "precision", "preferred_element_type")


@dataclasses.dataclass(frozen=True)
class _Step:
    """y `primitive` operand, or the operand first: a leaf along the channels, arranged by `order`, or a constant."""

    primitive: str
    reversed: bool
    leaf: int | None = None
    order: Order = ()
    constant: float = 0.0


@dataclasses.dataclass(frozen=True)
class Scaled:
    """What is computed of the channels of a convolution's or product's result, `features` those of its weights.

    leaves: what is multiplied and what steps take, by number. inner: up to the last step, whose result is `result`.
    """

    steps: tuple[_Step, ...]
    leaves: tuple[Atom, ...]
    inner: tuple[JaxprEqn, ...]
    result: Var
    channel: int  # of `result`
    features: int

    def is_scaled(self) -> bool:
        return any(s.primitive in ("mul", "div") or s.reversed for s in self.steps)


def match(graph: Graph, eqn: JaxprEqn) -> Match | Refusal | None:
    """`eqn` is the convolution or the product."""
    found = read(graph, eqn)
    if found is None:
        return None
    is_product = eqn.primitive.name == "dot_general"
    vectors = [s.primitive in ("mul", "div") for s in found.steps if s.leaf is not None]
    if not any(vectors) or (is_product and all(vectors)):
        return None
    if graph.escapes(found.inner, [found.result]) is not None:
        reason = "the {what}'s result, before its channels are scaled, is used elsewhere"
        return refuse(reason, what=_name(eqn), depth=2)
    x, w = eqn.invars
    if not all(is_float(a.aval.dtype) for a in found.leaves):
        return None
    if w.aval.dtype == jnp.float16:
        return refuse("weights that are multiplied by 1 / sqrt(variance) can leave the range of float16", depth=2)
    if any(graph.depends_on([leaf], eqn.outvars[0]) for leaf in found.leaves):
        return None
    result = found.result
    return Match(
        op="batch_norm",
        root=eqn,
        results=(result,),
        inner=found.inner,
        leaves=found.leaves,
        emit=emit,
        static=(
            ("channel", found.channel),
            ("features", found.features),
            ("params", tuple((n, _frozen(eqn.params[n])) for n in (_DOT_PARAMS if is_product else _CONV_PARAMS))),
            ("dtype", result.aval.dtype.name),
            ("shape", tuple(result.aval.shape)),
            ("steps", found.steps),
        ),
        detail=f"{result.aval.shape[found.channel]} channels, folded into the {_name(eqn)} before it",
        case=(("dtype", x.aval.dtype.name), ("size", result.aval.size), ("of", _name(eqn))),
        yields=True,
    )


def read(graph: Graph, eqn: JaxprEqn) -> Scaled | None:
    """`eqn` is the convolution or the product; there may be no step."""
    found = _channel(eqn)
    if found is None:
        return None
    channel, features = found
    terms = Terms(graph)
    leaves: list[Atom] = list(eqn.invars)
    steps: list[_Step] = []
    inner, pending = [eqn], []
    result = var = eqn.outvars[0]
    result_channel = channel
    while (user := graph.only_user(var)) is not None:
        new = user.outvars[0]
        if user.primitive.name in CASTS:
            if not is_float(new.aval.dtype):
                break
        elif user.primitive.name in ("reshape", "squeeze", "expand_dims"):
            moved = _same_dimension(var.aval.shape, new.aval.shape, channel)
            if moved is None:
                break
            channel = moved
        elif user.primitive.name in _ARITHMETIC:
            step = _step(terms, user, var, channel, leaves)
            if step is None:
                break
            steps.append(step)
        else:
            break
        pending.append(user)
        var = new
        if user.primitive.name in _ARITHMETIC:
            inner, pending, result, result_channel = [*inner, *pending], [], var, channel
    return Scaled(tuple(steps), tuple(leaves), tuple(inner), result, result_channel, features)


def _channel(eqn: JaxprEqn) -> tuple[int, int] | None:
    """The dimension of the result, and of the weights, along which the channels are."""
    if eqn.primitive.name not in ("conv_general_dilated", "dot_general") or not is_float(eqn.outvars[0].aval.dtype):
        return None
    if eqn.primitive.name == "conv_general_dilated":
        _, weights, result = eqn.params["dimension_numbers"]
        return result[1], weights[0]
    if eqn.params.get("out_sharding") is not None:
        return None
    (_, contracted), (batch, _) = eqn.params["dimension_numbers"]
    free = [d for d in range(len(eqn.invars[1].aval.shape)) if d not in contracted]
    if batch or len(free) != 1 or any(_compat.explicit_sharding(a.aval) for a in eqn.invars):
        return None
    return len(eqn.outvars[0].aval.shape) - 1, free[0]


def _name(eqn: JaxprEqn) -> str:
    return "product" if eqn.primitive.name == "dot_general" else "convolution"


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if type(value) in (list, tuple) else value


def _step(terms: Terms, eqn: JaxprEqn, var: Var, channel: int, leaves: list[Atom]) -> _Step | None:
    """The equation as a step of `var`; its other operand joins the leaves."""
    if eqn.invars[0] is eqn.invars[1] or eqn.outvars[0].aval.shape != var.aval.shape:
        return None
    place = 0 if eqn.invars[0] is var else 1
    is_reversed = place == 1 and eqn.primitive.name in ("sub", "div")
    if is_reversed and eqn.primitive.name == "div":
        return None  # a constant over y is no multiple of y
    whole = terms.of(eqn.outvars[0])
    other = terms.operands(whole, eqn)[1 - place]
    constant = terms.constant(other)
    if constant is not None:
        return _Step(eqn.primitive.name, is_reversed, constant=constant)
    other = terms.peel(other)
    axis: Axis | None = whole.axes[channel]
    if axis is None or not isinstance(other.atom, Var) or other.axis_set != {axis} or not is_float(other.dtype):
        return None
    return _along(other, axis, eqn.primitive.name, is_reversed, leaves)


def _along(other: Term, axis: Axis, primitive: str, is_reversed: bool, leaves: list[Atom]) -> _Step | None:
    order = order_of(other, (axis,))
    if order is None:
        return None
    leaves.append(other.atom)
    return _Step(primitive, is_reversed, leaf=len(leaves) - 1, order=order)


def _same_dimension(old: tuple[int, ...], new: tuple[int, ...], dimension: int) -> int | None:
    """The dimension of `new`, a reshape of `old` that only adds or removes ones, that `dimension` of old is."""
    olds, news = ([d for d, n in enumerate(shape) if n != 1] for shape in (old, new))
    if [old[d] for d in olds] != [new[d] for d in news] or dimension not in olds:
        return None
    return news[olds.index(dimension)]


def emit(
    x: Any,
    w: Any,
    *vectors: Any,
    channel: int,
    features: int,
    params: tuple,
    dtype: str,
    shape: tuple,
    steps: tuple[_Step, ...],
):
    operands = (x, w, *vectors)
    a, b = coefficients(steps, operands, w.shape[features], jnp.result_type(dtype, jnp.float32, *operands))
    scaled = (w * _along_axis(a, features, w.ndim)).astype(w.dtype)
    multiply = lax.conv_general_dilated if "window_strides" in dict(params) else lax.dot_general
    y = multiply(x, scaled, **dict(params)).reshape(shape)
    # In the convolution's own dtype, where that is wide enough: cuDNN then adds b in its epilogue.
    y = y.astype(jnp.result_type(y.dtype, dtype)) if jnp.finfo(dtype).bits > jnp.finfo(y.dtype).bits else y
    return ((y + _along_axis(b, channel, y.ndim).astype(y.dtype)).astype(dtype),)


def coefficients(steps: tuple[_Step, ...], operands: tuple[Any, ...], count: int, dtype: Any) -> tuple[Any, Any]:
    """(a, b), `count` of each: the steps make a * y + b of y."""
    a, b = jnp.ones((count,), dtype), jnp.zeros((count,), dtype)
    is_shifted = False  # before, b is 0 and stays it: 0 * inf and 0 / 0 are NaN
    for step in steps:
        v = step.constant if step.leaf is None else arranged(operands[step.leaf], step.order).astype(dtype)
        if step.primitive == "add":
            b = b + v
        elif step.primitive == "sub":
            a, b = (-a, v - b) if step.reversed else (a, b - v)
        elif step.primitive == "mul":
            a, b = a * v, b * v if is_shifted else b
        else:
            a, b = a / v, b / v if is_shifted else b
        is_shifted = is_shifted or step.primitive in ("add", "sub")
    return a, b


def _along_axis(v: Any, axis: int, rank: int) -> Any:
    return v.reshape([-1 if d == axis else 1 for d in range(rank)])
