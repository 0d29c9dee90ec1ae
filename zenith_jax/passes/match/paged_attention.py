"""paged attention: attention whose key and value are gathered from pages by one table, found as attention is.

  key[*n, s, *k, d] = key_pages[table[*n, i], c, *k, d],  s = i * page_size + c;  value likewise

Below key and value stand a gather of whole pages and views. Axes that the table has are sequences, those that the
pages have are heads. What the kernel does not take, a mask that is no interval of keys, a bias, pages that are computed
where they are used, is left to attention, which then reads the gathered copy.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from zenith_jax.errors import Refusal, refuse
from zenith_jax.ir._compat import JaxprEqn
from zenith_jax.ir.graph import VIEWS, Graph
from zenith_jax.ir.term import Axis, Term, Terms
from zenith_jax.ops.attention_kernels import MASKED_ROW_MEAN, with_nan_rows_zero, with_sink
from zenith_jax.ops.paged_attention import paged_attention_canonical
from zenith_jax.passes.match import attention
from zenith_jax.passes.match._match import Match, Order, arranged, order_of, restored
from zenith_jax.passes.match.attention_logits import Logits
from zenith_jax.passes.match.mask_structure import StaticLine, interval, static_line
from zenith_jax.passes.match.pick import Outside, outside_of

# Static arguments of attention's `emit` that are those of ours.
_AS_ATTENTION = ("scale", "softcap", "left", "right", "masked_row", "shape", "dtype")
_VIEWS_ABOVE = 16  # between a gather and the product with value, at most
# Values that are arrays anyway. Others XLA computes as it gathers, of the gathered pages alone.
_ARRAYS = ("scatter", "dynamic_update_slice", "while", "scan", "cond", "optimization_barrier", "custom_", "shard_map")


def match(graph: Graph, eqn: JaxprEqn) -> Match | Refusal | None:
    if eqn.primitive.name != "dot_general" or not any(_is_gathered(graph, a) for a in eqn.invars):
        return None
    reading = attention.read(graph, eqn)
    if not isinstance(reading, attention.Reading):
        return None  # attention says so
    gathered = attention.build(reading)
    if not isinstance(gathered, Match):
        return None
    found = _paged(reading, gathered)
    if isinstance(found, Refusal):
        return dataclasses.replace(gathered, detail=f"{gathered.detail}; its pages are gathered: {found}")
    return found


def _is_gathered(graph: Graph, atom: Any) -> bool:
    for _ in range(_VIEWS_ABOVE):
        eqn = graph.producer(atom)
        if eqn is None or eqn.primitive.name not in VIEWS:
            return eqn is not None and eqn.primitive.name == "gather"
        atom = eqn.invars[0]
    return False


# --- what is gathered -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Pages:
    """An array of pages and which of them are taken: pages[..., table, ...]; both split. `page`: their axis in it."""

    pages: Term
    page: Axis
    table: Term
    wraps: bool  # whether a negative entry counts from the end
    outside: Outside
    inner: tuple[JaxprEqn, ...]


def _pages(terms: Terms, term: Term) -> Pages | Refusal:
    path: list[JaxprEqn] = []
    below = terms.peel(term, path, also=("reshape",))
    eqn = terms.producer(below, "gather")
    if eqn is None:
        return refuse("key and value are not both gathered from pages", depth=9)
    numbers, outside = eqn.params["dimension_numbers"], outside_of(eqn)
    operand, indices = eqn.invars[:2]
    shape = operand.aval.shape
    if (
        outside is None
        or len(numbers.start_index_map) != 1
        or numbers.collapsed_slice_dims != numbers.start_index_map
        or numbers.operand_batching_dims
    ):
        return refuse("the gather takes no whole pages by one table", depth=9)
    (dim,) = numbers.start_index_map
    if any(size != n for d, (size, n) in enumerate(zip(eqn.params["slice_sizes"], shape, strict=True)) if d != dim):
        return refuse("the gather takes parts of pages", depth=9)
    page = Axis(shape[dim], "p")
    of_page = iter([below.axes[d] for d in numbers.offset_dims])
    axes = [page if d == dim else next(of_page) for d in range(len(shape))]
    rows = [axis for d, axis in enumerate(below.axes) if d not in numbers.offset_dims]
    index, wraps = _unwrapped(terms, terms.peel(Term(indices, (*rows, None))), shape[dim])
    pages = terms.peel(Term(operand, tuple(axes)), also=("reshape",))
    source = terms.producer(pages)
    if source is not None and not source.primitive.name.startswith(_ARRAYS):
        return refuse(
            "the pages are computed by `{name}`, which XLA does of the gathered ones alone",
            name=source.primitive.name,
            depth=9,
            advice="keep keys and values in arrays of pages of their own, in the dtype of the query",
        )
    return Pages(terms.split(pages), page, terms.split(index), wraps, outside, (*path, eqn))


def _unwrapped(terms: Terms, index: Term, size: int) -> tuple[Term, bool]:
    """i of where(i < 0, i + size, i), as indexing writes it, and whether it was written so."""
    wrap = terms.producer(index, "select_n")
    if wrap is not None and len(wrap.invars) == 3:
        which, plain, wrapped = terms.operands(index, wrap)
        below = terms.producer(terms.peel(which), "lt")
        added = terms.producer(terms.peel(wrapped), "add")
        if below is not None and added is not None:
            compared, zero = terms.operands(terms.peel(which), below)
            base, step = terms.operands(terms.peel(wrapped), added)
            if (
                terms.constant(zero) == 0
                and terms.constant(step) == size
                and terms.same(compared, plain)
                and terms.same(base, plain)
            ):
                return terms.peel(plain), True
    return index, False


# --- the match --------------------------------------------------------------------------------------------------------


def _paged(reading: attention.Reading, gathered: Match) -> Match | Refusal:
    terms, roles, logits = reading.terms, reading.roles, reading.logits
    key, value = _pages(terms, reading.key), _pages(terms, reading.value)
    if isinstance(key, Refusal) or isinstance(value, Refusal):
        return key if isinstance(key, Refusal) else value  # type: ignore[return-value]
    if not terms.same(key.table, value.table) or (key.wraps, key.outside) != (value.wraps, value.outside):
        return refuse("key and value are gathered by different tables", depth=10)
    if key.page.size != value.page.size:
        return refuse("there are {n} pages of keys and {m} of values", n=key.page.size, m=value.page.size, depth=10)

    def split(axis: Axis | None) -> tuple[Axis, ...]:
        return () if axis is None else tuple(a for a in terms.split(Term(key.table.atom, (axis,))).axes if a)

    table, of_page = key.table.axis_set, (key.pages.axis_set | value.pages.axis_set) - {key.page, value.page}
    keys = split(reading.s)
    entry = [a for a in keys if a in table]
    token = [a for a in keys if a in of_page]
    if [*entry, *token] != list(keys) or len(entry) > 1 or len(token) != 1:
        return refuse("the keys are not those of one page after the other", depth=10)
    batch = [part for axis in roles.batch for part in split(axis)]
    sequences = [a for a in batch if a in table]
    heads = [a for a in batch if a in of_page]
    if len(heads) > 1 or table & of_page:
        return refuse("the batch is not sequences of the table and one axis of heads of the pages", depth=10)
    # What neither has is repeated: heads that share keys.
    repeated = [a for a in batch if a not in table and a not in of_page]
    (m,), (c,), (k,) = entry or [None], token, heads or [None]
    heads_axis = _heads_axis(key.pages, key.page, c, k, roles.d)
    if heads_axis is None or heads_axis != _heads_axis(value.pages, value.page, c, k, roles.e):
        return refuse(
            "pages do not lie as (pages, page size, heads, features) with the heads in one of the first three places",
            depth=10,
        )

    # Merged axes may have come apart since attention was read: everything by the parts.
    # Which of the query's axes are heads and which is its length, the mask says, where it differs along one of them.
    choices = [(roles.group, roles.t)]
    if logits.mask.query_axis is None:
        swapped = (roles.t, roles.group)
        choices = [swapped, *choices] if roles.group is None else [*choices, swapped]
    lines: tuple[StaticLine, ...] | Refusal = ()
    leaves_of_lines: list[Term] = []
    for group, t in choices:
        leaves_of_lines.clear()
        groups = [*repeated, *([] if group is None else [group])]
        lines = _lines(terms, logits, (k, *sequences), groups, t, leaves_of_lines)
        if not isinstance(lines, Refusal):
            break
    if isinstance(lines, Refusal):
        return lines
    scores: tuple[Axis | None, ...] = (k, *sequences, *groups, t)
    query, root = terms.split(reading.query), terms.split(reading.root)
    sinks = [terms.split(reading.sink)] if isinstance(reading.sink, Term) else []
    orders = [order_of(query, (*scores, roles.d)), order_of(root, (*scores, roles.e))]
    orders += [order_of(x, scores) for x in sinks]
    table_order = order_of(key.table, (*sequences, m))
    if any(o is None for o in (*orders, table_order)):
        return refuse("an operand has axes that its role has not", depth=10)
    static = dict(gathered.static)
    common = jnp.result_type(reading.query.dtype, key.pages.dtype, value.pages.dtype)
    dtype = attention.kernel_dtype(common, static["multiplied_dtype"], static["dtype"])
    if not key.pages.dtype.name == value.pages.dtype.name == dtype:
        return refuse(
            "the pages are {key} and the kernel would run in {dtype}",
            key=key.pages.dtype.name,
            dtype=dtype,
            depth=10,
            advice="cast the query, and products with preferred_element_type, rather than the keys",
        )
    inner = list({id(e): e for e in (*reading.inner, *key.inner, *value.inner)}.values())
    if terms.graph.escapes(inner, gathered.results) is not None:
        return refuse("the gathered keys or values are used elsewhere too", depth=10)
    leaves = [query, key.pages, value.pages, key.table, *sinks, *leaves_of_lines]
    size = lambda axis: 1 if axis is None else axis.size  # noqa: E731
    number, shared = (math.prod(a.size for a in axes) for axes in (sequences, groups))
    return Match(
        op="paged_attention",
        root=reading.eqn,
        results=gathered.results,
        inner=tuple(inner),
        leaves=tuple(leaf.atom for leaf in leaves),
        emit=emit,
        static=tuple(
            dict(
                sizes=tuple(tuple(map(size, leaf.axes)) for leaf in leaves),
                orders=tuple(orders),
                page_orders=(
                    order_of(key.pages, _laid_out(heads_axis, key.page, c, k, roles.d)),
                    order_of(value.pages, _laid_out(heads_axis, value.page, c, k, roles.e)),
                ),
                table_order=table_order,
                lines=lines,
                head_size=size(k),
                sequence_sizes=tuple(map(size, sequences)),
                group_sizes=tuple(map(size, groups)),
                t=size(t),
                heads_axis=heads_axis,
                wraps=key.wraps,
                nan_outside=key.outside is Outside.NAN,
                sink=static["sink"],
                guarded=reading.guarded,
                kernel_dtype=dtype,
                **{
                    name: static[name] for name in ("scale", "softcap", "left", "right", "masked_row", "shape", "dtype")
                },
            ).items()
        ),
        detail=f"t{size(t)} {gathered.detail.partition(' ')[2]}, pages of {c.size}",
        case=(
            ("dtype", dtype),
            ("sequences", number),
            ("groups", shared),
            ("t", size(t)),
            ("page_size", c.size),
            ("d", roles.d.size),
            ("e", roles.e.size),
            ("logits", number * size(k) * shared * size(t) * reading.s.size),
        ),
        simpler=gathered,
    )


def _lines(
    terms: Terms,
    logits: Logits,
    rows: Sequence[Axis | None],
    groups: Sequence[Axis],
    t: Axis | None,
    leaves: list[Term],
) -> tuple[StaticLine, ...] | Refusal:
    """The mask as half-lines over (*rows, *groups, t), their terms appended to `leaves`."""
    mask = logits.mask
    if logits.biases:
        return refuse("a bias is added to the logits", depth=10)
    lines = [static_line(terms, line, (*rows, *groups, t), leaves) for line in mask.half_lines]
    if mask.tensors or mask.segments is not None or any(line is None for line in lines):
        return refuse(
            "its mask is more than an interval of keys for each query",
            depth=10,
            advice="mask by a comparison of key positions with lengths",
        )
    found = [line for line in lines if line is not None]
    edges = [edge for _, edges in found for edge in edges]
    of_groups = range(len(rows), len(rows) + len(groups))
    if any(c[i] or (leaf >= 0 and order[i] >= 0) for _, c, leaf, _, order in edges for i in of_groups):
        return refuse("its mask differs between heads that share keys", depth=10)
    return tuple(found)


def _laid_out(
    heads_axis: int, page: Axis, token: Axis, head: Axis | None, feature: Axis
) -> tuple[Axis | None, Axis | None, Axis | None, Axis]:
    of_page: list[Axis | None] = [page, token]
    return (*of_page[:heads_axis], head, *of_page[heads_axis:], feature)  # type: ignore[return-value]


def _heads_axis(pages: Term, page: Axis, token: Axis, head: Axis | None, feature: Axis) -> int | None:
    """How an array of pages lies: HEADS_AXES of the op; None in any other way."""
    axes = [a for a in pages.axes if a is not None]
    for heads_axis in (2, 1, 0):
        if axes == [a for a in _laid_out(heads_axis, page, token, head, feature) if a is not None]:
            return heads_axis
    return None


# --- the fused op -----------------------------------------------------------------------------------------------------


def emit(
    *arrays,
    sizes: tuple[tuple[int, ...], ...],
    orders: tuple[Order, ...],
    page_orders: tuple[Order, Order],
    table_order: Order,
    lines: tuple[StaticLine, ...],
    head_size: int,
    sequence_sizes: tuple[int, ...],
    group_sizes: tuple[int, ...],
    t: int,
    heads_axis: int,
    wraps: bool,
    nan_outside: bool,
    sink: float | None,
    guarded: bool,
    kernel_dtype: str,
    scale: float,
    softcap: float,
    left: int,
    right: int,
    masked_row: int,
    shape: Sequence[int],
    dtype: str,
):
    """Canonical paged attention, over axes (head, *sequences, *groups, query). sink: None where it is an array."""
    query, key, value, table, *rest = (x.reshape(size) for x, size in zip(arrays, sizes, strict=True))
    k, sequences, groups = head_size, sequence_sizes, group_sizes
    n, g = math.prod(sequences), math.prod(groups)
    key, value = (
        jnp.moveaxis(arranged(x, order), heads_axis, 0) for x, order in zip((key, value), page_orders, strict=True)
    )
    query = arranged(query, orders[0])
    query = jnp.broadcast_to(query, (k, *sequences, *groups, t, query.shape[-1])).reshape(k, n, g, t, -1)
    table = arranged(table, table_order)
    table = jnp.broadcast_to(table, (*sequences, table.shape[-1])).reshape(1, n, -1)
    s = table.shape[-1] * key.shape[2]
    seen = jnp.array([0, s], jnp.int32)
    if lines:
        seen = interval(lines, rest[1 if sink is None else 0 :], (k, *sequences, *groups, t), s)
        seen = seen.reshape(*seen.shape[: 1 + len(sequences)], *seen.shape[-2:])  # the same for all groups
    heads = seen.shape[0] if lines else 1
    seen = jnp.broadcast_to(seen, (heads, *sequences, t, 2)).reshape(heads, n, t, 2)
    has_sink = sink != -math.inf
    out, lse = paged_attention_canonical(
        query.astype(kernel_dtype),
        key,
        value,
        _entries(table, key.shape[1], wraps, nan_outside),
        seen,
        scale=scale,
        softcap=softcap,
        left=left,
        right=right,
        empty_row=MASKED_ROW_MEAN if guarded or has_sink else masked_row,
        heads_axis=heads_axis,
        nan_outside=nan_outside,
    )
    row = None
    if has_sink:
        if sink is None:
            row = jnp.broadcast_to(arranged(rest[0], orders[2]), (k, *sequences, *groups, t)).reshape(lse.shape)
        else:
            row = jnp.full((1,) * lse.ndim, sink)
    if guarded:
        out = with_nan_rows_zero(out, lse, row, masked_row)
    elif has_sink:
        out = with_sink(out, lse, row, masked_row)
    out = out.reshape(k, *sequences, *groups, t, out.shape[-1])
    return (restored(out, orders[1], shape, dtype),)


def _entries(table: Any, pages: int, wraps: bool, nan_outside: bool) -> Any:
    """In int32, as the op takes them: negative ones count from the end there."""
    if not wraps and jnp.issubdtype(table.dtype, jnp.signedinteger):
        table = jnp.where(table < 0, pages, table) if nan_outside else jnp.maximum(table, 0)
    if table.dtype == jnp.int32:
        return table
    info = jnp.iinfo(table.dtype)
    return jnp.clip(table, max(info.min, -pages - 1), min(info.max, pages)).astype(jnp.int32)
