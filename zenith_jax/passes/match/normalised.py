"""The normalised value that norm.py climbs to: (x - mean) * rstd * scale, or x * rstd * scale, and its spellings."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from zenith_jax.errors import Refusal, refuse
from zenith_jax.ir._compat import JaxprEqn, Var
from zenith_jax.ir.graph import VIEWS, Graph
from zenith_jax.ir.term import Axis, Term, Terms
from zenith_jax.passes.match.moments import mean_of


@dataclasses.dataclass(frozen=True)
class Moments:
    """v = variance of x along `axis` (centred), or its mean square (not centred).

    in_one_pass: computed as mean(x^2) - mean(x)^2.
    """

    x: Term
    axis: Axis
    centred: bool
    mean: Term | None
    inner: tuple[JaxprEqn, ...]
    in_one_pass: bool = False


@dataclasses.dataclass(frozen=True)
class Normalised:
    """A normalised value: its variable, scale (None: 1) and the equations that it replaces. x is in `top`'s axes.
    bias: where the value has it already."""

    var: Var
    top: Term
    scale: Term | None
    x: Term
    axis: Axis
    inner: tuple[JaxprEqn, ...]
    bias: Term | None = None


def normalised(terms: Terms, var: Var, root: JaxprEqn, rstd: Term, moments: Moments) -> Normalised | Refusal:
    """Reads `var` as x_centred * rstd * scale."""
    product_path: list[JaxprEqn] = []
    top = terms.of(var)
    factors = _factors(terms, top, root, product_path)
    if isinstance(factors, Refusal):
        return factors
    found_rstd, rest = factors
    full = [(f, e) for f, e in rest if f.axis_set == top.axis_set]
    narrow = [(f, e) for f, e in rest if f.axis_set != top.axis_set]
    if len(full) != 1 or full[0][1] != 1:
        return refuse("the product has {n} full-size factors besides 1/sqrt(variance + eps)", n=len(full), depth=3)
    centred = _centred(terms, full[0][0], moments)
    if isinstance(centred, Refusal):
        return centred
    x, renamed, steps = centred
    axis = renamed[moments.axis]
    scale = _scale(found_rstd, narrow, rstd, renamed, axis)
    return scale if isinstance(scale, Refusal) else Normalised(var, top, scale, x, axis, (*product_path, *steps))


def _factors(
    terms: Terms, top: Term, root: JaxprEqn, path: list[JaxprEqn]
) -> tuple[Term, list[tuple[Term, int]]] | Refusal:
    """Reads `top` as a product with the reciprocal standard deviation: (it, the other factors and exponents)."""
    product = terms.product(top, path)
    wanted_exponent = 1 if root.primitive.name == "rsqrt" else -1
    if product.coefficient != 1.0:
        return refuse("the norm is scaled by the constant {c}", c=product.coefficient, depth=3)
    rest: list[tuple[Term, int]] = []
    found_rstd: Term | None = None
    for factor, exponent in product.factors:
        if factor.atom is root.outvars[0] and exponent == wanted_exponent:
            found_rstd = factor
        else:
            rest.append((factor, exponent))
    if found_rstd is None:
        return refuse("the standard deviation is used as a factor, not as a divisor", depth=3)
    return found_rstd, rest


def _scale(
    found_rstd: Term, narrow: list[tuple[Term, int]], rstd: Term, renamed: dict[Axis, Axis], axis: Axis
) -> Term | Refusal | None:
    """The factor beside the standard deviation, which must be that of x's own rows. None: 1."""
    # Along an axis that x has not, the standard deviation was broadcast: it is the same at every index.
    if any(found is not renamed.get(a, found) for found, a in zip(found_rstd.axes, rstd.axes, strict=True) if a):
        return refuse("the standard deviation of one row divides another", depth=4)
    if len(narrow) > 1 or any(e != 1 or f.axis_set != {axis} for f, e in narrow):
        return refuse("a factor of the norm does not run along the normalised axis alone", depth=4)
    return narrow[0][0] if narrow else None


def distributed(terms: Terms, var: Var, root: JaxprEqn, rstd: Term, moments: Moments) -> Normalised | Refusal | None:
    """x * s + (bias - mean * s), s = rstd * scale being `var`: batch norm's spelling, in which Keras writes both."""
    views: list[JaxprEqn] = []
    products = list(_readers(terms.graph, var, views))
    s = terms.peel(terms.of(var), views)
    if len(products) != 2 or terms.graph.is_output(var) or any(e.primitive.name != "mul" for e in products):
        return None
    for product in products:
        found = _from_product(terms, product, s, root, rstd, moments)
        if isinstance(found, Normalised):
            return dataclasses.replace(found, inner=(*found.inner, *views, *products))
        if found is not None:
            return found
    return None


def _from_product(
    terms: Terms, product: JaxprEqn, s: Term, root: JaxprEqn, rstd: Term, moments: Moments
) -> Normalised | Refusal | None:
    """Reads the only sum in which x * s, `product`, is used. None if it is another product."""
    total = terms.graph.only_user(product.outvars[0])
    if total is None or total.primitive.name not in ("add", "sub"):
        return None
    place = [a is product.outvars[0] for a in total.invars].index(True)
    sign = -1 if total.primitive.name == "sub" else 1
    if sign < 0 and place == 1:
        return None
    top, path = terms.of(total.outvars[0]), [total]
    operands = terms.operands(top, total)
    of_x = _times(terms, operands[place], s, path)
    bound = None if of_x is None else terms.unify(moments.x, of_x.other, [a for a in moments.x.axes if a is not None])
    if of_x is None or bound is None:
        return None
    x, axis = terms.peel(of_x.other, path), bound[moments.axis]
    if of_x.sign != 1:
        return refuse("the norm is scaled by the constant {c}", c=-1, depth=3)
    factors = _factors(terms, of_x.base, root, path)
    scale = factors if isinstance(factors, Refusal) else _scale(*factors, rstd, bound, axis)
    if isinstance(scale, Refusal):
        return scale
    summands = _summands(terms, operands[1 - place], sign, path)
    of_mean = [_times(terms, t, s, path) for _, t in summands]
    mean = next((m for m in of_mean if m is not None), None)
    if mean is None:
        return None
    number = of_mean.index(mean)
    if mean.sign * summands[number][0] != -1 or not terms.same(of_x.base, mean.base):
        return refuse("what is subtracted is not the mean times what x is multiplied by", depth=4)
    if not is_mean_of(terms, mean.other, x, axis, path):
        return refuse("what is subtracted from x is not its mean along the normalised axis", depth=3)
    biases = [(sign, terms.peel(t)) for n, (sign, t) in enumerate(summands) if n != number]
    if any(sign != 1 or t.axis_set != {axis} for sign, t in biases):
        return refuse("what is added to the norm does not run along the normalised axis alone", depth=4)
    return Normalised(total.outvars[0], top, scale, x, axis, tuple(path), biases[0][1] if biases else None)


def _readers(graph: Graph, var: Var, path: list[JaxprEqn]) -> Iterator[JaxprEqn]:
    """What reads the value, or a view of it."""
    for user in graph.users_of(var):
        if user.primitive.name in VIEWS:
            path.append(user)
            yield from _readers(graph, user.outvars[0], path)
        else:
            yield user


@dataclasses.dataclass(frozen=True)
class _Product:
    """sign * other * base"""

    sign: int
    other: Term
    base: Term


def _times(terms: Terms, term: Term, base: Term, path: list[JaxprEqn]) -> _Product | None:
    """The term as a product with `base`, whatever its axes."""
    steps: list[JaxprEqn] = []
    sign, term = _negated(terms, term, steps)
    eqn = terms.producer(term, "mul")
    if eqn is None:
        return None
    operands = terms.operands(term, eqn)
    peeled = [terms.peel(t) for t in operands]
    places = [i for i, t in enumerate(peeled) if t.atom is base.atom]
    if len(places) != 1:
        return None
    other_sign, other = _negated(terms, operands[1 - places[0]], steps)
    path += [*steps, eqn]
    return _Product(sign * other_sign, other, peeled[places[0]])


def _negated(terms: Terms, term: Term, path: list[JaxprEqn]) -> tuple[int, Term]:
    """(-1, x) of -x, else (1, the term)."""
    term = terms.peel(term, path)
    eqn = terms.producer(term, "neg")
    if eqn is None:
        return 1, term
    path.append(eqn)
    return -1, terms.peel(terms.operands(term, eqn)[0], path)


def _summands(terms: Terms, term: Term, sign: int, path: list[JaxprEqn]) -> list[tuple[int, Term]]:
    """The term, or the two of its sum or difference, each with its sign."""
    term = terms.peel(term, path)
    eqn = terms.producer(term, "add", "sub")
    if eqn is None:
        return [(sign, term)]
    path.append(eqn)
    first, second = terms.operands(term, eqn)
    return [(sign, first), (sign if eqn.primitive.name == "add" else -sign, second)]


def _centred(terms: Terms, term: Term, moments: Moments) -> tuple[Term, dict[Axis, Axis], list[JaxprEqn]] | Refusal:
    """Reads the factor as x - mean(x), or x for rms: (x, the axes of the moments renamed to the result's, path)."""
    steps: list[JaxprEqn] = []
    term = terms.peel(term, steps)
    if not moments.centred:
        bound = terms.unify(moments.x, term, [a for a in moments.x.axes if a is not None])
        if bound is None:
            return refuse("what is divided by the root mean square is another value than x", depth=3)
        return term, bound, steps
    eqn = terms.producer(term, "sub")
    if eqn is None:
        return refuse("x is divided by its standard deviation without its mean subtracted", depth=3)
    x, mean = terms.operands(term, eqn)
    x = terms.peel(x, steps)
    bound = terms.unify(moments.x, x, [a for a in moments.x.axes if a is not None])
    if bound is None:
        return refuse("the variance is of another value than x", depth=3)
    if not is_mean_of(terms, mean, x, bound[moments.axis], steps):
        return refuse("what is subtracted from x is not its mean along the normalised axis", depth=3)
    steps.append(eqn)
    return x, bound, steps


def mean_along(terms: Terms, term: Term, path: list[JaxprEqn]) -> tuple[Term, Axis] | Refusal | None:
    """The mean of x along one axis: (x, axis). Over several it is a group norm's."""
    found = mean_of(terms, term, path)
    if found is None or isinstance(found, Refusal):
        return found
    x, reduced = found
    return (x, reduced[0]) if len(reduced) == 1 else None


def is_mean_of(terms: Terms, mean: Term, x: Term, axis: Axis, path: list[JaxprEqn]) -> bool:
    """Whether `mean` is the mean of x along `axis`."""
    found = mean_along(terms, mean, path)
    if found is None or isinstance(found, Refusal):
        return False
    operand, reduced = found
    bound = terms.unify(operand, x, [reduced])
    return bound is not None and list(bound.values()) == [axis]
