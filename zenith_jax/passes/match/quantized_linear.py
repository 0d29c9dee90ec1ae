"""x @ (w * scale) + bias with w stored as integers, read from the product: downwards into w, upwards to scale and bias.

  out[*b, *n] = sum over k of x[*b, k] * w[k, *n] * scale[g, *n]  + bias[*n]        k = (g, i), groups of neighbours

The scale stands below the product or, where it has no g, above it. k is one dimension of x; *n may be several, which
become one. w is int8 or int4, cast to a float (through wider integers or not), or multiplied as it is. The program
rounds w * scale, or the product, to its dtypes; the kernel rounds the result alone.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax.numpy as jnp

from zenith_jax.errors import Refusal, refuse
from zenith_jax.ir import _compat
from zenith_jax.ir._compat import JaxprEqn, Var
from zenith_jax.ir.graph import Graph
from zenith_jax.ir.term import Axis, Term, Terms, is_float
from zenith_jax.ops.quantized_linear import WEIGHT_DTYPES, quantized_linear
from zenith_jax.passes.match._match import CASTS, Match, Order, arranged, as_precise, is_wider, order_of

_RESHAPED = ("reshape",)


@dataclasses.dataclass(frozen=True)
class Weights:
    """w and scale as terms without merged axes; `path`: the equations between them and the product."""

    w: Term
    scale: Term | None
    path: tuple[JaxprEqn, ...]


@dataclasses.dataclass(frozen=True)
class Above:
    """What follows the product: the last value, and the equations up to it."""

    top: Var
    path: tuple[JaxprEqn, ...] = ()
    scale: Term | None = None
    bias: Term | None = None


def match(graph: Graph, eqn: JaxprEqn) -> Match | Refusal | None:
    """`eqn` is the product."""
    if eqn.primitive.name != "dot_general":
        return None
    (left, right), (batch, _) = eqn.params["dimension_numbers"]
    x, matrix = eqn.invars[:2]
    if batch or len(left) != 1 or not isinstance(x, Var) or not isinstance(matrix, Var):
        return None
    if not is_float(x.aval.dtype) or not is_float(eqn.outvars[0].aval.dtype):
        return None
    if eqn.params.get("out_sharding") is not None or len(matrix.aval.shape) < 2:
        return None
    if any(_compat.explicit_sharding(a.aval) is not None for a in (x, matrix)):
        return None  # XLA splits the product over the devices, as it is written
    if matrix.aval.shape[right[0]] == 1:
        return None
    terms = Terms(graph)
    product = terms.of(eqn.outvars[0])
    below_x, below, (k,) = terms.contracted(product, eqn)
    weights = _weights(terms, below)
    if weights is None or isinstance(weights, Refusal):
        return weights
    rows = tuple(a for a in below_x.axes if a is not k)
    features = tuple(a for a in below.axes if a is not None and a is not k)
    parts = tuple(a for a in terms.split(Term(x, (k,))).axes if a is not None)
    order = tuple(a for a in weights.w.axes if a is not None)
    transposed = order == (*features, *parts)
    if not transposed and order != (*parts, *features):
        return refuse("the weights are reordered on their way into the product", depth=1)
    above = _above(terms, x, product, features, weights.scale is None)
    if above is None:
        return None  # of integers as they are
    scale = weights.scale or above.scale
    assert scale is not None
    group = parts[0] if len(parts) == 2 and parts[0] in scale.axis_set else None
    if not scale.axis_set <= {*features, *([group] if group else [])}:
        return refuse(
            "the scale of the weights changes along what is summed, other than in groups of neighbours",
            depth=2,
            advice="one scale for each result, or for each of some groups of neighbours and each result",
        )
    if not is_float(scale.dtype) or scale.dtype == jnp.float64:
        return refuse("the scale is {dtype}", dtype=scale.dtype.name, depth=2)
    return _build(graph, eqn, x, left[0], weights, rows, features, group, scale, above, k, transposed)


def _build(
    graph: Graph,
    eqn: JaxprEqn,
    x: Var,
    summed: int,
    weights: Weights,
    rows: tuple[Axis | None, ...],
    features: tuple[Axis, ...],
    group: Axis | None,
    scale: Term,
    above: Above,
    k: Axis,
    transposed: bool,
) -> Match | Refusal:
    inner = (*weights.path, eqn, *above.path)
    if graph.escapes(inner, [above.top]) is not None:
        return refuse("the widened weights, or the product before its scale, are used elsewhere too", depth=3)
    dtype = above.top.aval.dtype
    wide = jnp.promote_types(x.aval.dtype, dtype)
    scale_order = order_of(scale, (group, *features))
    bias_order = None if above.bias is None else order_of(above.bias, features)
    assert scale_order is not None
    root = graph.producer(above.top)
    assert root is not None
    optional = [] if above.bias is None else [above.bias.atom]
    sizes = tuple(a.size for a in features)
    groups = 1 if group is None else group.size
    w_dtype = weights.w.dtype.name
    return Match(
        op="quantized_linear",
        root=root,
        results=(above.top,),
        inner=inner,
        leaves=(x, weights.w.atom, scale.atom, *optional),
        emit=emit,
        static=(
            ("summed", summed),
            ("shape", tuple(above.top.aval.shape)),
            ("features", sizes),
            ("groups", groups),
            ("scale_order", scale_order),
            ("bias_order", bias_order),
            ("transposed", transposed),
            ("dtype", dtype.name),
        ),
        detail=", ".join([w_dtype, *([f"{groups} groups"] if groups > 1 else []), *(["bias"] if optional else [])]),
        case=(
            ("dtype", wide.name),
            ("w_dtype", w_dtype),
            ("rows", math.prod(a.size for a in rows if a is not None)),
            ("k", k.size),
            ("n", math.prod(sizes)),
            ("groups", groups),
            ("transposed", transposed),
        ),
        yields=True,
    )


def emit(
    x: Any,
    w: Any,
    scale: Any,
    *bias: Any,
    summed: int,
    shape: tuple[int, ...],
    features: tuple[int, ...],
    groups: int,
    scale_order: Order,
    bias_order: Order | None,
    transposed: bool,
    dtype: str,
):
    """summed: the dimension of x. shape, dtype: of the result. features: the sizes of n."""
    x = as_precise(jnp.moveaxis(x, summed, -1), dtype)
    k, n = x.shape[-1], math.prod(features)
    scale = jnp.broadcast_to(arranged(scale, scale_order), (groups, *features)).reshape(groups, n)
    if bias_order is not None:
        bias = (jnp.broadcast_to(arranged(bias[0], bias_order), features).reshape(n),)
    y = quantized_linear(
        x,
        w.reshape((n, k) if transposed else (k, n)),
        scale if groups > 1 else scale[0],
        *bias,
        transposed=transposed,
    )
    return (y.reshape(shape).astype(dtype),)


# --- below the product ------------------------------------------------------------------------------------------------


def _weights(terms: Terms, term: Term) -> Weights | Refusal | None:
    """The integers and their scale, of which the product's operand is made."""
    path: list[JaxprEqn] = []
    inner = terms.peel(term, path, _RESHAPED)
    eqn = terms.producer(inner, "mul")
    if eqn is None:
        w = _integers(terms, inner, path)
        return w if w is None or isinstance(w, Refusal) else Weights(terms.split(w), None, tuple(path))
    path.append(eqn)
    refusal: Refusal | None = None
    operands = terms.operands(inner, eqn)
    for factor, other in (operands, operands[::-1]):
        walked: list[JaxprEqn] = []
        w = _integers(terms, terms.peel(factor, walked, _RESHAPED), walked)
        if isinstance(w, Term):
            scale = terms.peel(other, walked, _RESHAPED)
            if not isinstance(scale.atom, Var):
                return None
            # Split last: what one of the two is made of may show where axes of the other end.
            return Weights(terms.split(w), terms.split(scale), (*path, *walked))
        refusal = refusal or w
    return refusal


def _integers(terms: Terms, term: Term, path: list[JaxprEqn]) -> Term | Refusal | None:
    """What a cast from int8 or int4 casts; or the term itself, where it is that."""
    if is_float(term.dtype):
        eqn = terms.producer(term, "convert_element_type")
        if eqn is None or not jnp.issubdtype(eqn.invars[0].aval.dtype, jnp.integer):
            return None
        path.append(eqn)
        (term,) = terms.operands(term, eqn)
    while True:
        term = terms.peel(term, path, _RESHAPED)
        eqn = terms.producer(term, "convert_element_type")
        if eqn is None or not isinstance(eqn.invars[0], Var) or not _is_widening(eqn):
            break
        path.append(eqn)
        (term,) = terms.operands(term, eqn)
    if terms.producer(term, "sub") is not None:
        return refuse("a zero point is subtracted from the weights", depth=1)
    if not isinstance(term.atom, Var) or not jnp.issubdtype(term.dtype, jnp.integer):
        return None
    if term.dtype not in WEIGHT_DTYPES:
        return refuse("the weights are {dtype}; kernels read int8 and int4", dtype=term.dtype.name, depth=1)
    return term


def _is_widening(eqn: JaxprEqn) -> bool:
    """Between signed integers, to one that has all values of the other."""
    old, new = eqn.invars[0].aval.dtype, eqn.outvars[0].aval.dtype
    signed = jnp.issubdtype(old, jnp.signedinteger) and jnp.issubdtype(new, jnp.signedinteger)
    return signed and jnp.iinfo(new).bits >= jnp.iinfo(old).bits


# --- above it ---------------------------------------------------------------------------------------------------------


def _above(terms: Terms, x: Var, product: Term, features: tuple[Axis, ...], wants_scale: bool) -> Above | None:
    """The product with a vector of the features as factor, if `wants_scale`, and with one as addend if there is one.

    None without the factor. Of what would do the last that is not of a wider dtype than x: no kernel writes one.
    """
    graph = terms.graph
    assert isinstance(product.atom, Var)
    found = Above(product.atom)
    candidates = [] if wants_scale else [found]
    while (user := graph.only_user(found.top)) is not None:
        result = user.outvars[0]
        if user.primitive.name in CASTS:
            if not is_float(result.aval.dtype):
                break
            found = dataclasses.replace(found, top=result, path=(*found.path, user))
            is_candidate = result.aval.dtype == x.aval.dtype
        else:
            what = {"mul": "scale", "add": "bias"}.get(user.primitive.name)
            lacks_scale = wants_scale and found.scale is None
            if what is None or lacks_scale != (what == "scale") or getattr(found, what) is not None:
                break
            walked: list[JaxprEqn] = []
            operands = terms.operands(Term(result, product.axes), user)
            other = terms.peel(operands[user.invars[0] is found.top], walked)
            if result.aval.shape != product.atom.aval.shape or not isinstance(other.atom, Var):
                break
            if not other.axis_set <= set(features) or not is_float(other.dtype):
                break
            if graph.depends_on([other.atom], product.atom):
                break
            found = dataclasses.replace(found, top=result, path=(*found.path, *walked, user), **{what: other})
            is_candidate = True
        if is_candidate and (found.scale is not None or not wants_scale):
            candidates.append(found)
    fitting = [c for c in candidates if not is_wider(c.top.aval.dtype, x.aval.dtype)]
    return (fitting or candidates or [None])[-1]
