"""Programs as lists of equations that one can change, and all changes of one thing in them.

A mutant has one literal, one param (an axis, dimension numbers, strides), one primitive, one operand or one operand
order changed. A Program is evaluated by itself, and shares no code with the rewriter.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.extend.core as jec
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Eqn:
    primitive: Any
    params: dict[str, Any]
    inputs: tuple[Any, ...]  # an int (a value's number) or a literal's value with its dtype
    outputs: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Program:
    arity: int
    consts: tuple[Any, ...]
    eqns: tuple[Eqn, ...]
    outputs: tuple[Any, ...]
    avals: dict[int, Any]

    @classmethod
    def trace(cls, function: Callable, args: Sequence[Any]) -> Program:
        closed = jax.make_jaxpr(function)(*args)
        eqns: list[Eqn] = []
        avals: dict[int, Any] = {}

        def new(var: Any) -> int:
            avals[len(avals)] = var.aval
            return len(avals) - 1

        def walk(jaxpr: Any, env: dict[Any, Any]) -> list[Any]:
            def read(atom: Any) -> Any:
                return np.asarray(atom.val, atom.aval.dtype) if isinstance(atom, jec.Literal) else env[atom]

            for eqn in jaxpr.eqns:
                inputs = [read(a) for a in eqn.invars]
                if eqn.primitive.name in ("jit", "pjit", "closed_call"):
                    inner = eqn.params["jaxpr"]
                    opened = getattr(inner, "jaxpr", inner)
                    inner_env = dict(zip(opened.invars, inputs, strict=True))
                    inner_env.update(zip(opened.constvars, map(np.asarray, inner.consts), strict=True))
                    env.update(zip(eqn.outvars, walk(opened, inner_env), strict=True))
                    continue
                env.update((v, new(v)) for v in eqn.outvars)
                eqns.append(Eqn(eqn.primitive, eqn.params, tuple(inputs), tuple(env[v] for v in eqn.outvars)))
            return [read(a) for a in jaxpr.outvars]

        opened = getattr(closed, "jaxpr", closed)
        env = {v: new(v) for v in (*opened.invars, *opened.constvars)}
        outputs = walk(opened, env)
        return cls(len(opened.invars), tuple(map(np.asarray, closed.consts)), tuple(eqns), tuple(outputs), avals)

    def __call__(self, *args: Any) -> list[Any]:
        """Evaluates the program in the float dtype of its arguments: float64 arguments make an oracle."""
        wide = any(jnp.dtype(a.dtype) == np.float64 for a in args)

        def widened(x: Any) -> Any:
            return x.astype(np.float64) if wide and x.dtype == np.float32 else x

        env = dict(enumerate([*args, *map(widened, self.consts)]))

        def read(x: Any) -> Any:
            return env[x] if isinstance(x, int) else widened(x)

        for eqn in self.eqns:
            params = {
                name: np.dtype(np.float64) if wide and isinstance(value, np.dtype) and value == np.float32 else value
                for name, value in eqn.params.items()
            }
            out = eqn.primitive.bind(*map(read, eqn.inputs), **params)
            env.update(zip(eqn.outputs, out if eqn.primitive.multiple_results else [out], strict=True))
        return [read(x) for x in self.outputs]


# --- mutations --------------------------------------------------------------------------------------------------------

SWAPPED = {
    "add": "sub",
    "sub": "add",
    "mul": "div",
    "div": "mul",
    "max": "min",
    "min": "max",
    "exp": "tanh",
    "tanh": "exp",
    "rsqrt": "sqrt",
    "sqrt": "rsqrt",
    "and": "or",
    "or": "and",
    "erf": "tanh",
    "erfc": "erf",
    "logistic": "tanh",
    "reduce_max": "reduce_min",
    "reduce_sum": "reduce_max",
    "square": "abs",
    "neg": "abs",
}
COMPARISONS = ("ge", "gt", "le", "lt", "eq", "ne")


def _primitives() -> dict[str, Any]:
    """{name: (primitive, its params)}, gathered from traces."""
    x = jnp.ones((2, 2))
    functions = [
        lambda x: x + x,
        lambda x: x - x,
        lambda x: x * x,
        lambda x: x / x,
        jnp.exp,
        jnp.tanh,
        jnp.abs,
        jnp.square,
        jax.lax.rsqrt,
        jax.lax.sqrt,
        jax.lax.erf,
        lambda x: jax.lax.max(x, x + 1),
        lambda x: jax.lax.min(x, x + 1),
        lambda x: (x > 0) & (x < 1),
        lambda x: (x > 0) | (x < 1),
        lambda x: x >= x,
        lambda x: x <= x,
        lambda x: x == x,
        lambda x: x != x,
        lambda x: jax.lax.reduce_max(x, (0,)),
        lambda x: jax.lax.reduce_min(x, (0,)),
        jax.lax.stop_gradient,
        lambda x: -x,
        jax.lax.logistic,
    ]
    found = {}
    for function in functions:
        for eqn in Program.trace(function, (x,)).eqns:
            found[eqn.primitive.name] = eqn.primitive, eqn.params
    return found


def mutants(program: Program) -> Iterator[tuple[str, Program]]:
    primitives = _primitives()
    for i, eqn in enumerate(program.eqns):
        for what, changed in _changed(eqn, primitives, program, i):
            eqns = (*program.eqns[:i], changed, *program.eqns[i + 1 :])
            yield f"{i} {eqn.primitive.name}: {what}", dataclasses.replace(program, eqns=eqns)


def _changed(eqn: Eqn, primitives: dict[str, Any], program: Program, i: int) -> Iterator[tuple[str, Eqn]]:
    name = eqn.primitive.name
    for j, x in enumerate(eqn.inputs):
        if not isinstance(x, int):
            for what, value in _changed_literal(x):
                yield f"literal {x} -> {what}", _with_input(eqn, j, value)
    swaps = [SWAPPED[name]] if name in SWAPPED else [c for c in COMPARISONS if name in COMPARISONS and c != name]
    for other in swaps:
        primitive, params = primitives[other]
        params = {k: eqn.params.get(k, v) for k, v in params.items()}
        yield f"-> {other}", dataclasses.replace(eqn, primitive=primitive, params=params)
    if name in ("sub", "div", "dot_general", *COMPARISONS):
        yield "operands swapped", dataclasses.replace(eqn, inputs=eqn.inputs[::-1])
    if name == "select_n":
        which, *cases = eqn.inputs
        yield "cases swapped", dataclasses.replace(eqn, inputs=(which, *cases[::-1]))
    for what, params in _changed_params(eqn):
        yield what, dataclasses.replace(eqn, params={**eqn.params, **params})
    for j, x in enumerate(eqn.inputs):
        if isinstance(x, int):
            yield from _changed_operand(eqn, j, program, i)


def _with_input(eqn: Eqn, j: int, value: Any) -> Eqn:
    return dataclasses.replace(eqn, inputs=(*eqn.inputs[:j], value, *eqn.inputs[j + 1 :]))


def _changed_literal(x: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    if x.dtype == bool:
        yield "not", ~x
    elif np.issubdtype(x.dtype, np.floating):
        with np.errstate(all="ignore"):
            for what, value in (("x1.01", x * np.float32(1.01)), ("+1", x + 1), ("sign", -x), ("0", x * 0 + 0)):
                if not np.array_equal(value, x):
                    yield what, np.asarray(value, x.dtype)
    else:
        yield "+1", np.asarray(x + 1, x.dtype)
        yield "sign", np.asarray(-x, x.dtype)


def _changed_params(eqn: Eqn) -> Iterator[tuple[str, dict[str, Any]]]:
    params, name = eqn.params, eqn.primitive.name
    if "axes" in params:
        rank = 4  # invalid ones fail to trace
        for axes in itertools.combinations(range(rank), len(params["axes"])):
            if axes != tuple(params["axes"]):
                yield f"axes {axes}", dict(axes=axes)
    if name == "transpose":
        for permutation in itertools.permutations(params["permutation"]):
            if permutation != tuple(params["permutation"]):
                yield f"permutation {permutation}", dict(permutation=permutation)
    if name == "broadcast_in_dim":
        rank = len(params["shape"])
        for dims in itertools.combinations(range(rank), len(params["broadcast_dimensions"])):
            if dims != tuple(params["broadcast_dimensions"]):
                yield f"broadcast_dimensions {dims}", dict(broadcast_dimensions=dims)
    if name == "iota":
        for dimension in range(len(params["shape"])):
            if dimension != params["dimension"]:
                yield f"dimension {dimension}", dict(dimension=dimension)
    if name == "slice" and params["strides"] is None:
        for dimension in range(len(params["start_indices"])):
            yield f"dimension {dimension} moved", _moved(params, dimension)
    if name == "split":
        for axis in range(3):
            if axis != params["axis"]:
                yield f"axis {axis}", dict(axis=axis)
    if name == "conv_general_dilated":
        yield from _changed_convolution(params)
    if name == "reduce_window_max":
        yield from _changed_windows(params)
    if name == "integer_pow":
        for y in (1, 3, 4):
            yield f"y {y}", dict(y=y)
    if name == "dot_general":
        (lc, rc), (lb, rb) = params["dimension_numbers"]
        for side in itertools.permutations((*rc, *rb, *_free(eqn, 1))):
            numbers = ((tuple(lc), side[: len(rc)]), (tuple(lb), side[len(rc) : len(rc) + len(rb)]))
            if numbers != params["dimension_numbers"]:
                yield f"rhs dimensions {numbers}", dict(dimension_numbers=numbers)
        for side in itertools.permutations((*lc, *lb, *_free(eqn, 0))):
            numbers = ((side[: len(lc)], tuple(rc)), (side[len(lc) : len(lc) + len(lb)], tuple(rb)))
            if numbers != params["dimension_numbers"]:
                yield f"lhs dimensions {numbers}", dict(dimension_numbers=numbers)


def _moved(params: dict[str, Any], dimension: int) -> dict[str, Any]:
    """A slice that begins and ends one element away, where there is room for it."""
    step = 1 if params["start_indices"][dimension] == 0 else -1
    move = lambda at: tuple(n + step * (d == dimension) for d, n in enumerate(at))  # noqa: E731
    return dict(start_indices=move(params["start_indices"]), limit_indices=move(params["limit_indices"]))


def _changed_convolution(params: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for name in ("window_strides", "lhs_dilation", "rhs_dilation"):
        for value in itertools.product((1, 2), repeat=2):
            if value != tuple(params[name]):
                yield f"{name} {value}", {name: value}
    for axis, (low, high) in enumerate(params["padding"]):
        for pair in ((low + 1, high), (high, low), (low, high - 1)):
            padding = tuple(pair if i == axis else p for i, p in enumerate(params["padding"]))
            if padding != tuple(params["padding"]):
                yield f"padding {padding}", dict(padding=padding)
    for groups in (1, 2, 4):
        if groups != params["feature_group_count"]:
            yield f"{groups} groups", dict(feature_group_count=groups)
    yield "groups of the batch", dict(feature_group_count=1, batch_group_count=params["feature_group_count"])
    numbers = params["dimension_numbers"]
    for i, spec in enumerate(numbers):
        for other in itertools.permutations(spec):
            if other != tuple(spec):
                yield (
                    f"dimension numbers {i} {other}",
                    dict(dimension_numbers=numbers._replace(**{numbers._fields[i]: other})),
                )


def _changed_windows(params: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for name in ("window_dimensions", "window_strides", "base_dilation", "window_dilation"):
        for axis, value in itertools.product(range(len(params[name])), (1, 2, 3)):
            if value != params[name][axis]:
                values = tuple(value if i == axis else v for i, v in enumerate(params[name]))
                yield f"{name} {values}", {name: values}
    for axis, pair in itertools.product(range(len(params["padding"])), ((0, 1), (1, 0), (0, -1))):
        padding = tuple(pair if i == axis else p for i, p in enumerate(params["padding"]))
        yield f"padding {padding}", dict(padding=padding)


def _free(eqn: Eqn, side: int) -> list[int]:
    contract, batch = eqn.params["dimension_numbers"][0][side], eqn.params["dimension_numbers"][1][side]
    used = {*contract, *batch}
    rank = len(used) + 1
    return [d for d in range(rank) if d not in used][:1]


def _changed_operand(eqn: Eqn, j: int, program: Program, i: int) -> Iterator[tuple[str, Eqn]]:
    """Another value of the same type as operand; the operand without its gradient, or through an integer dtype."""
    aval = program.avals[eqn.inputs[j]]
    known = {*range(program.arity + len(program.consts)), *(v for e in program.eqns[:i] for v in e.outputs)}
    for other in sorted(known):
        if other != eqn.inputs[j] and (program.avals[other].shape, program.avals[other].dtype) == (
            aval.shape,
            aval.dtype,
        ):
            yield f"operand {j} is value {other}", _with_input(eqn, j, other)
    if np.issubdtype(aval.dtype, np.floating):
        for what, change in (("stopped", jax.lax.stop_gradient), ("truncated", _truncated)):
            yield f"operand {j} {what}", dataclasses.replace(eqn, primitive=_Changed(eqn.primitive, j, change))


def _truncated(x: Any) -> Any:
    """Through an integer dtype and back."""
    return x.astype(jnp.int32).astype(x.dtype)


class _Changed:
    """A primitive behind a change of one operand."""

    def __init__(self, primitive: Any, j: int, change: Callable[[Any], Any]):
        self.name, self.primitive, self.j, self.change = primitive.name, primitive, j, change
        self.multiple_results = primitive.multiple_results

    def bind(self, *operands: Any, **params: Any) -> Any:
        values = list(operands)
        values[self.j] = self.change(values[self.j])
        return self.primitive.bind(*values, **params)
