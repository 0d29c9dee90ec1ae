"""softmax: exp(x - max(x)) / sum(exp(x - max(x))) along one axis, wherever that axis is."""

from __future__ import annotations

import dataclasses
from typing import Any

from zenith_jax.errors import Refusal, refuse
from zenith_jax.ir._compat import JaxprEqn
from zenith_jax.ir.graph import Graph
from zenith_jax.ir.term import Axis, Term, Terms
from zenith_jax.ops import softmax as softmax_op
from zenith_jax.passes.match._match import Match, as_precise

MULTIPLIED = "the softmax is multiplied by something before it is used: a mask, dropout or a scale"


@dataclasses.dataclass(frozen=True)
class SoftmaxForm:
    """softmax of `x` along `axis`; `inner`: its equations, the views between them included. `dtypes`: those that x is
    cast to before it arrives, the last one first."""

    x: Term
    axis: Axis
    inner: tuple[JaxprEqn, ...]
    dtypes: tuple[Any, ...]


def softmax_form(terms: Terms, term: Term) -> SoftmaxForm | Refusal | None:
    """Reads the term as a softmax of another."""
    inner: list[JaxprEqn] = []
    top = terms.peel(term, inner, also=("reshape",))
    if terms.producer(top, "div", "mul") is None:
        return None
    product = terms.product(top, inner)
    numerators = [t for t, exponent in product.factors if exponent > 0]
    denominators = [t for t, exponent in product.factors if exponent < 0]
    if len(denominators) != 1 or not numerators:
        return None
    exponentials = [t for t in numerators if terms.producer(t, "exp")]
    total = terms.producer(denominators[0], "reduce_sum")
    if len(exponentials) != 1 or total is None:
        return None
    numerator = exponentials[0]
    summed, reduced = terms.reduced(denominators[0], total)
    if len(reduced) != 1:
        return refuse("the sum runs over {n} axes, a softmax over one", n=len(reduced)) if reduced else None
    bound = terms.unify(summed, numerator, reduced)
    if bound is None:
        return None
    if len(numerators) != 1 or product.coefficient != 1.0:
        return refuse(MULTIPLIED, depth=1, advice="mask the logits instead; switch dropout off for inference")
    axis = bound[reduced[0]]
    terms.peel(summed, inner)
    exponential = terms.producer(numerator, "exp")
    assert exponential is not None
    inner += [total, exponential]
    shifted = terms.peel(terms.operands(numerator, exponential)[0], inner)
    subtraction = terms.producer(shifted, "sub")
    if subtraction is None:
        return refuse(
            "exp(x) / sum(exp(x)) without the maximum subtracted first",
            depth=1,
            advice="jax.nn.softmax is safe from overflow and is fused",
        )
    x, shift = terms.operands(shifted, subtraction)
    refusal = check_shift(terms, x, shift, axis, inner)
    if refusal is not None:
        return refusal
    inner.append(subtraction)
    path: list[JaxprEqn] = []
    below = terms.peel(x, path)
    return SoftmaxForm(below, axis, (*inner, *path), tuple(e.outvars[0].aval.dtype for e in path))


def check_shift(terms: Terms, x: Term, shift: Term, axis: Axis, inner: list[JaxprEqn]) -> Refusal | None:
    """That `shift` is max(x) along `axis`, with or without stop_gradient: softmax does not depend on its shift."""
    shift = terms.peel(shift, inner, also=("stop_gradient",))
    clamp = terms.producer(shift, "max")
    if clamp is not None:  # max(-inf, reduce_max(x))
        sides = terms.operands(shift, clamp)
        rest = [t for t in sides if terms.constant(t) != float("-inf")]
        if len(rest) != 1:
            return refuse("what is subtracted before exp is not the maximum", depth=1)
        inner.append(clamp)
        shift = terms.peel(rest[0], inner, also=("stop_gradient",))
    maximum = terms.producer(shift, "reduce_max")
    if maximum is None:
        return refuse("what is subtracted before exp is not the maximum", depth=1)
    operand, reduced = terms.reduced(shift, maximum)
    inner.append(maximum)
    # stop_gradient may stand in the way of the maximum alone, or of x too.
    while (bound := terms.unify(operand, x, reduced)) is None:
        operand = terms.peel(operand, inner)
        stopped = terms.producer(operand, "stop_gradient")
        if stopped is None:
            break
        inner.append(stopped)
        operand = terms.operands(operand, stopped)[0]
    if bound is None or list(bound.values()) != [axis]:
        return refuse("the maximum is taken over another axis, or of another value, than the sum", depth=1)
    return None


def emit(x, *, axis: int, dtype: str, shape: tuple[int, ...]):
    return (softmax_op(as_precise(x, dtype), axis=axis).astype(dtype).reshape(shape),)


def match(graph: Graph, eqn: JaxprEqn) -> Match | Refusal | None:
    if eqn.primitive.name not in ("div", "mul"):
        return None
    terms = Terms(graph)
    root = eqn.outvars[0]
    top = terms.of(root)
    form = softmax_form(terms, top)
    if isinstance(form, Refusal) and form.reason == MULTIPLIED:
        return None  # the softmax is a factor of this product, and a site of its own
    if not isinstance(form, SoftmaxForm):
        return form
    if form.x.axis_set != top.axis_set or len(form.x.axis_set) != sum(n != 1 for n in root.aval.shape):
        return refuse("the softmax's input is broadcast")
    order = [form.x.axes.index(a) if a is not None else None for a in top.axes]
    shape = [n for n in form.x.atom.aval.shape if n != 1]
    if [i for i in order if i is not None] != sorted(i for i in order if i is not None) or shape != [
        n for n in root.aval.shape if n != 1
    ]:
        return refuse("the softmax's input is transposed on the way")
    escaped = graph.escapes(form.inner, [root])
    if escaped is not None:
        return refuse("an inner value of the softmax ({aval}) is used elsewhere", aval=escaped.aval, depth=2)
    return Match(
        op="softmax",
        root=eqn,
        results=(root,),
        inner=form.inner,
        leaves=(form.x.atom,),
        emit=emit,
        static=(
            ("axis", form.x.axes.index(form.axis)),
            ("dtype", root.aval.dtype.name),
            ("shape", tuple(root.aval.shape)),
        ),
        case=(("dtype", form.x.dtype.name), ("cols", form.axis.size), ("size", root.aval.size)),
    )
