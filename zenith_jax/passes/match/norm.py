"""layer_norm and rms_norm, with the residual add in front where there is one; found from 1/sqrt(variance + eps)."""

from __future__ import annotations

import dataclasses
from typing import Any

from zenith_jax.errors import Refusal, refuse
from zenith_jax.ir._compat import JaxprEqn, Var
from zenith_jax.ir.graph import VIEWS, Graph
from zenith_jax.ir.term import Axis, Term, Terms, is_float
from zenith_jax.ops import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from zenith_jax.passes.match._match import Match, as_precise
from zenith_jax.passes.match.moments import eps_and_variance, mean_of, square_of, unclamped


@dataclasses.dataclass(frozen=True)
class Moments:
    """v = variance of x along `axis` (centred), or its mean square (not centred)."""

    x: Term
    axis: Axis
    centred: bool
    mean: Term | None
    inner: tuple[JaxprEqn, ...]


def match(graph: Graph, eqn: JaxprEqn) -> Match | Refusal | None:
    """`eqn` is the rsqrt or sqrt."""
    if eqn.primitive.name not in ("rsqrt", "sqrt") or not is_float(eqn.outvars[0].aval.dtype):
        return None
    terms = Terms(graph)
    rstd = terms.of(eqn.outvars[0])
    inner: list[JaxprEqn] = [eqn]
    inside = terms.peel(terms.operands(rstd, eqn)[0], inner)
    if terms.producer(inside, "add") is None:
        if isinstance(_moments(terms, inside, []), Moments):
            return refuse(
                "there is no eps inside the square root",
                depth=1,
                advice="x / sqrt(var + eps) is fused; sqrt(var) + eps is another function",
            )
        return None
    below_root = eps_and_variance(terms, inside)
    if below_root is None:
        return None
    eps, variance, addition = below_root
    inner.append(addition)
    moments = _moments(terms, variance, inner)
    if moments is None or isinstance(moments, Refusal):
        return moments
    return _climb(terms, eqn, rstd, moments, eps, inner)


# --- mean and variance ------------------------------------------------------------------------------------------------


def _mean(terms: Terms, term: Term, path: list[JaxprEqn]) -> tuple[Term, Axis] | Refusal | None:
    """The mean of x along one axis: (x, axis). Over several it is a group norm's."""
    found = mean_of(terms, term, path)
    if found is None or isinstance(found, Refusal):
        return found
    x, reduced = found
    return (x, reduced[0]) if len(reduced) == 1 else None


def _is_mean_of(terms: Terms, mean: Term, x: Term, axis: Axis, path: list[JaxprEqn]) -> bool:
    """Whether `mean` is the mean of x along `axis`."""
    found = _mean(terms, mean, path)
    if found is None or isinstance(found, Refusal):
        return False
    operand, reduced = found
    bound = terms.unify(operand, x, [reduced])
    return bound is not None and list(bound.values()) == [axis]


def _moments(terms: Terms, term: Term, path: list[JaxprEqn]) -> Moments | Refusal | None:
    """Reads a term as a variance or a mean square. The term may be clamped at 0: max(0, v)."""
    below = unclamped(terms, term, path)
    if below is None:
        return None
    term = below
    difference = terms.producer(term, "sub")
    if difference is not None:
        return _difference_of_moments(terms, term, difference, path)
    found = _mean(terms, term, path)
    if found is None or isinstance(found, Refusal):
        return found
    squared, axis = found
    base = square_of(terms, squared, path)
    if base is None:
        return None
    # base is indexed by `axis`, the fresh axis of the reduction.
    subtraction = terms.producer(base, "sub")
    if subtraction is not None:
        x, mean = terms.operands(base, subtraction)
        if axis in x.axis_set and axis not in terms.peel(mean).axis_set:
            steps: list[JaxprEqn] = []
            mean_found = _mean(terms, mean, steps)
            if isinstance(mean_found, Refusal):
                return mean_found
            if mean_found is not None:
                if not _is_mean_of(terms, mean, x, axis, steps):
                    return refuse("the variance is centred by a mean over another axis or of another value", depth=2)
                path += [subtraction, *steps]
                return Moments(terms.peel(x, path), axis, True, terms.peel(mean), tuple(path))
    return Moments(base, axis, False, None, tuple(path))


def _difference_of_moments(terms: Terms, term: Term, eqn: JaxprEqn, path: list[JaxprEqn]) -> Moments | Refusal | None:
    """mean(x^2) - mean(x)^2."""
    first, second = terms.operands(term, eqn)
    steps: list[JaxprEqn] = [eqn]
    found = _mean(terms, first, steps)
    if found is None or isinstance(found, Refusal):
        return found
    squared, axis = found
    x = square_of(terms, squared, steps)
    mean = square_of(terms, second, steps)
    if x is None or mean is None:
        return None
    if not _is_mean_of(terms, mean, x, axis, steps):
        return refuse("mean(x^2) and mean(x)^2 are of different values or axes", depth=2)
    path.extend(steps)
    return Moments(x, axis, True, mean, tuple(path))


# --- from the reciprocal standard deviation up to the result ----------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Found:
    """A normalised product: its variable, scale (None: 1) and the equations that it replaces. x is in `top`'s axes."""

    var: Var
    top: Term
    scale: Term | None
    x: Term
    axis: Axis
    inner: tuple[JaxprEqn, ...]


def _climb(
    terms: Terms, root: JaxprEqn, rstd: Term, moments: Moments, eps: float, inner: list[JaxprEqn]
) -> Match | Refusal:
    graph = terms.graph
    var, best, path = root.outvars[0], None, []
    refusal: Refusal | None = None
    while True:
        users = graph.users_of(var)
        if len(users) != 1 or graph.is_output(var):
            if best is None:
                refusal = refusal or refuse(
                    "1/sqrt(variance + eps) is used {n} times, a norm uses it once",
                    depth=3,
                    n=graph.use_count(var),
                    advice="do not return the statistics",
                )
            break
        user = users[0]
        name = user.primitive.name
        if name not in (*VIEWS, "mul", "div"):
            break
        path.append(user)
        var = user.outvars[0]
        if name in ("mul", "div"):
            found = _normalised(terms, var, root, rstd, moments)
            if isinstance(found, _Found):
                best = dataclasses.replace(found, inner=(*found.inner, *path))
            elif best is not None:
                break  # this product has one factor more: the norm ends below it
            else:
                refusal = found
    if best is None:
        return refusal or refuse("the reciprocal standard deviation does not multiply x - mean", depth=3)
    return _finish(terms, root, moments, best, eps, inner)


def _normalised(terms: Terms, var: Var, root: JaxprEqn, rstd: Term, moments: Moments) -> _Found | Refusal:
    """Reads `var` as x_centred * rstd * scale."""
    product_path: list[JaxprEqn] = []
    top = terms.of(var)
    product = terms.product(top, product_path)
    wanted_exponent = 1 if root.primitive.name == "rsqrt" else -1
    if product.coefficient != 1.0:
        return refuse("the norm is scaled by the constant {c}", c=product.coefficient, depth=3)
    rest: list[tuple[Term, int]] = []
    found_rstd: Term | None = None
    for factor, exponent in product.factors:
        if factor.atom is root.outvars[0] and exponent == wanted_exponent:
            found_rstd = factor
        else:
            rest.append((factor, exponent))
    if found_rstd is None:
        return refuse("the standard deviation is used as a factor, not as a divisor", depth=3)
    full = [(f, e) for f, e in rest if f.axis_set == top.axis_set]
    narrow = [(f, e) for f, e in rest if f.axis_set != top.axis_set]
    if len(full) != 1 or full[0][1] != 1:
        return refuse("the product has {n} full-size factors besides 1/sqrt(variance + eps)", n=len(full), depth=3)
    centred = _centred(terms, full[0][0], moments)
    if isinstance(centred, Refusal):
        return centred
    x, renamed, steps = centred
    axis = renamed[moments.axis]
    # Along an axis that x has not, the standard deviation was broadcast: it is the same at every index.
    if any(found is not renamed.get(a, found) for found, a in zip(found_rstd.axes, rstd.axes, strict=True) if a):
        return refuse("the standard deviation of one row divides another", depth=4)
    if len(narrow) > 1 or any(e != 1 or f.axis_set != {axis} for f, e in narrow):
        return refuse("a factor of the norm does not run along the normalised axis alone", depth=4)
    scale = narrow[0][0] if narrow else None
    return _Found(var, top, scale, x, axis, (*product_path, *steps))


def _centred(terms: Terms, term: Term, moments: Moments) -> tuple[Term, dict[Axis, Axis], list[JaxprEqn]] | Refusal:
    """Reads the factor as x - mean(x), or x for rms: (x, the axes of the moments renamed to the result's, path)."""
    steps: list[JaxprEqn] = []
    term = terms.peel(term, steps)
    if not moments.centred:
        bound = terms.unify(moments.x, term, [a for a in moments.x.axes if a is not None])
        if bound is None:
            return refuse("what is divided by the root mean square is another value than x", depth=3)
        return term, bound, steps
    eqn = terms.producer(term, "sub")
    if eqn is None:
        return refuse("x is divided by its standard deviation without its mean subtracted", depth=3)
    x, mean = terms.operands(term, eqn)
    x = terms.peel(x, steps)
    bound = terms.unify(moments.x, x, [a for a in moments.x.axes if a is not None])
    if bound is None:
        return refuse("the variance is of another value than x", depth=3)
    if not _is_mean_of(terms, mean, x, bound[moments.axis], steps):
        return refuse("what is subtracted from x is not its mean along the normalised axis", depth=3)
    steps.append(eqn)
    return x, bound, steps


def _finish(
    terms: Terms, root: JaxprEqn, moments: Moments, found: _Found, eps: float, inner: list[JaxprEqn]
) -> Match | Refusal:
    graph = terms.graph
    x, axis = found.x, found.axis
    dims = [i for i, n in enumerate(x.atom.aval.shape) if n != 1]
    if not dims or x.axes[dims[-1]] is not axis or dims[-1] != len(x.axes) - 1:
        return refuse(
            "the normalised axis is not the last of x, of shape {shape}",
            shape=x.atom.aval.shape,
            depth=5,
            advice="kernels read rows; move the axis to the end once, outside of the model",
        )
    if [a for a in x.axes if a is not None] != [a for a in found.top.axes if a is not None]:
        return refuse("the norm's result is transposed against x", depth=5)
    result, bias, all_inner = found.var, None, [*inner, *moments.inner, *found.inner]
    if moments.centred:
        result, bias, steps = _add_bias(terms, found, axis)
        all_inner += steps
    escaped = graph.escapes(all_inner, [result])
    if escaped is not None:
        return refuse(
            "an inner value ({aval}: mean, variance or x - mean) is used elsewhere",
            aval=escaped.aval,
            depth=6,
            advice="do not return the statistics",
        )
    parameters = [t for t in (found.scale, bias) if t is not None]
    static = dict(
        kind="layer" if moments.centred else "rms",
        eps=eps,
        has_scale=found.scale is not None,
        has_bias=bias is not None,
        shape=tuple(result.aval.shape),
        dtype=result.aval.dtype.name,
    )
    name = "layer_norm" if moments.centred else "rms_norm"
    case = (("dtype", x.dtype.name), ("cols", axis.size), ("size", x.atom.aval.size))
    residual = _residual(terms, x, parameters)
    alone = Match(
        op=name,
        root=root,
        results=(result,),
        inner=tuple(all_inner),
        leaves=(x.atom, *(t.atom for t in parameters)),
        emit=emit,
        static=tuple(static.items()),
        detail=f"rows of {axis.size}",
        case=case,
    )
    if residual is not None:
        addition, first, second = residual
        total = addition.outvars[0]
        return Match(
            op=f"add_{name}",
            root=root,
            results=(result, total),
            inner=(*all_inner, addition),
            leaves=(first, second, *(t.atom for t in parameters)),
            emit=emit_with_residual,
            static=tuple(static.items()),
            detail=f"rows of {axis.size}",
            case=case,
            simpler=alone,
        )
    return alone


def _add_bias(terms: Terms, found: _Found, axis: Axis) -> tuple[Var, Term | None, list[JaxprEqn]]:
    """The norm's single use `+ bias`, where bias runs along the normalised axis."""
    graph = terms.graph
    var, steps = found.var, []
    while True:
        users = graph.users_of(var)
        if len(users) != 1 or graph.is_output(var):
            return found.var, None, []
        user = users[0]
        steps.append(user)
        if user.primitive.name == "convert_element_type" and is_float(user.outvars[0].aval.dtype):
            var = user.outvars[0]
            continue
        if user.primitive.name != "add" or user.outvars[0].aval.shape != var.aval.shape:
            return found.var, None, []
        top = terms.of(user.outvars[0])
        normalised = [terms.peel(t) for t in terms.operands(top, user)]
        product = [i for i, a in enumerate(user.invars) if a is var]
        if len(product) != 1:
            return found.var, None, []
        bias = normalised[1 - product[0]]
        # The last axis of the sum is the normalised one: x's axes keep their order and sizes.
        if bias.axis_set != {top.axes[-1]}:
            return found.var, None, []
        return user.outvars[0], bias, steps


def _residual(terms: Terms, x: Term, parameters: list[Term]) -> tuple[JaxprEqn, Any, Any] | None:
    """x = a + b with both of x's shape and dtype."""
    eqn = terms.graph.producer(x.atom)
    if eqn is None or eqn.primitive.name != "add":
        return None
    first, second = eqn.invars
    if any(
        not isinstance(a, Var) or a.aval.shape != x.atom.aval.shape or a.aval.dtype != x.dtype for a in (first, second)
    ):
        return None
    if any(terms.graph.constant(a) is not None for a in (first, second)):
        return None
    if any(len(terms.peel(terms.of(a)).axis_set) != len(terms.of(a).axis_set) for a in (first, second)):
        return None  # a broadcast bias, which XLA adds for nothing
    if terms.graph.depends_on([t.atom for t in parameters], x.atom):
        return None
    return eqn, first, second


# --- the fused ops ----------------------------------------------------------------------------------------------------


def _parameters(parameters: tuple, has_scale: bool, has_bias: bool, kind: str) -> dict[str, Any]:
    values = iter([p.reshape(-1) for p in parameters])
    chosen: dict[str, Any] = dict(scale=next(values) if has_scale else None)
    if kind == "layer":
        chosen["bias"] = next(values) if has_bias else None
    return chosen


def emit(x, *parameters, kind, eps, has_scale, has_bias, shape, dtype):
    op = layer_norm if kind == "layer" else rms_norm
    y = op(as_precise(x, dtype), **_parameters(parameters, has_scale, has_bias, kind), eps=eps)
    return (y.reshape(shape).astype(dtype),)


def emit_with_residual(x, residual, *parameters, kind, eps, has_scale, has_bias, shape, dtype):
    op = add_layer_norm if kind == "layer" else add_rms_norm
    precise = as_precise(x, dtype), as_precise(residual, dtype)
    y, total = op(*precise, **_parameters(parameters, has_scale, has_bias, kind), eps=eps)
    return y.reshape(shape).astype(dtype), total.astype(x.dtype)
