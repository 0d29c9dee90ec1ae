"""Means, squares and what norms read alike of a graph."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from zenith_jax.errors import Refusal, refuse
from zenith_jax.ir._compat import JaxprEqn
from zenith_jax.ir.term import Axis, Term, Terms


def mean_of(
    terms: Terms, term: Term, path: list[JaxprEqn], also: Sequence[str] = ()
) -> tuple[Term, list[Axis]] | Refusal | None:
    """sum(x) / N or sum(x) * (1/N) over axes of N elements: (x, axes). `also`: as in `Terms.peel`."""
    walked: list[JaxprEqn] = []
    term = terms.peel(term, walked, also)
    eqn = terms.producer(term, "div", "mul", "reduce_sum")
    if eqn is None:
        return None
    divisor, inverse = 1.0, False
    literal_dtype: Any = np.float32
    if eqn.primitive.name != "reduce_sum":
        walked.append(eqn)
        operands = terms.operands(term, eqn)
        constants = [terms.constant(t) for t in operands]
        if constants[1] is not None:
            divisor, term, literal_dtype = constants[1], operands[0], operands[1].dtype
        elif constants[0] is not None and eqn.primitive.name == "mul":
            divisor, term, literal_dtype = constants[0], operands[1], operands[0].dtype
        else:
            return None
        inverse = eqn.primitive.name == "mul"
        term = terms.peel(term, walked, also)
        eqn = terms.producer(term, "reduce_sum")
        if eqn is None:
            return None
    operand, reduced = terms.reduced(term, eqn)
    walked.append(eqn)
    if not reduced or divisor == 1.0:
        return None  # a sum, as in an L2 norm: nothing like a mean
    size = math.prod(a.size for a in reduced)
    # As the program computes it: N or 1/N rounded to the literal's dtype, and nothing else.
    rounded = np.asarray(size, literal_dtype)
    expected = (
        {float(np.asarray(1.0 / size, literal_dtype)), float(np.asarray(1.0, literal_dtype) / rounded)}
        if (inverse)
        else {float(rounded)}
    )
    if divisor not in expected:
        return refuse(
            "the sum over {n} elements is divided by {d}",
            n=size,
            axes=len(reduced),
            depth=2,
            d=(1 / divisor if divisor else 0) if inverse else divisor,
            advice="a mean divides by their number",
        )
    path.extend(walked)
    return terms.peel(operand, path, also), reduced


def square_of(terms: Terms, term: Term, path: list[JaxprEqn], also: Sequence[str] = ()) -> Term | None:
    """x of x*x, square(x), integer_pow(x, 2)."""
    term = terms.peel(term, path, also)
    eqn = terms.producer(term, "square", "integer_pow", "mul")
    if eqn is None:
        return None
    operands = terms.operands(term, eqn)
    if eqn.primitive.name == "integer_pow" and eqn.params["y"] != 2:
        return None
    if eqn.primitive.name == "mul" and not terms.same(*operands):
        return None
    path.append(eqn)
    return terms.peel(operands[0], path, also)


def eps_and_variance(terms: Terms, inside: Term) -> tuple[float, Term, JaxprEqn] | None:
    """Of what stands below the square root, variance + eps with a constant eps."""
    addition = terms.producer(inside, "add")
    if addition is None:
        return None
    first, second = terms.operands(inside, addition)
    constants = terms.constant(first), terms.constant(second)
    if constants[0] is None and constants[1] is not None:
        return float(constants[1]), first, addition
    if constants[1] is None and constants[0] is not None:
        return float(constants[0]), second, addition
    return None


def unclamped(terms: Terms, term: Term, path: list[JaxprEqn], also: Sequence[str] = ()) -> Term | None:
    """v of max(0, v), or the term; None where it is the maximum with something else."""
    term = terms.peel(term, path, also)
    clamp = terms.producer(term, "max")
    if clamp is None:
        return term
    sides = [t for t in terms.operands(term, clamp) if terms.constant(t) != 0.0]
    if len(sides) != 1:
        return None
    path.append(clamp)
    return terms.peel(sides[0], path, also)
