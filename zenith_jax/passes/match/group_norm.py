"""Group norm, and silu after it; found from 1/sqrt(variance + eps) of a variance over several axes.

    y[*b, r, g, k] = (x - mean[*b, g]) * rstd[*b, g] * scale[g, k] + bias[g, k],  moments over r and k

Axes are what the program's arrays have after all reshapes are undone: g and k are what scale and bias run along, g the
part of it that the moments keep. Read in the axes of the result, so that each statistic is seen where it is used.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from zenith_jax.errors import Refusal, refuse
from zenith_jax.ir._compat import JaxprEqn, Var
from zenith_jax.ir.graph import VIEWS, Graph
from zenith_jax.ir.term import Axis, Term, Terms, is_float
from zenith_jax.ops.group_norm import group_norm_canonical
from zenith_jax.passes.match._match import Match, Order, arranged, as_precise, order_of
from zenith_jax.passes.match.moments import eps_and_variance, mean_of, square_of, unclamped

_RESHAPES = ("reshape",)
_ELEMENTWISE_VIEWS = ("convert_element_type", "reshape", "squeeze", "expand_dims")


@dataclasses.dataclass(frozen=True)
class _Reading:
    """x normalised over the axes `reduced` and multiplied by `scale`, all in the axes of one result."""

    x: Term
    reduced: frozenset[Axis]
    eps: float
    scale: Term | None
    inner: tuple[JaxprEqn, ...]


def match(graph: Graph, eqn: JaxprEqn) -> Match | Refusal | None:
    """`eqn` is the rsqrt or sqrt."""
    if eqn.primitive.name not in ("rsqrt", "sqrt") or not is_float(eqn.outvars[0].aval.dtype):
        return None
    terms = Terms(graph)
    axes = _moment_axes(terms, terms.of(eqn.outvars[0]), eqn)
    if isinstance(axes, Refusal) or axes == 0:
        return axes or None
    result, path = eqn.outvars[0], []
    best: tuple[Var, tuple[JaxprEqn, ...]] | None = None
    refusal: Refusal | None = None
    while True:
        users = graph.users_of(result)
        if len(users) != 1 or graph.is_output(result):
            break
        if users[0].primitive.name not in (*VIEWS, "mul", "div") and not _adds_zero(graph, users[0]):
            break
        path.append(users[0])
        result = users[0].outvars[0]
        if users[0].primitive.name in ("mul", "div"):
            found = _read(Terms(graph), None, result, eqn)
            if isinstance(found, _Reading):
                best = (result, tuple(path))
            elif best is not None:
                break  # this product has one factor more: the norm ends below it
            elif found is not None:
                refusal = found
    if best is None and axes > 1 and not path:
        return refuse(
            "1/sqrt(variance + eps) is used {n} times, a norm uses it once",
            depth=3,
            n=graph.use_count(eqn.outvars[0]),
            advice="do not return the statistics",
        )
    if best is None:
        return refusal
    return _finish(graph, eqn, *best)


def _moment_axes(terms: Terms, rstd: Term, root: JaxprEqn) -> int | Refusal:
    """How many axes are reduced below the root and its eps: a cheap look before the search. 0: no moments."""
    below = eps_and_variance(terms, terms.peel(terms.operands(rstd, root)[0]))
    variance = None if below is None else unclamped(terms, below[1], [], _RESHAPES)
    if variance is None:
        return 0
    difference = terms.producer(variance, "sub")
    found = mean_of(terms, terms.operands(variance, difference)[0] if difference else variance, [])
    if isinstance(found, Refusal):
        return found if dict(found.values)["axes"] > 1 else 0
    return 0 if found is None else len(found[1])


def _adds_zero(graph: Graph, eqn: JaxprEqn) -> bool:
    """An instance norm without parameters, as PyTorch exports it, has a bias of zeros."""
    return eqn.primitive.name == "add" and any(graph.constant(a) == 0.0 for a in eqn.invars)


# --- reading ----------------------------------------------------------------------------------------------------------


def _bound(terms: Terms, pattern: Term, term: Term, fresh: Sequence[Axis]) -> frozenset[Axis] | None:
    """The axes of `term` that the `fresh` ones of `pattern` stand for, if both are one value; None if they are not."""
    pattern, term = terms.peel(pattern, also=_RESHAPES), terms.peel(term, also=_RESHAPES)
    if not isinstance(pattern.atom, Var) or not terms.graph.same(pattern.atom, term.atom):
        return None
    free = terms.split(Term(pattern.atom, tuple(fresh))).axis_set
    left, right = ([a for a in terms.split(t).axes if a is not None] for t in (pattern, term))
    if len(left) != len(right) or len(set(right)) != len(right):
        return None
    bound: dict[Axis, Axis] = {}
    for p, t in zip(left, right, strict=True):
        if p in free:
            bound[p] = t
        elif p is not t:
            return None
    return frozenset(bound.values()) if set(bound) == free else None


def _reduced_by_mean(terms: Terms, mean: Term, x: Term, path: list[JaxprEqn]) -> frozenset[Axis] | None:
    """The axes of x over which `mean` is its mean."""
    found = mean_of(terms, mean, path, _RESHAPES)
    return None if found is None or isinstance(found, Refusal) else _bound(terms, found[0], x, found[1])


def _moments(terms: Terms, variance: Term, x: Term, path: list[JaxprEqn]) -> frozenset[Axis] | Refusal | None:
    """The axes of x over which `variance` is its variance."""
    below = unclamped(terms, variance, path, _RESHAPES)
    if below is None:
        return None
    difference = terms.producer(below, "sub")
    if difference is not None:  # mean(x^2) - mean(x)^2
        path.append(difference)
        first, second = terms.operands(below, difference)
        found = mean_of(terms, first, path, _RESHAPES)
        if found is None or isinstance(found, Refusal):
            return found
        base = square_of(terms, found[0], path, _RESHAPES)
        mean = square_of(terms, second, path, _RESHAPES)
        axes = None if base is None else _bound(terms, base, x, found[1])
        if axes is None or mean is None or _reduced_by_mean(terms, mean, x, path) != axes:
            return refuse("mean(x^2) and mean(x)^2 are of different values or axes", depth=2)
        return axes
    found = mean_of(terms, below, path, _RESHAPES)
    if found is None or isinstance(found, Refusal):
        return found
    base = square_of(terms, found[0], path, _RESHAPES)
    subtraction = None if base is None else terms.producer(base, "sub")
    if base is None or subtraction is None:
        return None  # a mean square: there is no group norm without a mean
    path.append(subtraction)
    minuend, mean = terms.operands(base, subtraction)
    minuend = terms.peel(minuend, path, _RESHAPES)
    own = _reduced_by_mean(terms, mean, minuend, path)
    axes = _bound(terms, minuend, x, found[1])
    if own is None or axes is None or own != terms.split(Term(minuend.atom, tuple(found[1]))).axis_set:
        return refuse("the variance is centred by a mean over other axes, or is of another value", depth=2)
    return axes


def _read(terms: Terms, top: Term | None, var: Var, root: JaxprEqn) -> _Reading | Refusal | None:
    """`var`, or `top` in the axes of another value, as (x - mean) * rstd * scale."""
    path: list[JaxprEqn] = []
    top = terms.of(var) if top is None else top
    product = terms.product(top, path, _RESHAPES)
    wanted = 1 if root.primitive.name == "rsqrt" else -1
    roots = [f for f, e in product.factors if f.atom is root.outvars[0] and e == wanted]
    rest = [(f, e) for f, e in product.factors if f.atom is not root.outvars[0]]
    if len(roots) != 1 or len(product.factors) != len(rest) + 1:
        return refuse("the standard deviation is used as a factor, not as a divisor", depth=3)
    path.append(root)
    below_root = eps_and_variance(terms, terms.peel(terms.operands(roots[0], root)[0], path, _RESHAPES))
    if below_root is None:
        return None
    eps, variance, addition = below_root
    path.append(addition)
    centred = [f for f, e in rest if e == 1 and terms.producer(f, "sub") is not None]
    if len(centred) != 1:
        return None
    subtraction = terms.producer(centred[0], "sub")
    assert subtraction is not None
    path.append(subtraction)
    x, mean = terms.operands(centred[0], subtraction)
    x = terms.peel(x, path, _RESHAPES)
    if not isinstance(x.atom, Var):
        return None
    reduced = _reduced_by_mean(terms, mean, x, path)
    if reduced is None:
        return refuse("what is subtracted from x is not its mean over a group", depth=3)
    over = _moments(terms, variance, x, path)
    if over is None or isinstance(over, Refusal):
        return over
    if over != reduced:
        return refuse("mean and variance run over different axes", depth=3)
    if product.coefficient != 1.0:
        return refuse("the norm is scaled by the constant {c}", c=product.coefficient, depth=3)
    others = [(f, e) for f, e in rest if f is not centred[0]]
    if len(others) > 1 or any(e != 1 or not is_float(f.dtype) for f, e in others):
        return refuse("the product has {n} factors besides x - mean and 1/sqrt(variance + eps)", n=len(others), depth=3)
    if terms.split(x).axis_set != terms.split(top).axis_set:
        return refuse("the result has other axes than x", depth=3)
    reading = _Reading(terms.split(x), reduced, eps, others[0][0] if others else None, tuple(path))
    layout = _layout(terms, reading, [reading.scale] if reading.scale else [])
    return layout if isinstance(layout, Refusal) else reading


# --- from the product to the match ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Vector:
    """A parameter: its array's sizes, merged axes cut, and for each axis of the channels its dimension."""

    sizes: tuple[int, ...]
    order: Order


def _finish(graph: Graph, root: JaxprEqn, var: Var, path: tuple[JaxprEqn, ...]) -> Match | Refusal | None:
    with_bias = _bias(graph, var)
    terms = Terms(graph)
    result, bias, steps = var, None, ()
    reading: _Reading | Refusal | None = None
    if with_bias is not None:
        addition, place, views = with_bias
        top = terms.of(addition.outvars[0])
        operands = terms.operands(top, addition)
        reading = _read(terms, operands[place], var, root)
        bias = terms.peel(operands[1 - place], also=_RESHAPES)
        if isinstance(reading, _Reading) and _is_parameter(terms, reading, bias):
            result, steps = addition.outvars[0], (*views, addition)
        else:
            reading, bias, terms = None, None, Terms(graph)
    if reading is None:
        reading = _read(terms, None, var, root)
    if not isinstance(reading, _Reading):
        return reading
    parameters = [t for t in (reading.scale, bias) if t is not None]
    if len(reading.reduced) == 1 and all(terms.split(t).axis_set <= reading.reduced for t in parameters):
        return None  # a layer norm
    layout = _layout(terms, reading, parameters)
    if isinstance(layout, Refusal):
        return layout
    lead, g, k, r, channels_last = layout
    x = terms.split(reading.x)
    order = [a for a in x.axes if a is not None]
    vectors = []
    for term in parameters:
        term = terms.split(term)
        dims = order_of(term, [*g, *k])
        if dims is None:
            return refuse("scale or bias runs along other axes than the channels", depth=4)
        vectors.append(_Vector(tuple(1 if a is None else a.size for a in term.axes), dims))
    if [a.size for a in order] != _cut_as(result.aval.shape, order):
        return refuse("the norm's result is transposed against x", depth=5)
    all_inner = (*path, *reading.inner, *steps)
    if graph.depends_on([t.atom for t in parameters], x.atom):
        return refuse("scale or bias depends on x", depth=5)
    escaped = graph.escapes(all_inner, [result])
    if escaped is not None:
        return refuse(
            "an inner value ({aval}: mean, variance or x - mean) is used elsewhere",
            aval=escaped.aval,
            depth=6,
            advice="do not return the statistics",
        )
    groups, width, rows = (math.prod(a.size for a in axes) for axes in (g, [*g, *k], r))
    static = dict(
        channel_sizes=tuple(a.size for a in (*g, *k)),
        vectors=tuple(vectors),
        has_scale=reading.scale is not None,
        lead=tuple(a.size for a in lead),
        rows=rows,
        groups=groups,
        eps=reading.eps,
        channels_last=channels_last,
        activation=None,
        shape=tuple(result.aval.shape),
        dtype=result.aval.dtype.name,
    )
    alone = Match(
        op="group_norm",
        root=root,
        results=(result,),
        inner=all_inner,
        leaves=(x.atom, *(t.atom for t in parameters)),
        emit=emit,
        static=tuple(static.items()),
        detail=f"{groups} groups of {width // groups} channels, {rows} positions, "
        f"channels {'last' if channels_last else 'first'}",
        case=(
            ("dtype", x.dtype.name),
            ("size", x.atom.aval.size),
            ("groups", groups),
            ("width", width),
            ("rows", rows),
            ("channels_last", channels_last),
            ("silu", False),
        ),
    )
    return _with_silu(graph, alone, static)


def _is_parameter(terms: Terms, reading: _Reading, bias: Term) -> bool:
    """Whether the bias runs along channels of the norm, those of the scale if there is one."""
    parameters = [t for t in (reading.scale, bias) if t is not None]
    return terms.split(bias).axis_set < reading.x.axis_set and isinstance(_layout(terms, reading, parameters), tuple)


def _bias(graph: Graph, var: Var) -> tuple[JaxprEqn, int, tuple[JaxprEqn, ...]] | None:
    """The single use `+ bias` of the product, after views: (the addition, the place of the product, the views)."""
    views = []
    while (user := graph.only_user(var)) is not None:
        if user.primitive.name == "add":
            if user.invars[0] is user.invars[1] or user.outvars[0].aval.shape != var.aval.shape:
                return None
            return user, [a is var for a in user.invars].index(True), tuple(views)
        if user.primitive.name not in VIEWS or not is_float(user.outvars[0].aval.dtype):
            return None
        views.append(user)
        var = user.outvars[0]
    return None


_Layout = tuple[list[Axis], list[Axis], list[Axis], list[Axis], bool]


def _layout(terms: Terms, reading: _Reading, parameters: Sequence[Term]) -> _Layout | Refusal:
    """Of x's axes batch, groups, channels of a group and positions, and whether the channels are last; as they lie in
    memory and as the parameters tell channels from positions."""
    channels = frozenset(a for t in parameters for a in terms.split(t).axis_set)

    def kind(axis: Axis) -> str:
        kinds = "kg" if axis in channels else "rb"
        return kinds[0] if axis in reading.reduced else kinds[1]

    axes_of_x = terms.split(reading.x).axes
    order = [a for a in axes_of_x if a is not None]
    runs = [(name, list(axes)) for name, axes in itertools.groupby(order, kind)]
    if axes_of_x[:1] == (None,) and runs and runs[0][0] in "rk":
        runs.insert(0, ("b", []))  # a batch of one
    names = "".join(name for name, _ in runs)
    if names.startswith(("r", "k")):
        return refuse(
            "the moments run over the first axis of x, of shape {shape}, as those of a batch norm in training do",
            shape=tuple(a.size for a in order),
            depth=4,
            advice="a norm of one sample is fused with a batch axis before it",
        )
    if not channels and names in ("brb", "brbr"):
        # Nothing tells channels from positions: what stands between reduced axes are groups, or behind them.
        runs = [*runs[:2], *zip("gk", (axes for _, axes in runs[2:]), strict=False)]
        names = "".join(name for name, _ in runs)
    of = dict(runs)
    lists = [of.get(name, []) for name in "bgkr"]
    if names in ("brgk", "brg", "brk"):
        return lists[0], lists[1], lists[2], lists[3], True
    if names in ("bgkr", "bgr", "bkr", "gkr", "gr", "br", "bgk", "gk", "bk"):
        return lists[0], lists[1], lists[2], lists[3], False
    return refuse(
        "the axes of x lie as {names} (b batch, r positions, g groups, k channels of a group)",
        names=names,
        depth=5,
        advice="kernels read channels last or first, behind the batch",
    )


def _cut_as(shape: Sequence[int], order: Sequence[Axis]) -> list[int]:
    """The sizes of `order` if an array of `shape` has them as its dimensions or as parts of these, in this order."""
    sizes, left = [], iter(order)
    for n in shape:
        whole = 1
        while whole < n and (axis := next(left, None)) is not None:
            whole *= axis.size
            sizes.append(axis.size)
        if whole != n:
            return []
    return sizes


def _with_silu(graph: Graph, alone: Match, static: dict[str, Any]) -> Match:
    """With z * logistic(z) of the norm's result z, cast and reshaped or not, where nothing else reads z."""
    z, inner = alone.results[0], list(alone.inner)
    users = graph.users_of(z)
    while len(users) == 1 and users[0].primitive.name in _ELEMENTWISE_VIEWS and not graph.is_output(z):
        inner.append(users[0])
        z = users[0].outvars[0]
        users = graph.users_of(z)
    if graph.is_output(z) or not is_float(z.aval.dtype) or len(users) != 2:
        return alone
    by_name = {u.primitive.name: u for u in users}
    sigmoid, product = by_name.get("logistic"), by_name.get("mul")
    if sigmoid is None or product is None or {*product.invars} != {z, sigmoid.outvars[0]}:
        return alone
    if len(graph.users_of(sigmoid.outvars[0])) != 1 or graph.is_output(sigmoid.outvars[0]):
        return alone
    result = product.outvars[0]
    return dataclasses.replace(
        alone,
        results=(result,),
        inner=(*inner, sigmoid, product),
        static=tuple(
            {
                **static,
                "activation": "silu",
                "shape": tuple(result.aval.shape),
                "dtype": result.aval.dtype.name,
            }.items()
        ),
        detail=f"{alone.detail}, silu",
        case=(*((n, v) for n, v in alone.case if n != "silu"), ("silu", True)),
        simpler=alone,
    )


# --- the fused op -----------------------------------------------------------------------------------------------------


def emit(
    x, *parameters, channel_sizes, vectors, has_scale, lead, rows, groups, eps, channels_last, activation, shape, dtype
):
    width = math.prod(channel_sizes)
    values = [
        jnp.broadcast_to(arranged(p.reshape(v.sizes), v.order), channel_sizes).reshape(-1)
        for p, v in zip(parameters, vectors, strict=True)
    ]
    scale = values.pop(0) if has_scale else None
    bias = values.pop(0) if values else None
    canonical = (*lead, rows, width) if channels_last else (*lead, width, rows)
    y = group_norm_canonical(
        as_precise(x, dtype).reshape(canonical),
        scale,
        bias,
        groups=groups,
        eps=eps,
        activation=activation,
        channels_last=channels_last,
    )
    return (y.reshape(shape).astype(dtype),)
