"""attention: softmax(scale * query . key, masked, biased) . value, found from its second product.

The pattern lives in the axes of that product's result: t (query), s (key, contracted by the second product and reduced
by the softmax), d (contracted by the first), e (value features), and all others, which are batch axes where key or
value have them and groups of query heads where only the query has. A permuted key is no match: its s is another axis.
"""

from __future__ import annotations

import dataclasses
import functools as ft
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from zenith_jax.errors import Refusal, refuse
from zenith_jax.ir import _compat
from zenith_jax.ir._compat import JaxprEqn
from zenith_jax.ir.graph import Graph
from zenith_jax.ir.term import Axis, Term, Terms, is_float
from zenith_jax.ops.attention_kernels import (
    HEADS_MAJOR,
    LENGTH_MAJOR,
    MASKED_ROW_MEAN,
    MASKED_ROW_NAN,
    attention_canonical,
    with_nan_rows_zero,
    with_sink,
)
from zenith_jax.passes.match._match import Match, Order, arranged, is_wider, order_of, restored
from zenith_jax.passes.match.attention_logits import Logits, walk
from zenith_jax.passes.match.mask import MaskForm
from zenith_jax.passes.match.mask_structure import Source, StaticLine, interval, static_line
from zenith_jax.passes.match.sink import SinkForm, sink_form
from zenith_jax.passes.match.softmax import MULTIPLIED, SoftmaxForm, softmax_form


@dataclasses.dataclass(frozen=True)
class Reading:
    """Attention as it was read off a program. key and value as they were found, `split` is for the reader to do."""

    terms: Terms
    eqn: JaxprEqn
    root: Term
    query: Term
    key: Term
    value: Term
    roles: Roles
    s: Axis
    logits: Logits
    sink: Term | float
    guarded: bool
    inner: tuple[JaxprEqn, ...]


def match(graph: Graph, eqn: JaxprEqn) -> Match | Refusal | None:
    found = read(graph, eqn)
    return build(found) if isinstance(found, Reading) else found


def read(graph: Graph, eqn: JaxprEqn) -> Reading | Refusal | None:
    if eqn.primitive.name != "dot_general" or not is_float(eqn.outvars[0].aval.dtype):
        return None
    refusal: Refusal | None = None
    for side in (0, 1):
        terms = Terms(graph)  # of each attempt: it learns which axes are merged
        root = terms.of(eqn.outvars[0])
        *operands, contracted = terms.contracted(root, eqn)
        guard: list[JaxprEqn] = []
        probabilities, value = _unguarded(terms, operands[side], guard), operands[1 - side]
        form = softmax_form(terms, probabilities)
        if isinstance(form, SoftmaxForm):
            return _read(terms, eqn, root, SinkForm(form, -math.inf), guard, value, contracted)
        beside = sink_form(terms, probabilities)
        if isinstance(beside, SinkForm):
            return _read(terms, eqn, root, beside, guard, value, contracted)
        refusal = refusal or beside or form or _softmax_above(terms, probabilities)
    return refusal


def _unguarded(terms: Terms, term: Term, guard: list[JaxprEqn]) -> Term:
    """p of where(isnan(p), 0, p), which is how PyTorch's exporters make 0 of queries without a key."""
    path: list[JaxprEqn] = []
    top = terms.peel(term, path)
    select = terms.producer(top, "select_n")
    if select is None or len(select.invars) != 3:
        return term
    which, otherwise, chosen = terms.operands(top, select)
    path.append(select)
    which = terms.peel(which, path)
    test = terms.producer(which, "ne", "is_finite")
    if test is None:
        return term
    if test.primitive.name == "is_finite":
        otherwise, chosen = chosen, otherwise
    tested = terms.operands(which, test)
    if terms.constant(chosen) != 0 or not all(terms.same(t, otherwise) for t in tested):
        return term
    for t in tested:
        terms.peel(t, path)
    guard += [*path, test]
    return otherwise


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


def _read(
    terms: Terms,
    eqn: JaxprEqn,
    root: Term,
    probabilities: SinkForm,
    guard: list[JaxprEqn],
    value: Term,
    contracted: Sequence[Axis],
) -> Reading | Refusal:
    form = probabilities.softmax
    s = form.axis
    if list(contracted) != [s]:
        return refuse("the softmax runs over another axis than the product with value contracts", depth=3)
    logits = Logits(dtypes=list(form.dtypes))
    found = walk(terms, form.x, s, logits)
    if isinstance(found, Refusal):
        return found
    dot, left, right = found
    (left, left_scale), (right, right_scale) = _unscaled(terms, left), _unscaled(terms, right)
    value = terms.peel(value)
    heads = left.axis_set & right.axis_set & root.axis_set
    left, right = (terms.unrepeated(x, heads) if s in x.axis_set else x for x in (left, right))
    value = terms.unrepeated(value, heads)
    split = terms.split
    axes = _roles(split(root), split(left), split(right), split(value), s, logits.mask.query_axis)
    if isinstance(axes, Refusal):
        return axes
    query, key = (right, left) if s in left.axis_set else (left, right)
    if axes.d not in split(query).axis_set:
        return refuse("query is constant along its features", depth=5)
    inner = [eqn, *guard, *form.inner, *logits.inner, dot]
    escaped = terms.graph.escapes(inner, [eqn.outvars[0]])
    if escaped is not None:
        return refuse(
            "an inner value ({aval}: the logits or the probabilities) is used elsewhere too",
            aval=escaped.aval,
            depth=8,
            advice="do not return the attention weights, nor differentiate in forward mode, which needs them",
        )
    logits.scale *= left_scale * right_scale * (logits.softcap or 1)
    return Reading(terms, eqn, root, query, key, value, axes, s, logits, probabilities.sink, bool(guard), tuple(inner))


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


def build(reading: Reading) -> Match | Refusal:
    terms, eqn, roles, s, logits = reading.terms, reading.eqn, reading.roles, reading.s, reading.logits
    root, query, key, value = map(terms.split, (reading.root, reading.query, reading.key, reading.value))
    sink = reading.sink
    batch: tuple[Axis | None, ...] = (None,) * (2 - len(roles.batch)) + roles.batch
    scores = (*batch, roles.group, roles.t, s)
    orders = {
        "query": order_of(query, (*batch, roles.group, roles.t, roles.d)),
        "key": order_of(key, (*batch, s, roles.d)),
        "value": order_of(value, (*batch, s, roles.e)),
        "result": order_of(root, (*batch, roles.group, roles.t, roles.e)),
    }
    structure, sources = _structure(terms, logits.mask, batch, roles, s)
    masks = [(terms.split(source.mask), source.negated) for source in sources]
    biases = [(terms.split(term), factor) for term, factor in logits.biases]
    sinks = [terms.split(sink)] if isinstance(sink, Term) else []
    score_orders = [order_of(term, scores) for term, _ in (*masks, *biases)]
    score_orders += [order_of(term, scores[:-1]) for term in sinks]
    if any(o is None for o in (*orders.values(), *score_orders)):
        return refuse("an operand has axes that its role has not", depth=6)
    t_size = roles.t.size if roles.t is not None else 1
    empty_rows = not logits.mask.is_only_band or logits.mask.has_empty_rows(t_size, s.size)
    has_sink = sink != -math.inf
    if empty_rows and not has_sink and (len(set(logits.fills)) > 1 or logits.added_fill):
        return refuse(
            "a row without any allowed key has different fills, or logits, in it",
            depth=6,
            advice="fill with one value, in one jnp.where",
        )
    # Without a finite fill, only -inf can empty a row: NaN, as softmax gives.
    masked_row = MASKED_ROW_NAN if all(f == -math.inf for f in logits.fills) else MASKED_ROW_MEAN
    result = eqn.outvars[0]
    common = jnp.result_type(query.dtype, key.dtype, value.dtype)
    leaves = [query, key, value, *(term for term, _ in (*masks, *biases)), *sinks, *structure.leaves]
    layout = LENGTH_MAJOR if _is_length_major(query, key, roles, s) else HEADS_MAJOR
    products = [e for e in reading.inner if e.primitive.name == "dot_general"]
    exact = not all(map(_compat.is_default_precision, products))
    static: dict[str, Any] = dict(
        sizes=tuple(tuple(1 if a is None else a.size for a in leaf.axes) for leaf in leaves),
        orders=tuple(orders.items()),
        score_orders=tuple(score_orders),
        negated=tuple(negated for _, negated in masks),
        factors=tuple(factor for _, factor in biases),
        sink=None if isinstance(sink, Term) else sink,
        lines=structure.lines,
        segment_orders=structure.segment_orders,
        group_sizes=tuple(1 if a is None else a.size for a in scores[len(batch) : -1]),
        key_size=s.size,
        batch_sizes=tuple(1 if a is None else a.size for a in batch),
        scale=logits.scale,
        softcap=logits.softcap,
        left=logits.mask.left,
        right=logits.mask.right,
        masked_row=masked_row,
        guarded=reading.guarded,
        layout=layout,
        allow_tf32=not exact,
        multiplied_dtype=jnp.result_type(*(a.aval.dtype for a in eqn.invars)).name,
        shape=tuple(result.aval.shape),
        dtype=result.aval.dtype.name,
    )
    batch_size = math.prod(a.size for a in roles.batch)
    groups = roles.group.size if roles.group is not None else 1
    return Match(
        op="attention",
        root=eqn,
        results=(result,),
        inner=reading.inner,
        leaves=tuple(leaf.atom for leaf in leaves),
        emit=emit,
        static=tuple(static.items()),
        detail=_detail(logits, roles, s, bool(biases), len(masks), structure, has_sink, exact),
        case=(
            ("dtype", kernel_dtype(common, static["multiplied_dtype"], static["dtype"])),
            ("batch", batch_size * groups),
            ("t", t_size),
            ("s", s.size),
            ("d", roles.d.size),
            ("e", roles.e.size),
            ("exact", exact),
            ("bias", bool(biases)),
            ("masked", bool(masks or structure.leaves)),
            ("causal", logits.mask.right == 0),
            ("softcap", logits.softcap),
            ("sink", has_sink),
        ),
    )


@dataclasses.dataclass(frozen=True)
class _Structure:
    """What of the mask a kernel takes as numbers: its leaves, the half-lines over them, and, of the last two leaves,
    the orders of the segments."""

    leaves: tuple[Term, ...]
    lines: tuple[StaticLine, ...]
    segment_orders: tuple[Order, ...]


def _structure(
    terms: Terms, mask: MaskForm, batch: Sequence[Axis | None], roles: Roles, s: Axis
) -> tuple[_Structure, list[Source]]:
    """The structure, and the tensors that remain."""
    sources = list(mask.tensors)
    leaves: list[Term] = []
    lines: list[StaticLine] = []
    for line in mask.half_lines:
        static = static_line(terms, line, (*batch, roles.group, roles.t), leaves)
        if static is not None:
            lines.append(static)
        elif line.source is not None and line.source not in sources:
            sources.append(line.source)
    segment_orders: tuple[Order, ...] = ()
    if mask.segments is not None:
        query, key = terms.split(mask.segments.query), terms.split(mask.segments.key)
        orders = order_of(query, (*batch, roles.t)), order_of(key, (*batch, s))
        if orders[0] is not None and orders[1] is not None:
            segment_orders = (orders[0], orders[1])
            leaves += [query, key]
        else:
            sources.append(mask.segments.source)
    return _Structure(tuple(leaves), tuple(lines), segment_orders), sources


def kernel_dtype(common: Any, multiplied: Any, result: Any) -> str:
    """The dtype the kernel runs in: the widest of query, key and value, as they come; that of the program's product
    with value, if it is wider and the result is kept so."""
    precise = is_wider(multiplied, common) and is_wider(result, common)
    return jnp.dtype(multiplied if precise else common).name


def _is_length_major(query: Term, key: Term, roles: Roles, s: Axis) -> bool:
    """As the longer of query and key lies: a cache of keys is not copied for one query."""
    if len(roles.batch) < 2:
        return False
    of_query = roles.t is not None and (roles.t.size >= s.size or roles.batch[-1] not in key.axis_set)
    term, length = (query, roles.t) if of_query else (key, s)
    heads = [a for a in (roles.batch[-1], roles.group) if a is not None and a in term.axis_set]
    return all(term.axes.index(length) < term.axes.index(a) for a in heads)


def _detail(
    logits: Logits,
    roles: Roles,
    s: Axis,
    has_bias: bool,
    masks: int,
    structure: _Structure,
    has_sink: bool,
    exact: bool,
) -> str:
    t = roles.t.size if roles.t is not None else 1
    parts = [f"t{t} s{s.size} d{roles.d.size}"]
    if logits.mask.is_band:
        parts.append("causal" if logits.mask.right == 0 and logits.mask.left > t else "band")
    named = {
        "interval": structure.lines,
        "segments": structure.segment_orders,
        "mask": masks,
        "bias": has_bias,
        "softcap": logits.softcap,
        "sink": has_sink,
        "exact": exact,  # another kernel for float32
    }
    parts += [name for name, is_there in named.items() if is_there]
    return " ".join(parts)


def emit(
    *arrays,
    sizes: tuple[tuple[int, ...], ...],
    orders: tuple[tuple[str, Order], ...],
    score_orders: tuple[Order, ...],
    negated: tuple[bool, ...],
    factors: tuple[float, ...],
    sink: float | None,
    lines: tuple[StaticLine, ...],
    segment_orders: tuple[Order, ...],
    batch_sizes,
    group_sizes,
    key_size,
    scale,
    softcap,
    left,
    right,
    masked_row,
    guarded,
    layout,
    allow_tf32,
    multiplied_dtype,
    shape,
    dtype,
):
    """Canonical attention on query, key, value, masks, biases, sink and structure in the program's own order of
    dimensions. sink: None where it is an array."""
    order = dict(orders)
    arrays = [x.reshape(size) for x, size in zip(arrays, sizes, strict=True)]
    run_dtype = kernel_dtype(jnp.result_type(*(x.dtype for x in arrays[:3])), multiplied_dtype, dtype)
    query, key, value = (
        _broadcast_batch(arranged(x, order[name]), batch_sizes).astype(run_dtype)
        for name, x in zip(("query", "key", "value"), arrays, strict=False)
    )
    scores = [arranged(x, order) for x, order in zip(arrays[3:], score_orders, strict=False)]
    structure = arrays[3 + len(scores) :]
    masks = [jnp.logical_not(x) if flip else x for x, flip in zip(scores, negated, strict=False)]
    scaled = zip(scores[len(masks) :], factors, strict=False)
    biases = [x if c == 1 else x * jnp.asarray(c, x.dtype) for x, c in scaled]
    if len(biases) > 1:  # in the order in which the program adds them to float32 logits, or wider ones
        biases = [x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in biases[::-1]]
    segments = [
        arranged(x, order).astype(jnp.int32)
        for x, order in zip(structure[len(structure) - len(segment_orders) :], segment_orders, strict=True)
    ]
    has_sink = sink != -math.inf
    out, lse = attention_canonical(
        query,
        key,
        value,
        mask=ft.reduce(jnp.logical_and, masks) if masks else None,
        bias=ft.reduce(jnp.add, biases) if biases else None,
        interval=interval(lines, structure, (*batch_sizes, *group_sizes), key_size) if lines else None,
        query_segments=segments[0] if segments else None,
        key_segments=segments[1] if segments else None,
        scale=scale,
        softcap=softcap,
        left=left,
        right=right,
        masked_row=MASKED_ROW_MEAN if guarded or has_sink else masked_row,
        layout=layout,
        allow_tf32=allow_tf32,
    )
    row = None
    if has_sink:
        row = scores[-1] if sink is None else jnp.full((1,) * lse.ndim, sink)
    if guarded:
        out = with_nan_rows_zero(out, lse, row, masked_row)
    elif has_sink:
        out = with_sink(out, lse, row, masked_row)
    return (restored(out, order["result"], shape, dtype),)


def _broadcast_batch(x: Any, batch_sizes: Sequence[int]) -> Any:
    sizes = (*batch_sizes, *x.shape[len(batch_sizes) :])
    return x if x.shape == sizes else jnp.broadcast_to(x, sizes)
