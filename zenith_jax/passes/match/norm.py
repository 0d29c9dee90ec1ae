"""layer_norm and rms_norm, with the residual add in front where there is one; found from 1/sqrt(variance + eps)."""

from __future__ import annotations

import dataclasses
from typing import Any

from zenith_jax.errors import Refusal, refuse
from zenith_jax.ir._compat import JaxprEqn, Var
from zenith_jax.ir.graph import VIEWS, Graph
from zenith_jax.ir.term import Axis, Term, Terms, is_float
from zenith_jax.ops import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from zenith_jax.ops.norm import standardised
from zenith_jax.passes.match._match import Match, as_precise
from zenith_jax.passes.match.moments import eps_and_variance, square_of, unclamped
from zenith_jax.passes.match.normalised import Moments, Normalised, distributed, is_mean_of, mean_along, normalised


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


def _moments(terms: Terms, term: Term, path: list[JaxprEqn]) -> Moments | Refusal | None:
    """Reads a term as a variance or a mean square. The term may be clamped at 0: max(0, v)."""
    below = unclamped(terms, term, path)
    if below is None:
        return None
    term = below
    difference = terms.producer(term, "sub")
    if difference is not None:
        return _difference_of_moments(terms, term, difference, path)
    found = mean_along(terms, term, path)
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
            mean_found = mean_along(terms, mean, steps)
            if isinstance(mean_found, Refusal):
                return mean_found
            if mean_found is not None:
                if not is_mean_of(terms, mean, x, axis, steps):
                    return refuse("the variance is centred by a mean over another axis or of another value", depth=2)
                path += [subtraction, *steps]
                return Moments(terms.peel(x, path), axis, True, terms.peel(mean), tuple(path))
    return Moments(base, axis, False, None, tuple(path))


def _difference_of_moments(terms: Terms, term: Term, eqn: JaxprEqn, path: list[JaxprEqn]) -> Moments | Refusal | None:
    """mean(x^2) - mean(x)^2."""
    first, second = terms.operands(term, eqn)
    steps: list[JaxprEqn] = [eqn]
    found = mean_along(terms, first, steps)
    if found is None or isinstance(found, Refusal):
        return found
    squared, axis = found
    x = square_of(terms, squared, steps)
    mean = square_of(terms, second, steps)
    if x is None or mean is None:
        return None
    if not is_mean_of(terms, mean, x, axis, steps):
        return refuse("mean(x^2) and mean(x)^2 are of different values or axes", depth=2)
    path.extend(steps)
    return Moments(x, axis, True, mean, tuple(path), in_one_pass=True)


# --- from the reciprocal standard deviation up to the result ----------------------------------------------------------


def _climb(
    terms: Terms, root: JaxprEqn, rstd: Term, moments: Moments, eps: float, inner: list[JaxprEqn]
) -> Match | Refusal:
    graph = terms.graph
    var, best, path = root.outvars[0], None, []
    refusal: Refusal | None = None
    while True:
        users = graph.users_of(var)
        if len(users) != 1 or graph.is_output(var):
            if best is None and moments.centred:
                found = distributed(terms, var, root, rstd, moments)
                if isinstance(found, Normalised):
                    best = dataclasses.replace(found, inner=(*found.inner, *path))
                else:
                    refusal = found or refusal
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
            found = normalised(terms, var, root, rstd, moments)
            if isinstance(found, Normalised):
                best = dataclasses.replace(found, inner=(*found.inner, *path))
            elif best is not None:
                break  # this product has one factor more: the norm ends below it
            else:
                refusal = found
    if best is None:
        return refusal or refuse("the reciprocal standard deviation does not multiply x - mean", depth=3)
    return _finish(terms, root, moments, best, eps, inner)


def _finish(
    terms: Terms, root: JaxprEqn, moments: Moments, found: Normalised, eps: float, inner: list[JaxprEqn]
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
    result, bias, all_inner = found.var, found.bias, [*inner, *moments.inner, *found.inner]
    if moments.centred and found.bias is None:
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
    if moments.in_one_pass:
        form = dataclasses.replace(alone, op="layer_norm_in_two_passes", emit=emit_in_two_passes, is_form=True)
        alone = dataclasses.replace(alone, simpler=form)
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


def _add_bias(terms: Terms, found: Normalised, axis: Axis) -> tuple[Var, Term | None, list[JaxprEqn]]:
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
        operands = [terms.peel(t) for t in terms.operands(top, user)]
        product = [i for i, a in enumerate(user.invars) if a is var]
        if len(product) != 1:
            return found.var, None, []
        bias = operands[1 - product[0]]
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


def emit_in_two_passes(x, *parameters, kind, eps, has_scale, has_bias, shape, dtype):
    """In XLA's operations: the deviations' squares are summed, of which its compiler for GPUs makes one kernel; of
    mean(x^2) - mean(x)^2 it makes two."""
    chosen = _parameters(parameters, has_scale, has_bias, kind)
    y, _ = standardised(x, eps, centre=True)
    if chosen["scale"] is not None:
        y = y * chosen["scale"]
    if chosen["bias"] is not None:
        y = y + chosen["bias"]
    return (y.reshape(shape).astype(dtype),)


def emit_with_residual(x, residual, *parameters, kind, eps, has_scale, has_bias, shape, dtype):
    op = add_layer_norm if kind == "layer" else add_rms_norm
    precise = as_precise(x, dtype), as_precise(residual, dtype)
    y, total = op(*precise, **_parameters(parameters, has_scale, has_bias, kind), eps=eps)
    return y.reshape(shape).astype(dtype), total.astype(x.dtype)
