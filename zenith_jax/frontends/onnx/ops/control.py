"""If, Loop, Scan and SequenceMap.

What is known while tracing is decided there: one branch, so many rounds. Else lax.cond, lax.while_loop and lax.scan.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from zenith_jax.frontends.onnx.dtypes import held
from zenith_jax.frontends.onnx.errors import NotStaticError, OnnxError
from zenith_jax.frontends.onnx.registry import Node, operator
from zenith_jax.frontends.onnx.values import is_known, is_static, static

Subgraph = Callable[..., list[Any]]

UNROLLED = 8  # a loop of so many rounds is written out: its body may then use the round's number for shapes
MAX_UNROLLED = 10_000  # rounds written out at most, where lax.scan cannot carry the values
MAX_SCANNED = 2**31 - 1  # more is what exporters write for "while the condition holds"


@operator("If", since=1)
def if_(condition: Any, *, then_branch: Subgraph, else_branch: Subgraph) -> tuple[Any, ...]:
    """https://onnx.ai/onnx/operators/onnx__If.html"""
    if is_known(condition):
        return tuple(then_branch() if _truth(condition) else else_branch())
    branches = [_Branch(then_branch), _Branch(else_branch)]
    try:
        # Not traced beforehand to compare the types: thirty Ifs in each other would be traced 2^30 times.
        values = lax.cond(jnp.reshape(condition, ()), *branches)
    except TypeError as error:  # the branches' types; what goes wrong inside of one is an OnnxError
        then, otherwise = (_types(branch.outputs) for branch in branches)
        raise NotStaticError(
            f"the condition is traced and the branches give different types, {then} and {otherwise}: make the input "
            f"that decides the condition static, load(static=...)"
        ) from error
    # What both branches know to be the same value stays known.
    kept = [_same(a, b) for a, b in zip(branches[0].outputs, branches[1].outputs, strict=True)]
    return tuple(v if k is None else k for k, v in zip(kept, values, strict=True))


class _Branch:
    """A branch for lax.cond, which gives JAX arrays; `outputs` remembers what it gave before they became that."""

    def __init__(self, graph: Subgraph):
        self.graph = graph
        self.outputs: list[Any] = []

    def __call__(self) -> list[Any]:
        self.outputs = self.graph()
        return jax.tree.map(jnp.asarray, self.outputs)


def _truth(condition: Any) -> bool:
    array = static(condition, "cond")
    if array.size != 1:
        raise OnnxError(f"a condition has one element, got shape {array.shape}")
    return bool(array.reshape(()))


def _types(values: Sequence[Any]) -> list[str]:
    leaves, structure = jax.tree.flatten(list(values))
    return [f"{leaf.dtype}{list(leaf.shape)}" for leaf in leaves] + [str(structure)] * (len(leaves) != len(values))


def _same(a: Any, b: Any) -> np.ndarray | None:
    arrays = isinstance(a, np.ndarray) and isinstance(b, np.ndarray)
    return a if arrays and a.shape == b.shape and np.array_equal(a, b) else None


@operator("Loop", since=1)
def loop(trips: Any = None, condition: Any = None, *carried: Any, body: Subgraph, node: Node) -> tuple[Any, ...]:
    """https://onnx.ai/onnx/operators/onnx__Loop.html

    Written out where the rounds are few or their values change type; lax.scan, which has a derivative, where their
    number is known; lax.while_loop, which has none in reverse mode, where it is not.
    """
    limit = int(static(trips, "M").reshape(())) if trips is not None and is_known(trips) else None
    while_true = condition is None or (is_known(condition) and _truth(condition))
    if condition is not None and is_known(condition) and not while_true:
        limit = 0
    wanted = sum(node.wanted[len(carried) :])
    if trips is None or limit is not None:
        if limit is not None and limit > UNROLLED and while_true:
            try:
                return _scanned(limit, carried, body)
            except (_Unsteady, NotStaticError):
                pass
        try:
            return _written_out(limit, condition, carried, body, node)
        except _Unknown:
            pass
    if wanted and node.size_bound is None:
        raise NotStaticError(
            "how often the loop runs is traced, and it collects a value of each round: bound their number by "
            "load(size_bounds={node or output name: n}), or call outside of jax.jit"
        )
    return _while(trips, condition, carried, body, node)


class _Unsteady(Exception):
    """The loop's values change type from round to round, or its condition is not always true."""


class _Unknown(Exception):
    """Whether there is another round is traced."""


def _written_out(
    limit: int | None, condition: Any, carried: Sequence[Any], body: Subgraph, node: Node
) -> tuple[Any, ...]:
    values = list(carried)
    collected: list[list[Any]] = []
    round_ = 0
    while limit is None or round_ < limit:
        if condition is not None:
            if not is_known(condition):
                raise _Unknown
            if not _truth(condition):
                break
        if round_ >= MAX_UNROLLED and any(isinstance(v, Tracer) for v in jax.tree.leaves(values)):
            raise OnnxError(f"the loop would be written out more than {MAX_UNROLLED} times")
        condition, *results = body(np.asarray(round_, np.int64), _or_true(condition), *values)
        values, new = results[: len(carried)], results[len(carried) :]
        collected = collected or [[] for _ in new]
        for rows, row in zip(collected, new, strict=True):
            rows.append(row)
        round_ += 1
    if not collected:
        collected = [[] for _ in node.wanted[len(carried) :]]
    return (*values, *(_stacked(rows, body, len(carried) + 1 + i) for i, rows in enumerate(collected)))


def _or_true(condition: Any) -> Any:
    return np.asarray(True) if condition is None else condition


def _stacked(rows: list[Any], body: Any, output: int) -> Any:
    if not rows:  # no round: what the body declares
        info = body.graph.outputs[output]
        shape = tuple(d if isinstance(d, int) else 0 for d in info.shape or ())
        return np.zeros((0, *shape), info.dtype or np.float32)
    return np.stack(rows) if is_static(rows) else jnp.stack([jnp.asarray(r) for r in rows])


def _scanned(length: int, carried: Sequence[Any], body: Subgraph) -> tuple[Any, ...]:
    def step(values: list[Any], round_: Any) -> tuple[list[Any], list[Any]]:
        again, *results = body(round_, np.asarray(True), *values)
        if not is_known(again) or not _truth(again):
            raise _Unsteady
        after = jax.tree.map(jnp.asarray, results[: len(carried)])
        if _types(after) != _types(values):
            raise _Unsteady
        return after, jax.tree.map(jnp.asarray, results[len(carried) :])

    if any(v is None for v in carried) or length > MAX_SCANNED:
        raise _Unsteady
    values, rows = lax.scan(step, _arrays(carried), jnp.arange(length))
    return (*values, *rows)


def _arrays(values: Sequence[Any]) -> list[Any]:
    if any(isinstance(v, list | tuple) for v in values):
        raise _Unsteady
    return [jnp.asarray(v) for v in values]


def _while(trips: Any, condition: Any, carried: Sequence[Any], body: Subgraph, node: Node) -> tuple[Any, ...]:
    traced = "how often the loop runs is traced"
    count = len(carried)
    rounds = _rounds(trips)
    if any(v is None or isinstance(v, list | tuple) for v in carried):
        raise NotStaticError(f"{traced}, and it carries a sequence or an optional, which JAX cannot")
    start = _arrays(carried)
    bound = node.size_bound or 0
    row_avals = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, body(jnp.int32(0), jnp.asarray(True), *start)))
    if _types(row_avals[1 : count + 1]) != _types(start):
        raise NotStaticError(
            f"{traced}, and its values change from {_types(start)} to {_types(row_avals[1 : count + 1])}"
        )
    buffers = [jnp.zeros((bound, *a.shape), a.dtype) for a in row_avals[count + 1 :]]

    def again(state: Any) -> Any:
        round_, go, _, _ = state
        return go & (round_ < rounds)

    def step(state: Any) -> Any:
        round_, go, values, rows = state
        go, *results = body(round_, go, *values)
        new = [jnp.asarray(r) for r in results[count:]]
        rows = [r.at[round_].set(n, mode="drop") for r, n in zip(rows, new, strict=True)]
        return round_ + 1, jnp.reshape(go, ()), [jnp.asarray(v) for v in results[:count]], rows

    first = jnp.reshape(jnp.asarray(_or_true(condition)), ())
    zero = jnp.zeros((), jnp.asarray(rounds).dtype)
    _, _, values, rows = lax.while_loop(again, step, (zero, first, start, buffers))
    return (*values, *rows)


def _rounds(trips: Any) -> Any:
    """At most so many as the integers count that JAX has: exporters write 2^63 - 1 for a loop without a limit."""
    if trips is None:
        return jnp.iinfo(jnp.int32).max
    if not is_known(trips):
        return jnp.reshape(trips, ())
    dtype = held(np.int64)
    return jnp.asarray(min(int(static(trips, "M").reshape(())), np.iinfo(dtype).max), dtype)


@operator("Scan", since=8)
def scan_8(
    lengths: Any, *inputs: Any, body: Subgraph, num_scan_inputs: int, directions: tuple[int, ...] = ()
) -> tuple[Any, ...]:
    """https://onnx.ai/onnx/operators/onnx__Scan.html#scan-8 : with a batch axis before the scanned one."""
    if lengths is not None:
        raise NotImplementedError("Scan 8 with sequence_lens")
    states = len(inputs) - num_scan_inputs
    batch = np.shape(inputs[0])[0]
    rounds = []
    for b in range(batch):
        row = [x[b] for x in inputs]
        rounds.append(_scan(row, states, body, directions, (), (), ()))
    return tuple(jnp.stack([jnp.asarray(r[i]) for r in rounds]) for i in range(len(rounds[0])))


@operator("Scan", since=9)
def scan(
    *inputs: Any,
    body: Subgraph,
    num_scan_inputs: int,
    scan_input_axes: tuple[int, ...] = (),
    scan_input_directions: tuple[int, ...] = (),
    scan_output_axes: tuple[int, ...] = (),
    scan_output_directions: tuple[int, ...] = (),
) -> tuple[Any, ...]:
    """https://onnx.ai/onnx/operators/onnx__Scan.html"""
    states = len(inputs) - num_scan_inputs
    return _scan(inputs, states, body, scan_input_directions, scan_output_directions, scan_input_axes, scan_output_axes)


def _scan(
    inputs: Sequence[Any],
    states: int,
    body: Subgraph,
    input_directions: tuple[int, ...],
    output_directions: tuple[int, ...],
    input_axes: tuple[int, ...],
    output_axes: tuple[int, ...],
) -> tuple[Any, ...]:
    def at(options: tuple[int, ...], index: int) -> int:
        return options[index] if index < len(options) else 0

    scanned = []
    for index, x in enumerate(inputs[states:]):
        x = jnp.moveaxis(jnp.asarray(x), at(input_axes, index), 0)
        scanned.append(jnp.flip(x, 0) if at(input_directions, index) else x)

    def step(values: list[Any], rows: list[Any]) -> tuple[list[Any], list[Any]]:
        results = [jnp.asarray(r) for r in body(*values, *rows)]
        return results[:states], results[states:]

    values, rows = lax.scan(step, [jnp.asarray(v) for v in inputs[:states]], scanned)
    outputs = []
    for index, row in enumerate(rows):
        row = jnp.flip(row, 0) if at(output_directions, index) else row
        axis = at(output_axes, index)
        outputs.append(jnp.moveaxis(row, 0, axis))
    return (*values, *outputs)


@operator("SequenceMap", since=17)
def sequence_map(first: Any, *others: Any, body: Subgraph) -> tuple[Any, ...]:
    """https://onnx.ai/onnx/operators/onnx__SequenceMap.html"""
    rows = []
    for index, element in enumerate(first):
        more = [other[index] if isinstance(other, list) else other for other in others]
        rows.append(body(element, *more))
    return tuple([row[i] for row in rows] for i in range(len(body.graph.outputs)))  # type: ignore[attr-defined]
