"""What stands between an attention's softmax and its first product: scale, cap, bias, masks, walked downwards."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from zenith_jax.errors import Refusal, refuse
from zenith_jax.ir._compat import JaxprEqn
from zenith_jax.ir.term import Axis, Term, Terms, is_float
from zenith_jax.passes.match.mask import MaskForm, mask_form

# A finite mask fill must vanish beside any logit: exp(fill - max) must be 0. float16's lowest value is -65504.
FILL_LIMIT = {"float16": -6e4}
DEFAULT_FILL_LIMIT = -998244352.0  # -1e9 as bfloat16 rounds it
# A constant added to all logits does not change a softmax, as long as no fill comes near.
SHIFT_LIMIT = 1e4


@dataclasses.dataclass
class Logits:
    """What stands between softmax and the first product; filled while walking down."""

    scale: float = 1.0  # of what has been reached, in the logits; below a cap, in what it caps
    softcap: float = 0.0  # logits = softcap * tanh(...); 0: no cap
    mask: MaskForm = dataclasses.field(default_factory=MaskForm)
    fills: list[float] = dataclasses.field(default_factory=list)  # as they arrive at the softmax
    added_fill: bool = False  # a finite fill was added to logits instead of replacing them
    dtypes: list[Any] = dataclasses.field(default_factory=list)  # that values are cast to on the way up
    biases: list[tuple[Term, float]] = dataclasses.field(default_factory=list)  # with the factors before them
    inner: list[JaxprEqn] = dataclasses.field(default_factory=list)


def walk(terms: Terms, x: Term, s: Axis, logits: Logits) -> tuple[JaxprEqn, Term, Term] | Refusal:
    """Down from the softmax's input through masks, bias and scale to the product of query and key."""
    while True:
        path: list[JaxprEqn] = []
        x = terms.peel(x, path, also=("reshape",))
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
        if logits.softcap and name not in ("mul", "div", "neg"):
            return refuse("`{name}` stands between the product of query and key and the cap", name=name, depth=4)
        if name == "select_n":
            below = _walk_mask(terms, x, eqn, s, logits)
        elif name in ("mul", "div", "neg"):
            below = _walk_scale(terms, x, eqn, logits)
        elif name in ("add", "sub"):
            below = _walk_bias(terms, x, eqn, s, logits)
        elif name == "tanh":
            # scale * tanh(y) -> |scale| * tanh(±y): the cap is what multiplies the tanh.
            logits.softcap, logits.scale = abs(logits.scale), math.copysign(1.0, logits.scale)
            below = terms.operands(x, eqn)[0]
        else:
            return refuse("`{name}` stands between the product of query and key and the softmax", name=name, depth=4)
        if isinstance(below, Refusal):
            return below
        logits.inner.append(eqn)
        x = below


def _leads_to_dot(terms: Terms, term: Term, s: Axis | None = None) -> bool:
    """Whether the term is a product of two matrices, scaled, masked or biased. s: the key's axis; then also whether no
    other axis comes from the factor with s alone, as that of the query does where a table of biases is multiplied by
    one-hot buckets."""
    for _ in range(12):
        term = terms.peel(term, also=("reshape",))
        eqn = terms.producer(term, "dot_general", "mul", "div", "neg", "add", "sub", "select_n", "tanh")
        if eqn is None:
            return False
        if eqn.primitive.name == "dot_general":
            left, right, _ = terms.contracted(term, eqn)
            key, query = (left, right) if s in left.axis_set else (right, left)
            return s is None or key.axis_set - query.axis_set == {s}
        operands = terms.operands(term, eqn)
        if eqn.primitive.name == "select_n":
            operands = operands[1:]
        operands = [t for t in operands if terms.constant(t) is None]
        if len(operands) == 2:
            return any(_leads_to_dot(terms, t, s) for t in operands)
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
    if not math.isfinite(factor) or not factor or (factor < 0 and logits.fills):
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
    if logits.biases and fill_after != -math.inf:
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
    if all(leads):
        leads = [_leads_to_dot(terms, t, s) for t in operands]
    if leads[0] == leads[1]:
        both = "both sides" if _leads_to_dot(terms, operands[0]) else "neither side"
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
    if any(f != -math.inf for f in logits.fills) and not is_float(bias.dtype):
        return refuse("the bias has dtype {dtype}", dtype=bias.dtype, depth=5)
    logits.biases.append((terms.peel(bias), sign * logits.scale))
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
        if not mask.is_only_band or t is None or mask.has_empty_rows(t.size, s.size):
            return None
    return mask, fill
