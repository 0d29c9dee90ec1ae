"""attention: softmax(scale * query . key, masked, biased) . value, found from its second product.

The pattern lives in the axes of that product's result: t (query), s (key, contracted by the second product and reduced
by the softmax), d (contracted by the first), e (value features), and all others, which are batch axes where key or
value have them and groups of query heads where only the query has. A permuted key is no match: its s is another axis.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from zenith_jax.errors import Refusal, refuse
from zenith_jax.ir._compat import JaxprEqn
from zenith_jax.ir.graph import Graph
from zenith_jax.ir.term import Axis, Term, Terms, is_float
from zenith_jax.ops.attention import (
    HEADS_MAJOR,
    LENGTH_MAJOR,
    MASKED_ROW_MEAN,
    MASKED_ROW_NAN,
    attention_canonical,
)
from zenith_jax.passes.match._match import Match, Order, arranged, order_of, restored
from zenith_jax.passes.match.mask import MaskForm, mask_form
from zenith_jax.passes.match.softmax import MULTIPLIED, SoftmaxForm, softmax_form

# A finite mask fill must vanish beside any logit: exp(fill - max) must be 0. float16's lowest value is -65504.
FILL_LIMIT = {"float16": -6e4}
DEFAULT_FILL_LIMIT = -1e9
# A constant added to all logits does not change a softmax, as long as no fill comes near.
SHIFT_LIMIT = 1e4


@dataclasses.dataclass
class Logits:
    """What stands between softmax and the first product; filled while walking down."""

    scale: float = 1.0
    mask: MaskForm = dataclasses.field(default_factory=MaskForm)
    fills: list[float] = dataclasses.field(default_factory=list)  # as they arrive at the softmax
    added_fill: bool = False  # a finite fill was added to logits instead of replacing them
    dtypes: list[Any] = dataclasses.field(default_factory=list)  # that values are cast to on the way up
    bias: tuple[Term, float] | None = None  # with the factor that stands before it
    inner: list[JaxprEqn] = dataclasses.field(default_factory=list)


def match(graph: Graph, eqn: JaxprEqn) -> Match | Refusal | None:
    if eqn.primitive.name != "dot_general" or not is_float(eqn.outvars[0].aval.dtype):
        return None
    terms = Terms(graph)
    root = terms.of(eqn.outvars[0])
    lhs, rhs, contracted = terms.contracted(root, eqn)
    refusal: Refusal | None = None
    for probabilities, value in ((lhs, rhs), (rhs, lhs)):
        form = softmax_form(terms, probabilities)
        if isinstance(form, SoftmaxForm):
            return _match(terms, eqn, root, form, value, contracted)
        refusal = refusal or form or _softmax_above(terms, probabilities)
    return refusal


def _softmax_above(terms: Terms, term: Term) -> Refusal | None:
    """A softmax with something between it and the product: the reason to report."""
    for _ in range(4):
        term = terms.peel(term)
        eqn = terms.producer(term, "mul", "select_n", "div", "add")
        if eqn is None:
            return None
        for below in terms.operands(term, eqn):
            form = softmax_form(terms, below)
            if isinstance(form, SoftmaxForm) or (form is not None and form.reason == MULTIPLIED):
                what = {"select_n": "dropout or a mask", "mul": "dropout or a mask"}.get(eqn.primitive.name, "")
                return refuse(
                    "{what} `{primitive}` stands between the softmax and its product with value",
                    what=what or "the operation",
                    primitive=eqn.primitive.name,
                    depth=2,
                    advice="mask the logits before the softmax; switch dropout off for inference",
                )
        term = next((t for t in terms.operands(term, eqn) if terms.constant(t) is None and t.axes), term)
    return None


def _match(
    terms: Terms, eqn: JaxprEqn, root: Term, form: SoftmaxForm, value: Term, contracted: Sequence[Axis]
) -> Match | Refusal:
    s = form.axis
    if list(contracted) != [s]:
        return refuse("the softmax runs over another axis than the product with value contracts", depth=3)
    logits = Logits(dtypes=list(form.dtypes))
    found = _walk(terms, form.x, s, logits)
    if isinstance(found, Refusal):
        return found
    dot, left, right = found
    (left, left_scale), (right, right_scale) = _unscaled(terms, left), _unscaled(terms, right)
    value = terms.peel(value)
    axes = _roles(root, left, right, value, s, logits.mask.query_axis)
    if isinstance(axes, Refusal):
        return axes
    query, key = (right, left) if s in left.axis_set else (left, right)
    if axes.d not in query.axis_set or axes.e not in value.axis_set:
        return refuse("query is constant along its features", depth=5)
    inner = [eqn, *form.inner, *logits.inner, dot]
    escaped = terms.graph.escapes(inner, [eqn.outvars[0]])
    if escaped is not None:
        return refuse(
            "an inner value ({aval}: the logits or the probabilities) is used elsewhere too",
            aval=escaped.aval,
            depth=8,
            advice="do not return the attention weights",
        )
    return _build(terms, eqn, root, query, key, value, axes, s, logits, logits.scale * left_scale * right_scale, inner)


# --- the logits -------------------------------------------------------------------------------------------------------


def _walk(terms: Terms, x: Term, s: Axis, logits: Logits) -> tuple[JaxprEqn, Term, Term] | Refusal:
    """Down from the softmax's input through masks, bias and scale to the product of query and key."""
    while True:
        path: list[JaxprEqn] = []
        x = terms.peel(x, path)
        logits.inner += path
        logits.dtypes += [e.outvars[0].aval.dtype for e in path]
        eqn = terms.producer(x)
        name = eqn.primitive.name if eqn is not None else ""
        if eqn is None:
            return refuse("the softmax's input is not a product of query and key", depth=3)
        if name == "dot_general":
            lhs, rhs, contracted = terms.contracted(x, eqn)
            if len(contracted) != 1:
                return refuse("the first product contracts {n} axes, attention one", n=len(contracted), depth=4)
            return eqn, lhs, rhs
        below: Term | Refusal
        if name == "select_n":
            below = _walk_mask(terms, x, eqn, s, logits)
        elif name in ("mul", "div", "neg"):
            below = _walk_scale(terms, x, eqn, logits)
        elif name in ("add", "sub"):
            below = _walk_bias(terms, x, eqn, s, logits)
        else:
            return refuse("`{name}` stands between the product of query and key and the softmax", name=name, depth=4)
        if isinstance(below, Refusal):
            return below
        logits.inner.append(eqn)
        x = below


def _leads_to_dot(terms: Terms, term: Term) -> bool:
    """Whether the term is a product of two matrices, scaled, masked or biased."""
    for _ in range(12):
        term = terms.peel(term)
        eqn = terms.producer(term, "dot_general", "mul", "div", "neg", "add", "sub", "select_n")
        if eqn is None:
            return False
        if eqn.primitive.name == "dot_general":
            return True
        operands = terms.operands(term, eqn)
        if eqn.primitive.name == "select_n":
            operands = operands[1:]
        operands = [t for t in operands if terms.constant(t) is None]
        if len(operands) == 2:
            return any(_leads_to_dot(terms, t) for t in operands)
        if not operands:
            return False
        term = operands[0]
    return False


def _walk_scale(terms: Terms, x: Term, eqn: JaxprEqn, logits: Logits) -> Term | Refusal:
    operands = terms.operands(x, eqn)
    if eqn.primitive.name == "neg":
        factor, below = -1.0, operands[0]
    else:
        constants = [terms.constant(t) for t in operands]
        if eqn.primitive.name == "div" and constants[1] is not None:
            factor, below = 1 / constants[1] if constants[1] else math.inf, operands[0]
        elif eqn.primitive.name == "mul" and (constants[0] is None) != (constants[1] is None):
            i = 0 if constants[0] is None else 1
            factor, below = float(constants[1 - i]), operands[i]  # pyright: ignore[reportArgumentType]
        else:
            return refuse(
                "the scale of the logits depends on data",
                depth=4,
                advice="a Python number or a constant scale is fused",
            )
    if not math.isfinite(factor) or (factor <= 0 and logits.fills):
        return refuse("the logits are scaled by {factor}", factor=factor, depth=4)
    logits.scale *= factor
    return below


def _walk_mask(terms: Terms, x: Term, eqn: JaxprEqn, s: Axis, logits: Logits) -> Term | Refusal:
    which, if_false, if_true = terms.operands(x, eqn)[:3]
    if len(eqn.invars) != 3 or which.dtype != bool:
        return refuse("a select with more than two cases", depth=4)
    fill, below, negated = terms.constant(if_false), if_true, False
    if fill is None:
        fill, below, negated = terms.constant(if_true), if_false, True
    if fill is None:
        return refuse("the mask fills in values that are not one constant", depth=4)
    fill_after = _at_softmax(fill, x, logits)
    limit = FILL_LIMIT.get(x.dtype.name, DEFAULT_FILL_LIMIT)
    if not fill_after <= limit:
        return refuse(
            "the mask's fill {fill} is not low enough to vanish in the softmax",
            fill=fill_after,
            depth=5,
            advice="-inf or jnp.finfo(dtype).min is",
        )
    if logits.bias is not None and fill_after != -math.inf:
        return refuse(
            "a bias is added after the mask, whose fill {fill} is finite",
            fill=fill,
            depth=5,
            advice="add the bias first, or fill with -inf",
        )
    mask = mask_form(terms, which, s, negated)
    if isinstance(mask, Refusal):
        return mask
    both = logits.mask & mask
    if isinstance(both, Refusal):
        return both
    logits.mask = both
    logits.fills.append(fill_after)
    return below


def _at_softmax(fill: float, x: Term, logits: Logits) -> float:
    """A fill below the scales and casts above it: float32's lowest value is -inf in bfloat16, and twice it is too."""
    value = np.float64(fill) * logits.scale
    with np.errstate(all="ignore"):
        for dtype in (x.dtype, *reversed(logits.dtypes)):
            value = np.asarray(value).astype(dtype)
    return float(value)


def _walk_bias(terms: Terms, x: Term, eqn: JaxprEqn, s: Axis, logits: Logits) -> Term | Refusal:
    operands = terms.operands(x, eqn)
    leads = [_leads_to_dot(terms, t) for t in operands]
    if leads[0] == leads[1]:
        both = "both sides" if leads[0] else "neither side"
        return refuse("of the sum before the softmax, {both} is a product of query and key", both=both, depth=4)
    if eqn.primitive.name == "sub" and not leads[0]:
        return refuse("the product of query and key is subtracted from something", depth=4)
    below, bias = operands if leads[0] else operands[::-1]
    sign = -1.0 if eqn.primitive.name == "sub" else 1.0
    constant = terms.constant(bias)
    if constant is not None:
        if not math.isfinite(constant) or (logits.fills and abs(constant * logits.scale) > SHIFT_LIMIT):
            return refuse("the constant {c} is added to the logits", c=constant, depth=4)
        logits.inner.append(eqn)
        return below  # a constant added to all logits: softmax does not see it
    as_mask = _additive_mask(terms, bias, s, sign * logits.scale)
    if as_mask is not None:
        both = logits.mask & as_mask[0]
        if isinstance(both, Refusal):
            return both
        logits.mask = both
        logits.fills.append(_at_softmax(as_mask[1], x, logits))
        logits.added_fill = logits.added_fill or as_mask[1] != -math.inf
        return below
    if logits.bias is not None:
        return refuse("two biases are added to the logits", depth=5, advice="add them to each other first")
    if any(f != -math.inf for f in logits.fills) and not is_float(bias.dtype):
        return refuse("the bias has dtype {dtype}", dtype=bias.dtype, depth=5)
    logits.bias = (terms.peel(bias), sign * logits.scale)
    return below


def _additive_mask(terms: Terms, bias: Term, s: Axis, factor: float) -> tuple[MaskForm, float] | None:
    """where(m, 0, fill) that is added to the logits, as the mask m.

    Exact for fill = -inf. For a finite fill only where every row has an allowed key, as a pure band can prove.
    """
    bias = terms.peel(bias)
    eqn = terms.producer(bias, "select_n")
    if eqn is None or len(eqn.invars) != 3:
        return None
    which, if_false, if_true = terms.operands(bias, eqn)
    values = [terms.constant(if_false), terms.constant(if_true)]
    if which.dtype != bool or 0.0 not in values:
        return None
    negated = values[0] == 0.0
    fill = values[1] if negated else values[0]
    if fill is None or not fill * factor <= FILL_LIMIT.get(bias.dtype.name, DEFAULT_FILL_LIMIT):
        return None
    mask = mask_form(terms, which, s, negated)
    if isinstance(mask, Refusal):
        return None
    if fill != -math.inf:
        t = mask.query_axis
        if mask.tensors or t is None or mask.has_empty_rows(t.size, s.size):
            return None
    return mask, fill


# --- axes -------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Roles:
    """Which axis is what. None: of size 1, absent."""

    batch: tuple[Axis, ...]
    group: Axis | None
    t: Axis | None
    d: Axis
    e: Axis


def _roles(root: Term, left: Term, right: Term, value: Term, s: Axis, query_axis: Axis | None) -> Roles | Refusal:
    if (s in left.axis_set) == (s in right.axis_set):
        return refuse("the key axis is in both or in neither factor of the first product", depth=5)
    query, key = (right, left) if s in left.axis_set else (left, right)
    shared = query.axis_set & key.axis_set
    d = [a for a in shared if a not in root.axis_set]
    if len(d) != 1:
        return refuse("query and key share no contracted feature axis of size over 1", depth=5)
    e = [a for a in value.axis_set if a in root.axis_set and a not in query.axis_set | key.axis_set]
    if len(e) != 1:
        return refuse("value has {n} feature axes of size over 1, attention one", n=len(e), depth=5)
    if s not in value.axis_set:
        return refuse("value does not depend on the key axis", depth=5)
    batch = (key.axis_set | value.axis_set) - {s, d[0], e[0]}
    query_only = query.axis_set - batch - {d[0]}
    if root.axis_set != batch | query_only | {e[0]}:
        return refuse("some axes of the result are in neither query, key nor value", depth=5)
    if query_axis is not None and query_axis not in query_only:
        return refuse("the mask's query axis is no axis of the query alone", depth=5)
    ordered = [a for a in query.axes if a in query_only]
    if len(ordered) > 2:
        return refuse("the query has {n} axes that key and value lack, attention two", n=len(ordered), depth=5)
    # Of two axes without a band to tell them apart, the query length is the longer one; results are the same.
    t = query_axis if query_axis is not None else max(reversed(ordered), key=lambda a: a.size, default=None)
    group = next((a for a in ordered if a is not t), None)
    by_order = [a for a in query.axes if a in batch] + [a for a in key.axes if a in batch and a not in query.axis_set]
    by_order += [a for a in batch if a not in by_order]
    return Roles(tuple(by_order), group, t, d[0], e[0])


def _unscaled(terms: Terms, term: Term) -> tuple[Term, float]:
    """query or key without the constant factors that are used for nothing else."""
    scale = 1.0
    while True:
        term = terms.peel(term)
        eqn = terms.producer(term, "mul", "div")
        if eqn is None or terms.graph.use_count(eqn.outvars[0]) != 1:
            return term, scale
        operands = terms.operands(term, eqn)
        constants = [terms.constant(t) for t in operands]
        if constants[1] is not None and constants[0] is None:
            factor, below = constants[1], operands[0]
        elif eqn.primitive.name == "mul" and constants[0] is not None and constants[1] is None:
            factor, below = constants[0], operands[1]
        else:
            return term, scale
        if not factor or not math.isfinite(factor):
            return term, scale
        scale *= factor if eqn.primitive.name == "mul" else 1 / factor
        term = below


# --- the fused op -----------------------------------------------------------------------------------------------------


def _build(
    terms: Terms,
    eqn: JaxprEqn,
    root: Term,
    query: Term,
    key: Term,
    value: Term,
    roles: Roles,
    s: Axis,
    logits: Logits,
    scale: float,
    inner: list[JaxprEqn],
) -> Match | Refusal:
    batch: tuple[Axis | None, ...] = (None,) * (2 - len(roles.batch)) + roles.batch
    scores = (*batch, roles.group, roles.t, s)
    orders = {
        "query": order_of(query, (*batch, roles.group, roles.t, roles.d)),
        "key": order_of(key, (*batch, s, roles.d)),
        "value": order_of(value, (*batch, s, roles.e)),
        "result": order_of(root, (*batch, roles.group, roles.t, roles.e)),
    }
    masks = [(term, order_of(term, scores), negated) for term, negated in logits.mask.tensors]
    bias = None if logits.bias is None else (logits.bias[0], order_of(logits.bias[0], scores), logits.bias[1])
    if any(o is None for o in orders.values()) or any(m[1] is None for m in masks) or (bias and bias[1] is None):
        return refuse("an operand has axes that its role has not", depth=6)
    t_size = roles.t.size if roles.t is not None else 1
    empty_rows = bool(logits.mask.tensors) or logits.mask.has_empty_rows(t_size, s.size)
    if empty_rows and (len(set(logits.fills)) > 1 or logits.added_fill):
        return refuse(
            "a row without any allowed key has different fills, or logits, in it",
            depth=6,
            advice="fill with one value, in one jnp.where",
        )
    # Without a finite fill, only -inf can empty a row: NaN, as softmax gives.
    masked_row = MASKED_ROW_NAN if all(f == -math.inf for f in logits.fills) else MASKED_ROW_MEAN
    dtype = _common_dtype(query, key, value)
    leaves = [query.atom, key.atom, value.atom, *(m[0].atom for m in masks)]
    if bias:
        leaves.append(bias[0].atom)
    layout = LENGTH_MAJOR if _is_length_major(query, roles) else HEADS_MAJOR
    static: dict[str, Any] = dict(
        orders=tuple(orders.items()),
        mask_orders=tuple((m[1], m[2]) for m in masks),
        bias_order=None if bias is None else (bias[1], bias[2]),
        batch_sizes=tuple(1 if a is None else a.size for a in batch),
        scale=scale,
        left=logits.mask.left,
        right=logits.mask.right,
        masked_row=masked_row,
        layout=layout,
        dtype=dtype,
        shape=tuple(eqn.outvars[0].aval.shape),
        result_dtype=eqn.outvars[0].aval.dtype.name,
    )
    batch_size = math.prod(a.size for a in roles.batch)
    groups = roles.group.size if roles.group is not None else 1
    return Match(
        op="attention",
        root=eqn,
        results=(eqn.outvars[0],),
        inner=tuple(inner),
        leaves=tuple(leaves),
        emit=emit,
        static=tuple(static.items()),
        detail=_detail(logits, roles, s, bool(bias), len(masks)),
        case=(
            ("dtype", dtype),
            ("batch", batch_size * groups),
            ("t", t_size),
            ("s", s.size),
            ("d", roles.d.size),
            ("e", roles.e.size),
            ("has_scores", bool(bias or masks)),
            ("causal", logits.mask.right == 0),
        ),
    )


def _common_dtype(query: Term, key: Term, value: Term) -> str:
    """The dtype the kernel runs in: the widest of the three, as they come."""
    return jnp.result_type(query.dtype, key.dtype, value.dtype).name


def _is_length_major(query: Term, roles: Roles) -> bool:
    if roles.t is None or not roles.batch:
        return False
    heads = [a for a in (roles.batch[-1], roles.group) if a is not None]
    return len(roles.batch) > 1 and all(
        query.axes.index(roles.t) < query.axes.index(a) for a in heads if a in query.axes
    )


def _detail(logits: Logits, roles: Roles, s: Axis, has_bias: bool, masks: int) -> str:
    t = roles.t.size if roles.t is not None else 1
    parts = [f"t{t} s{s.size} d{roles.d.size}"]
    if logits.mask.is_band:
        parts.append("causal" if logits.mask.right == 0 and logits.mask.left > t else "band")
    if masks:
        parts.append("mask")
    if has_bias:
        parts.append("bias")
    return " ".join(parts)


def emit(
    query,
    key,
    value,
    *scores,
    orders: tuple[tuple[str, Order], ...],
    mask_orders,
    bias_order,
    batch_sizes,
    scale,
    left,
    right,
    masked_row,
    layout,
    dtype,
    shape,
    result_dtype,
):
    """Canonical attention on arrays in the program's own order of dimensions."""
    order = dict(orders)
    query, key, value = (
        _broadcast_batch(arranged(x, order[name]), batch_sizes).astype(dtype)
        for name, x in (("query", query), ("key", key), ("value", value))
    )
    mask = None
    for x, (mask_order, negated) in zip(scores[: len(mask_orders)], mask_orders, strict=True):
        part = arranged(jnp.logical_not(x) if negated else x, mask_order)
        mask = part if mask is None else mask & part
    bias = None
    if bias_order is not None:
        bias = arranged(scores[-1], bias_order[0])
        bias = bias if bias_order[1] == 1 else bias * jnp.asarray(bias_order[1], bias.dtype)
    out = attention_canonical(
        query,
        key,
        value,
        mask=mask,
        bias=bias,
        scale=scale,
        left=left,
        right=right,
        masked_row=masked_row,
        layout=layout,
    )
    return (restored(out, order["result"], shape, result_dtype),)


def _broadcast_batch(x: Any, batch_sizes: Sequence[int]) -> Any:
    sizes = (*batch_sizes, *x.shape[len(batch_sizes) :])
    return x if x.shape == sizes else jnp.broadcast_to(x, sizes)
