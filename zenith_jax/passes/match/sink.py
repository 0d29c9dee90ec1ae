"""Softmax with a sink: one more logit in each row that takes its share of the probabilities and is then dropped.

Written as a column, softmax(concatenate([x, sink]))[..., :-1], or as a term, exp(x - m) / (sum(exp(x - m)) +
exp(sink - m)) with m = max(max(x), sink). Xiao et al. 2023, arXiv:2309.17453.
"""

from __future__ import annotations

import dataclasses

from zenith_jax.errors import Refusal, refuse
from zenith_jax.ir._compat import JaxprEqn
from zenith_jax.ir.term import Axis, Term, Terms
from zenith_jax.passes.match.softmax import SoftmaxForm, check_shift, softmax_form


@dataclasses.dataclass(frozen=True)
class SinkForm:
    """`softmax` without its sink; the sink has its axes but the softmax's, or fewer, or is a number."""

    softmax: SoftmaxForm
    sink: Term | float


def sink_form(terms: Terms, term: Term) -> SinkForm | Refusal | None:
    """Reads the term as probabilities beside a sink."""
    inner: list[JaxprEqn] = []
    top = terms.peel(term, inner, also=("reshape",))
    if terms.producer(top, "slice") is not None:
        return _column(terms, top, inner)
    return _addend(terms, top, inner) if terms.producer(top, "div", "mul") is not None else None


# --- softmax(concatenate([x, sink]))[..., :-1] ------------------------------------------------------------------------


def _column(terms: Terms, top: Term, inner: list[JaxprEqn]) -> SinkForm | Refusal | None:
    cut = terms.producer(top, "slice")
    assert cut is not None
    start, limit, strides = (cut.params[k] for k in ("start_indices", "limit_indices", "strides"))
    shape = cut.invars[0].aval.shape
    shorter = [d for d, n in enumerate(shape) if limit[d] - start[d] != n]
    if len(shorter) != 1 or (strides is not None and any(n != 1 for n in strides)):
        return None
    (dim,) = shorter
    kept = top.axes[dim]
    if kept is None or shape[dim] != kept.size + 1:
        return None
    whole = Axis(shape[dim], "c")
    form = softmax_form(terms, Term(cut.invars[0], (*top.axes[:dim], whole, *top.axes[dim + 1 :])))
    if not isinstance(form, SoftmaxForm) or form.axis is not whole:
        return None
    inner += [cut, *form.inner]
    x = form.x
    dtypes = list(form.dtypes)
    shifted = terms.producer(x, "sub")  # of the maximum, for safety: softmax does not depend on it
    if shifted is not None:
        x, shift = terms.operands(x, shifted)
        refusal = check_shift(terms, x, shift, whole, inner)
        if refusal is not None:
            return refusal
        path: list[JaxprEqn] = []
        x = terms.peel(x, path)
        dtypes += [e.outvars[0].aval.dtype for e in path]
        inner += [shifted, *path]
    joined = terms.producer(x, "concatenate")
    if joined is None or whole not in x.axes or len(joined.invars) != 2:
        return None
    d = x.axes.index(whole)
    which = 0 if start[dim] == 0 else 1
    sizes = [a.aval.shape[d] for a in joined.invars]
    if joined.params["dimension"] != d or sizes[which] != kept.size:
        return refuse("the column that is dropped after the softmax is not the one that was added", depth=3)
    inner.append(joined)
    logits, sink = (
        Term(joined.invars[i], (*x.axes[:d], axis, *x.axes[d + 1 :])) for i, axis in ((which, kept), (1 - which, None))
    )
    return SinkForm(SoftmaxForm(logits, kept, tuple(inner), tuple(dtypes)), terms.peel(sink))


# --- exp(x - m) / (sum(exp(x - m)) + exp(sink - m)) -------------------------------------------------------------------


def _addend(terms: Terms, top: Term, inner: list[JaxprEqn]) -> SinkForm | Refusal | None:
    product = terms.product(top, inner)
    numerators = [t for t, exponent in product.factors if exponent > 0]
    denominators = [t for t, exponent in product.factors if exponent < 0]
    if len(numerators) != 1 or len(denominators) != 1 or product.coefficient != 1.0:
        return None
    exponential = terms.producer(numerators[0], "exp")
    addition = terms.producer(denominators[0], "add")
    if exponential is None or addition is None:
        return None
    for total, rest in _both_orders(terms.operands(denominators[0], addition)):
        path: list[JaxprEqn] = [exponential, addition]
        total, rest = terms.peel(total, path), terms.peel(rest, path)
        reduction, sink_exponential = terms.producer(total, "reduce_sum"), terms.producer(rest, "exp")
        if reduction is None or sink_exponential is None:
            continue
        summed, reduced = terms.reduced(total, reduction)
        bound = terms.unify(summed, numerators[0], reduced)
        if bound is None or len(bound) != 1:
            continue
        axis = bound[reduced[0]]
        terms.peel(summed, path)
        x = _shifted(terms, terms.operands(numerators[0], exponential)[0], path)
        sink = _shifted(terms, terms.operands(rest, sink_exponential)[0], path)
        if x is None or sink is None or not isinstance(x[0], Term) or not terms.same(x[1], sink[1]):
            return None
        path += [reduction, sink_exponential]
        refusal = _check_maximum(terms, x[0], sink[0], x[1], axis, path)
        if refusal is not None:
            return refusal
        casts: list[JaxprEqn] = []
        below = terms.peel(x[0], casts)
        dtypes = tuple(e.outvars[0].aval.dtype for e in casts)
        return SinkForm(SoftmaxForm(below, axis, (*inner, *path, *casts), dtypes), sink[0])
    return None


def _shifted(terms: Terms, term: Term, path: list[JaxprEqn]) -> tuple[Term | float, Term] | None:
    """(x, m) of x - m; of -m, x is 0."""
    term = terms.peel(term, path)
    eqn = terms.producer(term, "sub", "neg")
    if eqn is None:
        return None
    path.append(eqn)
    operands = terms.operands(term, eqn)
    if eqn.primitive.name == "neg":
        return 0.0, terms.peel(operands[0], path)
    constant = terms.constant(operands[0])
    x = terms.peel(operands[0]) if constant is None else constant
    return x, terms.peel(operands[1], path)


def _check_maximum(
    terms: Terms, x: Term, sink: Term | float, m: Term, axis: Axis, path: list[JaxprEqn]
) -> Refusal | None:
    """That m is max(max(x), sink): a row of -inf only then gives 0, and nothing overflows."""
    m = terms.peel(m, path, also=("stop_gradient",))
    joined = terms.producer(m, "max")
    if joined is None:
        return refuse("the maximum that is subtracted leaves out the sink", depth=1)
    path.append(joined)
    for of_x, of_sink in _both_orders(terms.operands(m, joined)):
        of_sink = terms.peel(of_sink, also=("stop_gradient",))
        if terms.same(of_sink, sink) if isinstance(sink, Term) else terms.constant(of_sink) == sink:
            return check_shift(terms, x, of_x, axis, path)
    return refuse("the maximum that is subtracted leaves out the sink", depth=1)


def _both_orders(pair: list[Term]) -> tuple[tuple[Term, Term], tuple[Term, Term]]:
    return (pair[0], pair[1]), (pair[1], pair[0])
