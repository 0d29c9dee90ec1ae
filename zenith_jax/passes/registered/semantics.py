"""Which params of a primitive decide what it computes. A primitive that is missing here is never matched.

`ELEMENTWISE`: operands and results are indexed alike, so that layout does not matter. `POSITIONAL`: dimensions matter,
and are compared one by one. Reductions, contractions and iota have rules of their own in unify.py.
"""

from __future__ import annotations

import os
from typing import Any

import jax
import numpy as np

from zenith_jax.ir import _compat
from zenith_jax.ir._compat import JaxprEqn, Literal

COMMUTATIVE = frozenset("add mul max min and or xor eq ne".split())

# primitive -> params. `accuracy` is a request for precision, None unless the user asked.
ELEMENTWISE: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        "abs add and atan2 ceil clamp conj div eq erf_inv erfc floor ge gt imag is_finite le lt max min mul ne neg "
        "nextafter not or pow real rem select_n sign stop_gradient sub xor".split(),
        (),
    ),
    **dict.fromkeys(
        "acos acosh asin asinh atan atanh cbrt cos cosh erf exp exp2 expm1 log log1p log2 logistic rsqrt sin sinh sqrt "
        "tan tanh".split(),
        ("accuracy",),
    ),
    "convert_element_type": ("new_dtype",),
    "integer_pow": ("y",),
    "round": ("rounding_method",),
    "square": (),
    "shift_left": (),
    "shift_right_arithmetic": (),
    "shift_right_logical": (),
}

# The reduced axes are compared as axes.
REDUCTIONS = frozenset("reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or".split())

POSITIONAL: dict[str, tuple[str, ...]] = {
    "argmax": ("axes", "index_dtype"),
    "argmin": ("axes", "index_dtype"),
    "concatenate": ("dimension",),
    "conv_general_dilated": (
        "window_strides",
        "padding",
        "lhs_dilation",
        "rhs_dilation",
        "dimension_numbers",
        "feature_group_count",
        "batch_group_count",
        "precision",
        "preferred_element_type",
    ),
    "cumlogsumexp": ("axis", "reverse"),
    "cummax": ("axis", "reverse"),
    "cummin": ("axis", "reverse"),
    "cumprod": ("axis", "reverse"),
    "cumsum": ("axis", "reverse"),
    "custom_jvp_call": (),
    "dynamic_slice": ("slice_sizes",),
    "dynamic_update_slice": (),
    "gather": ("dimension_numbers", "slice_sizes", "indices_are_sorted", "unique_indices", "mode", "fill_value"),
    "pad": ("padding_config",),
    "reshape": ("new_sizes", "dimensions"),
    "rev": ("dimensions",),
    "slice": ("start_indices", "limit_indices", "strides"),
    "sort": ("dimension", "is_stable", "num_keys"),
    "split": ("sizes", "axis"),
    "top_k": ("k", "axis"),
}

OWN_RULE = REDUCTIONS | {"dot_general", "iota"}
# Passed through by Terms.peel, which checks their shapes itself; a reshape that merges axes is POSITIONAL.
VIEWS = frozenset("broadcast_in_dim copy copy_p expand_dims pvary reshape squeeze transpose".split())


def unknown_primitive(eqn: JaxprEqn) -> str | None:
    """Why an equation of a reference cannot be part of a pattern, or None."""
    name: Any = eqn.primitive.name
    if name == "custom_jvp_call":
        return None if is_jax_own(eqn) else "has a derivative rule that cannot be compared with another one's"
    if name in ELEMENTWISE or name in POSITIONAL or name in OWN_RULE or name in VIEWS:
        return None
    return "is in no table of what its params mean (passes/registered/semantics.py)"


def is_jax_own(eqn: JaxprEqn) -> bool:
    """Whether a custom_jvp_call is of a function of JAX itself (relu, silu, ...), whose rule closes over nothing.

    Rules are opaque. Two calls from one line of a user's program may still have closed over different values; so a
    user's custom_jvp or custom_vjp function is never part of a pattern.
    """
    source = _compat.function_source(eqn.params["call_jaxpr"])
    return bool(source) and os.path.dirname(jax.__file__) + os.sep in source


def same_params(a: JaxprEqn, b: JaxprEqn, names: tuple[str, ...]) -> bool:
    return all(_same_value(a.params.get(n), b.params.get(n)) for n in names)


def _same_value(a: Any, b: Any) -> bool:
    try:
        return bool(a == b)
    except Exception:  # arrays and objects without a comparison of their own
        return a is b


def same_function(a: Any, b: Any) -> bool:
    """Whether two jaxprs without constants are the same, equation by equation, up to names of variables."""
    if _compat.function_source(a) != _compat.function_source(b):
        return False
    a, b = _compat.opened(a), _compat.opened(b)
    if a.constvars or b.constvars or len(a.eqns) != len(b.eqns) or len(a.invars) != len(b.invars):
        return False
    names: dict[Any, Any] = dict(zip(a.invars, b.invars, strict=True))

    def same_atom(x: Any, y: Any) -> bool:
        if isinstance(x, Literal) or isinstance(y, Literal):
            both = isinstance(x, Literal) and isinstance(y, Literal)
            return both and x.aval == y.aval and np.array_equal(x.val, y.val, equal_nan=True)
        return names.get(x) is y

    for e, f in zip(a.eqns, b.eqns, strict=True):
        if e.primitive is not f.primitive or len(e.outvars) != len(f.outvars):
            return False
        if not all(map(same_atom, e.invars, f.invars)) or e.params.keys() != f.params.keys():
            return False
        for name, value in e.params.items():
            other = f.params[name]
            if _compat.is_jaxpr(value) and _compat.is_jaxpr(other):
                if not same_function(value, other):
                    return False
            elif not _same_value(value, other):
                return False
        if [v.aval for v in e.outvars] != [v.aval for v in f.outvars]:
            return False
        names.update(zip(e.outvars, f.outvars, strict=True))
    return len(a.outvars) == len(b.outvars) and all(map(same_atom, a.outvars, b.outvars))
