"""gelu (erf and tanh) and silu, by identity testing.

People write these functions in dozens of ways. So the expression around an erf, tanh, logistic or exp is not compared
with spellings: it is evaluated, in float64 with the program's own literals, at fixed irrational points, and must agree
with the op's formula (traced in the same dtype, so that its literals are rounded alike) at all of them. The expression
holds only analytic primitives of one variable; two different ones agree at 32 unrelated points with probability 0
(Schwartz 1980; for analytic functions the zeros of the difference are isolated). An expression in branches, as the
normal distribution function is, holds if each branch does: x is taken as positive, then as negative, everywhere.
"""

from __future__ import annotations

import functools as ft
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special

from zenith_jax.errors import Refusal
from zenith_jax.ir._compat import JaxprEqn, Var
from zenith_jax.ir.graph import Graph
from zenith_jax.ir.term import Term, Terms, is_float
from zenith_jax.ops.activation import FORMULAS, activation
from zenith_jax.passes.match._match import CASTS, Match, as_precise
from zenith_jax.passes.match.gated import gated

ANCHORS = ("erf", "erfc", "tanh", "logistic", "exp")

_POINTS = np.concatenate(
    [
        np.sqrt([0.0007, 0.013, 0.11, 0.37, 0.73, 1.3, 1.9, 2.7, 3.9, 5.3, 7.7, 11.3, 17.9, 29.3, 47.1, 83.7]),
        -np.sqrt([0.0011, 0.017, 0.13, 0.31, 0.79, 1.1, 2.1, 2.9, 4.1, 5.9, 8.3, 12.7, 19.1, 27.7, 41.3, 79.9]),
    ]
)
# Literals of one formula, computed along two ways, differ by a few float32 ulps (6e-8), which the cubic term and the
# tails amplify about tenfold. 0.0447 instead of 0.044715 differs by 1e-3 at x = -3.
_RTOL, _ATOL = 2e-6, 1e-10
_MAX_CLIMB, _MAX_INPUTS = 12, 12
_CLIMBED = {"mul", "div", "add", "sub", "neg", "convert_element_type", "copy", "copy_p", "select_n"}

_ANALYTIC: dict[str, Callable[..., Any]] = {
    "add": lambda p, x, y: x + y,
    "cos": lambda p, x: np.cos(x),
    "div": lambda p, x, y: x / y,
    "erf": lambda p, x: scipy.special.erf(x),
    "erfc": lambda p, x: scipy.special.erfc(x),
    "exp": lambda p, x: np.exp(x),
    "integer_pow": lambda p, x: x ** p["y"],
    "logistic": lambda p, x: scipy.special.expit(x),
    "mul": lambda p, x, y: x * y,
    "neg": lambda p, x: -x,
    "pow": lambda p, x, y: np.power(x, y),
    "sin": lambda p, x: np.sin(x),
    "square": lambda p, x: x * x,
    "sub": lambda p, x, y: x - y,
    "tanh": lambda p, x: np.tanh(x),
}


class _NotAFunctionOfX(Exception):
    pass


def _value(
    terms: Terms, term: Term, x: Term, inner: dict[int, JaxprEqn], sign: int | None = None, depth: int = 24
) -> Any:
    """The term at `_POINTS` of x. Raises where it depends on anything else, or is not analytic in x.

    sign: that of x, assumed; the value is then the analytic continuation of the branch for it to all points.
    """
    constant = terms.constant(term)
    if constant is not None:
        return np.float64(constant)
    steps: list[JaxprEqn] = []
    while True:
        if terms.graph.same(term.atom, x.atom):
            if term.axes != x.axes:
                raise _NotAFunctionOfX
            break
        eqn = terms.graph.producer(term.atom)
        below = terms._below(term, eqn, ()) if eqn is not None else None
        if below is None:
            break
        steps.append(eqn)  # pyright: ignore[reportArgumentType]
        term = below
    inner.update((id(e), e) for e in steps)
    if terms.graph.same(term.atom, x.atom):
        return _POINTS
    eqn = terms.graph.producer(term.atom)
    if eqn is None or depth == 0:
        raise _NotAFunctionOfX
    name = eqn.primitive.name
    if name not in _ANALYTIC and not (sign is not None and name in ("abs", "select_n")):
        raise _NotAFunctionOfX
    operands = terms.operands(term, eqn)
    value = lambda t: _value(terms, t, x, inner, sign, depth - 1)  # noqa: E731
    inner[id(eqn)] = eqn
    if name == "abs":
        assert sign is not None
        below = value(operands[0])
        return below * (sign * _slope_sign(below))
    if name == "select_n":
        assert sign is not None
        if len(operands) != 3:
            raise _NotAFunctionOfX
        return _chosen(terms, operands, value, inner, sign)
    values = [value(t) for t in operands]
    with np.errstate(all="ignore"):
        return _ANALYTIC[name](eqn.params, *values)


def _slope_sign(values: Any) -> int:
    """The sign of c, where the values are those of c * x."""
    slopes = values / _POINTS
    if np.ndim(values) == 0 or not slopes[0] or np.ptp(slopes) > 1e-12 * abs(slopes[0]):
        raise _NotAFunctionOfX
    return 1 if slopes[0] > 0 else -1


def _chosen(terms: Terms, operands: list[Term], value: Callable, inner: dict[int, JaxprEqn], sign: int) -> Any:
    """where(c * x > 0, a, b) is one of them, by the sign; where(anything else, a, b) is both, if they are equal."""
    which, if_false, if_true = operands
    comparison = terms.producer(terms.peel(which), "gt", "ge", "lt", "le")
    if comparison is None:
        raise _NotAFunctionOfX
    below, bound = terms.operands(terms.peel(which), comparison)
    inner[id(comparison)] = comparison
    values = value(below)
    if terms.constant(bound) is None:
        raise _NotAFunctionOfX
    if terms.constant(bound) == 0:
        positive = sign * _slope_sign(values) > 0
        return value(if_true if positive == (comparison.primitive.name in ("gt", "ge")) else if_false)
    # Analytic functions that are equal at all points are equal wherever the bound is.
    first, second = value(if_true), value(if_false)
    if not np.all(np.abs(first - second) <= _RTOL * np.abs(first) + _ATOL):
        raise _NotAFunctionOfX
    return first


@ft.cache
def _expected(name: str, dtype: str) -> Any:
    """The op's formula at `_POINTS`, with literals as rounded in `dtype`."""
    jaxpr = jax.make_jaxpr(FORMULAS[name])(jax.ShapeDtypeStruct((2,), dtype))
    graph = Graph.of(jaxpr)
    terms = Terms(graph)
    root = terms.of(graph.outvars[0])
    return _value(terms, root, Term(graph.invars[0], root.axes), {})


def match(graph: Graph, eqn: JaxprEqn) -> Match | Refusal | None:
    """`eqn` is the erf, erfc, tanh, logistic or exp."""
    if eqn.primitive.name not in ANCHORS or not is_float(eqn.outvars[0].aval.dtype):
        return None
    terms = Terms(graph)
    found = None
    for root in _roots(graph, eqn):
        found = _identified(terms, root, eqn) or found
    return found


def _roots(graph: Graph, anchor: JaxprEqn) -> list[Var]:
    """Products and quotients above the anchor, along values that are used once."""
    roots, var = [], anchor.outvars[0]
    for _ in range(_MAX_CLIMB):
        users = graph.users_of(var)
        if len(users) != 1 or graph.is_output(var):
            break
        user = users[0]
        if user.primitive.name not in _CLIMBED:
            break
        var = user.outvars[0]
        if user.primitive.name in ("mul", "div"):
            roots.append(var)
    return roots


def _inputs(terms: Terms, root: Term, anchor: JaxprEqn) -> list[Term]:
    """Values below the anchor that its expression could be a function of, nearest first."""
    found: list[Term] = []
    # At the anchor's own operand the axes are those of the root: only elementwise equations lie between.
    queue = [Term(anchor.invars[0], root.axes)]
    while queue and len(found) < _MAX_INPUTS:
        term = queue.pop(0)
        if any(term.atom is f.atom for f in found) or terms.constant(term) is not None:
            continue
        if isinstance(term.atom, Var) and term.atom.aval.shape == root.atom.aval.shape:
            found.append(term)
            eqn = terms.graph.producer(term.atom)
            if eqn is not None and (eqn.primitive.name in _ANALYTIC or eqn.primitive.name in CASTS):
                queue.extend(terms.operands(term, eqn))
    return found


def _identified(terms: Terms, root_var: Var, anchor: JaxprEqn) -> Match | None:
    if root_var.aval.shape != anchor.outvars[0].aval.shape:
        return None
    root = terms.of(root_var)
    for x in _inputs(terms, root, anchor):
        if not is_float(x.dtype):
            continue
        inner: dict[int, JaxprEqn] = {}
        values = _branches(terms, root, x, inner)
        if values is None:
            continue
        compute_dtype = anchor.outvars[0].aval.dtype.name
        for name in FORMULAS:
            expected = _expected(name, compute_dtype)
            if np.all(np.abs(values - expected) <= _RTOL * np.abs(expected) + _ATOL):
                if terms.graph.escapes(inner.values(), [root_var]) is not None:
                    break
                return gated(terms.graph, _build(terms, name, root_var, _below_casts(terms, x, inner), inner))
    return None


def _branches(terms: Terms, root: Term, x: Term, inner: dict[int, JaxprEqn]) -> Any | None:
    """The values of an analytic function; or of both branches, for x > 0 and x < 0, of one that asks for the sign."""
    try:
        return _value(terms, root, x, inner)
    except _NotAFunctionOfX:
        pass
    inner.clear()
    try:
        return np.stack([_value(terms, root, x, inner, sign) for sign in (1, -1)])
    except _NotAFunctionOfX:
        return None


def _below_casts(terms: Terms, x: Term, inner: dict[int, JaxprEqn]) -> Term:
    """x before it was cast up: the kernel computes in float32 inside anyway; `emit` sees to its result."""
    while True:
        eqn = terms.producer(x, "convert_element_type")
        if eqn is None or not is_float(eqn.invars[0].aval.dtype):
            return x
        if jnp.finfo(eqn.invars[0].aval.dtype).bits > jnp.finfo(x.dtype).bits:
            return x
        inner[id(eqn)] = eqn
        x = Term(eqn.invars[0], x.axes)


def _build(terms: Terms, name: str, root: Var, x: Term, inner: dict[int, JaxprEqn]) -> Match:
    producer = terms.graph.producer(root)
    assert producer is not None
    return Match(
        op=name,
        root=producer,
        results=(root,),
        inner=tuple(inner.values()),
        leaves=(x.atom,),
        emit=emit,
        static=(("name", name), ("dtype", root.aval.dtype.name)),
        case=(("dtype", x.dtype.name), ("size", root.aval.size)),
    )


def emit(x, *, name: str, dtype: str):
    return (activation(name, as_precise(x, dtype)).astype(dtype),)
