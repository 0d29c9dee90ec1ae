"""Softmax cross entropy of integer labels, found from the logarithm of a sum of exponentials.

What is replaced are not losses, which differ, but the values of a row that all of them are made of:

  lse                                   log(sum(exp(x - max))) + max
  x[label], sum(x * w), sum(x)          of logits
  (x - lse)[label], sum((x - lse) * w), sum(x - lse)  of log-probabilities

where w is a one-hot label, smoothed or scaled by constants. Whatever the program does with them (a mean, a mask for
padding, a z-loss) stays as it is written. Other uses of the log-probabilities are refused: they are not computed.
Where the logits are a linear layer's, and nothing else reads them, the match takes it in (linear_cross_entropy.py).
"""

from __future__ import annotations

import dataclasses

from zenith_jax.errors import Refusal, refuse
from zenith_jax.ir._compat import JaxprEqn, Var
from zenith_jax.ir.graph import VIEWS, Graph
from zenith_jax.ir.term import Axis, Term, Terms, is_float
from zenith_jax.ops.cross_entropy import row_statistics
from zenith_jax.passes.match._match import Match, Order, arranged, order_of
from zenith_jax.passes.match.linear_cross_entropy import with_layer
from zenith_jax.passes.match.pick import Pick, pick_form
from zenith_jax.passes.match.rows import LOG_PROBABILITY, LOGIT, LSE, Result, Rows
from zenith_jax.passes.match.softmax import check_shift

# Between the logarithm, or the logits, and what picks from them; and how many equations are looked at.
_CLIMBED = VIEWS | {"add", "sub", "neg", "mul", "div", "select_n"}
_MAX_CLIMBED = 64


@dataclasses.dataclass(frozen=True)
class LogSum:
    """log(sum over `axis` of exp(x - shift)); `shift` is max(x), and `guarded` if 0 where that is infinite."""

    x: Term
    axis: Axis
    shift: Term
    guarded: bool


@dataclasses.dataclass(frozen=True)
class Reading:
    """One value of the program: `out`, from logits `x` along `axis`."""

    kind: str
    out: Term
    x: Term
    axis: Axis
    inner: tuple[JaxprEqn, ...]
    guarded: bool = False
    pick: Pick | None = None


def match(graph: Graph, eqn: JaxprEqn) -> Match | Refusal | None:
    """`eqn` is the logarithm."""
    if eqn.primitive.name != "log" or not is_float(eqn.outvars[0].aval.dtype):
        return None
    terms = Terms(graph)
    base = _log_sum(terms, terms.of(eqn.outvars[0]), [])
    if base is None:
        return None
    logs = [e.outvars[0] for e in graph.users_of(eqn.invars[0]) if e.primitive.name == "log"]
    if logs[0] is not eqn.outvars[0]:
        return None  # the logarithm written again, read with the first
    above = _above(graph, logs)
    logits = [base.x.atom] if isinstance(base.x.atom, Var) else []
    readings = [_read(terms, e) for e in above]
    readings = [r for r in readings if r is not None and _is_of(graph, r, base)]
    if any(r.kind == LSE for r in readings):
        seen = {id(e) for e in above}
        more = [_read(terms, e) for e in _above(graph, logits) if id(e) not in seen]
        readings += [r for r in more if r is not None and r.kind == LOGIT and _is_of(graph, r, base)]
    return _match(terms, eqn, base, readings)


def _above(graph: Graph, start: list[Var]) -> list[JaxprEqn]:
    """Sums and gathers that are computed from the start by little else, and what lies between."""
    found: dict[int, JaxprEqn] = {}
    queue = list(start)
    while queue and len(found) < _MAX_CLIMBED:
        for user in graph.users_of(queue.pop(0)):
            if id(user) in found:
                continue
            if user.primitive.name in _CLIMBED:
                queue.append(user.outvars[0])
            if user.primitive.name in _CLIMBED or user.primitive.name in ("gather", "reduce_sum"):
                found[id(user)] = user
    return [e for e in found.values() if e.primitive.name in ("add", "gather", "reduce_sum")]


def _is_of(graph: Graph, reading: Reading, base: LogSum) -> bool:
    """Whether it reads the same logits along the same dimension."""
    same = graph.same(reading.x.atom, base.x.atom)
    return same and reading.x.axes.index(reading.axis) == base.x.axes.index(base.axis)


# --- reading downwards ------------------------------------------------------------------------------------------------


def _log_sum(terms: Terms, log: Term, inner: list[JaxprEqn]) -> LogSum | None:
    """Reads the peeled term as log(sum(exp(x - max(x))))."""
    eqn = terms.producer(log, "log")
    if eqn is None:
        return None
    inner.append(eqn)
    total = terms.peel(terms.operands(log, eqn)[0], inner)
    absolute = terms.producer(total, "abs")  # jax.nn.logsumexp: the sum of exponentials is its own absolute value
    if absolute is not None:
        inner.append(absolute)
        total = terms.peel(terms.operands(total, absolute)[0], inner)
    reduction = terms.producer(total, "reduce_sum")
    if reduction is None:
        return None
    summed, reduced = terms.reduced(total, reduction)
    exponential = terms.peel(summed, inner)
    exp = terms.producer(exponential, "exp")
    if len(reduced) != 1 or exp is None:
        return None
    shifted = terms.peel(terms.operands(exponential, exp)[0], inner)
    subtraction = terms.producer(shifted, "sub")
    if subtraction is None:
        return None
    inner += [reduction, exp, subtraction]
    x, shift = terms.operands(shifted, subtraction)
    x = terms.peel(x, inner)
    if not isinstance(x.atom, Var) or reduced[0] not in x.axis_set:
        return None
    shift = terms.peel(shift, inner)
    maximum = _finite(terms, shift, inner)
    if check_shift(terms, x, maximum, reduced[0], inner) is not None:
        return None
    return LogSum(x, reduced[0], shift, maximum.atom is not terms.peel(shift, also=("stop_gradient",)).atom)


def _finite(terms: Terms, shift: Term, inner: list[JaxprEqn]) -> Term:
    """m of where(isfinite(m), m, 0), which spares inf - inf and changes nothing else."""
    shift = terms.peel(shift, inner, also=("stop_gradient",))
    eqn = terms.producer(shift, "select_n")
    if eqn is None or len(eqn.invars) != 3:
        return shift
    which, otherwise, below = terms.operands(shift, eqn)
    test = terms.producer(which, "is_finite")
    if test is None or terms.constant(otherwise) != 0 or not terms.same(terms.operands(which, test)[0], below):
        return shift
    inner += [eqn, test]
    return below


def _lse(terms: Terms, term: Term, inner: list[JaxprEqn]) -> LogSum | None:
    """log(sum(exp(x - shift))) + shift."""
    top = terms.peel(term, inner)
    addition = terms.producer(top, "add")
    if addition is None:
        return None
    for log, shift in _both_orders(terms.operands(top, addition)):
        walked: list[JaxprEqn] = []
        found = _log_sum(terms, terms.peel(log, walked), walked)
        if found is not None and terms.same(found.shift, terms.peel(shift, walked)):
            inner += [addition, *walked]
            return found
    return None


def _both_orders(pair: list[Term]) -> tuple[tuple[Term, Term], tuple[Term, Term]]:
    return (pair[0], pair[1]), (pair[1], pair[0])


def _log_probability(terms: Terms, term: Term, axis: Axis, inner: list[JaxprEqn]) -> LogSum | None:
    """(x - shift) - log(sum(exp(x - shift))), or x - lse; with `axis` as x's."""
    top = terms.peel(term, inner)
    subtraction = terms.producer(top, "sub")
    if subtraction is None:
        return None
    inner.append(subtraction)
    first, second = terms.operands(top, subtraction)
    found = _lse(terms, second, inner)
    if found is None:
        found = _log_sum(terms, terms.peel(second, inner), inner)
        shifted = terms.peel(first, inner)
        difference = terms.producer(shifted, "sub")
        if found is None or difference is None:
            return None
        inner.append(difference)
        first, shift = terms.operands(shifted, difference)
        if not terms.same(found.shift, shift):
            return None
    bound = terms.unify(found.x, first, [found.axis])
    if bound is None or bound.get(found.axis) is not axis:
        return None
    return LogSum(terms.peel(first, inner), axis, found.shift, found.guarded)


def _read(terms: Terms, eqn: JaxprEqn) -> Reading | None:
    out = terms.of(eqn.outvars[0])
    inner: list[JaxprEqn] = []
    if eqn.primitive.name == "add":
        found = _lse(terms, out, inner)
        return Reading(LSE, out, found.x, found.axis, tuple(inner), found.guarded) if found is not None else None
    pick = pick_form(terms, out, eqn)
    if pick is None or pick.axis not in pick.x.axis_set:
        return None
    inner += pick.inner
    log_probability = _log_probability(terms, pick.x, pick.axis, inner)
    if log_probability is not None:
        x, guarded = log_probability.x, log_probability.guarded
        return Reading(LOG_PROBABILITY, out, x, pick.axis, tuple(inner), guarded, pick)
    inner = list(pick.inner)
    x = terms.peel(pick.x, inner)
    return Reading(LOGIT, out, x, pick.axis, tuple(inner), pick=pick) if pick.axis in x.axis_set else None


# --- the fused op -----------------------------------------------------------------------------------------------------


def _match(terms: Terms, eqn: JaxprEqn, base: LogSum, readings: list[Reading]) -> Match | Refusal | None:
    graph = terms.graph
    picked = next((r for r in readings if r.pick is not None and r.pick.labels is not None), None)
    if picked is None or picked.pick is None or picked.pick.labels is None:
        return None
    odd = next((r.pick for r in readings if r.pick is not None and r.pick.on * r.pick.off < 0), None)
    if odd is not None:
        # on * x[label] + off * sum(x) is then inf - inf for x[label] = -inf, where the program has an infinity.
        a, b = odd.on + odd.off, odd.off
        return refuse("its label weighs {a:.3g} of a row, every other class {b:.3g}", a=a, b=b, depth=3)
    labels = picked.pick.labels
    class_dim = base.x.axes.index(base.axis)
    batch_dims = [d for d, a in enumerate(base.x.axes) if a is not None and d != class_dim]
    label_order = _label_order(picked, batch_dims)
    # Of other labels, for a second loss on the same logits, only the first are taken.
    readings = [
        r
        for r in readings
        if r.pick is None
        or r.pick.labels is None
        or (
            graph.same(r.pick.labels.atom, labels.atom)
            and r.pick.outside is picked.pick.outside
            and _label_order(r, batch_dims) == label_order
        )
    ]
    inner = [e for r in readings for e in r.inner]
    readings = [r for r in readings if r.kind != LSE or _is_used(graph, r.out.atom, inner)]
    results = [r.out.atom for r in readings]
    orders = [order_of(r.out, [r.x.axes[d] for d in batch_dims]) for r in readings]
    if label_order is None or any(o is None for o in orders):
        return refuse("the labels or the loss have axes that the logits have not", depth=3)
    escaped = graph.escapes(inner, results)
    if escaped is not None:
        return refuse(
            "the log-probabilities, or what leads to them ({aval}), are used elsewhere too",
            aval=escaped.aval,
            depth=4,
            advice="take the accuracy from the logits: their argmax is the same",
        )
    if any(graph.depends_on([labels.atom], var) for var in results):
        return refuse("the labels depend on the loss", depth=4)
    rows = Rows(
        label_order,
        picked.pick.outside,
        tuple(
            Result(
                r.kind,
                r.pick.on if r.pick and r.pick.labels else 0.0,
                r.pick.off if r.pick else 0.0,
                r.pick.multiplied if r.pick else False,
                r.guarded,
                order,
                tuple(r.out.atom.aval.shape),
                r.out.atom.aval.dtype.name,
            )
            for r, order in zip(readings, orders, strict=True)
            if order is not None
        ),
    )
    classes = base.axis.size
    alone = Match(
        op="cross_entropy",
        root=eqn,
        results=tuple(results),
        inner=tuple({id(e): e for e in inner}.values()),
        leaves=(base.x.atom, labels.atom),
        emit=emit,
        static=(("logits_order", (*batch_dims, class_dim)), ("rows", rows)),
        detail=f"rows of {classes}",
        case=(("dtype", base.x.dtype.name), ("cols", classes), ("size", base.x.atom.aval.size)),
    )
    return with_layer(terms, alone, class_dim)


def _label_order(reading: Reading, batch_dims: list[int]) -> Order | None:
    if reading.pick is None or reading.pick.labels is None:
        return None
    return order_of(reading.pick.labels, [reading.x.axes[d] for d in batch_dims])


def _is_used(graph: Graph, var: Var, inner: list[JaxprEqn]) -> bool:
    """Whether anything but the equations that the op replaces reads the value."""
    ids = {id(e) for e in inner}
    return graph.is_output(var) or any(id(e) not in ids for e in graph.users_of(var))


def emit(logits, labels, *, logits_order: Order, rows: Rows):
    logits = arranged(logits, logits_order)
    *batch, classes = logits.shape
    labels = rows.labels(labels, batch, classes)
    return rows.values(row_statistics(logits, labels), labels, classes)
