"""A jaxpr in float64 by NumPy: the fuzzer's oracle, without a compiler; and how far rounding can take its results.

`evaluate(jaxpr, args)` runs every floating-point equation in float64, whatever dtype the program has there. With
`noise`, a generator, each result that its equation rounds is moved by up to one unit in the last place of the dtype
that the program has it in, sums by that of the sum of their absolute terms: one sample of what rounding may do to the
program (Monte Carlo arithmetic, Parker 1997). Nothing here is shared with the rewriter.
"""

from __future__ import annotations

import contextvars
import string
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as jec
import jax.numpy as jnp
import numpy as np
import scipy.special
from fuzz.convolution import convolved
from fuzz.images import gathered_at_most, scattered_to_most, windows
from jax import lax

WIDE = np.dtype(np.float64)

ELEMENTWISE: dict[str, Callable[..., Any]] = {
    "abs": lambda p, x: np.abs(x),
    "add": lambda p, x, y: x + y,
    "add_any": lambda p, x, y: x + y,
    "and": lambda p, x, y: x & y,
    "clamp": lambda p, low, x, high: np.minimum(np.maximum(x, low), high),
    "copy": lambda p, x: x,
    "copy_p": lambda p, x: x,
    "cos": lambda p, x: np.cos(x),
    "div": lambda p, x, y: x / y if x.dtype.kind == "f" else np.trunc(x / y).astype(x.dtype),
    "eq": lambda p, x, y: x == y,
    "erf": lambda p, x: scipy.special.erf(x),
    "erfc": lambda p, x: scipy.special.erfc(x),
    "exp": lambda p, x: np.exp(x),
    "exp2": lambda p, x: np.exp2(x),
    "expm1": lambda p, x: np.expm1(x),
    "ge": lambda p, x, y: x >= y,
    "gt": lambda p, x, y: x > y,
    "integer_pow": lambda p, x: x ** p["y"] if p["y"] >= 0 else 1 / x ** -p["y"],
    "is_finite": lambda p, x: np.isfinite(x),
    "le": lambda p, x, y: x <= y,
    "log": lambda p, x: np.log(x),
    "log1p": lambda p, x: np.log1p(x),
    "logistic": lambda p, x: scipy.special.expit(x),
    "lt": lambda p, x, y: x < y,
    "max": lambda p, x, y: np.maximum(x, y),
    "min": lambda p, x, y: np.minimum(x, y),
    "mul": lambda p, x, y: x * y,
    "name": lambda p, x: x,
    "ne": lambda p, x, y: x != y,
    "neg": lambda p, x: -x,
    "not": lambda p, x: ~x,
    "one_minus_square": lambda p, x: (1 - x) * (1 + x),
    "optimization_barrier": lambda p, x: x,
    "or": lambda p, x, y: x | y,
    # From jax 0.12 on, in the derivative of erf: lowest coefficient first.
    "polynomial": lambda p, x, *coefficients: np.polynomial.polynomial.polyval(x, np.stack(coefficients)),
    "pow": lambda p, x, y: np.power(x, y),
    "pvary": lambda p, x: x,
    "reduce_precision": lambda p, x: x,
    "rem": lambda p, x, y: np.fmod(x, y),
    "round": lambda p, x: np.round(x),
    "rsqrt": lambda p, x: 1 / np.sqrt(x),
    "select_n": lambda p, which, *cases: np.choose(which.astype(np.intp), cases) if which.shape else cases[int(which)],
    "sign": lambda p, x: np.sign(x),
    "sin": lambda p, x: np.sin(x),
    "sqrt": lambda p, x: np.sqrt(x),
    "square": lambda p, x: x * x,
    "stop_gradient": lambda p, x: x,
    "sub": lambda p, x, y: x - y,
    "tanh": lambda p, x: np.tanh(x),
    "xor": lambda p, x, y: x ^ y,
}

MOVED: dict[str, Callable[..., Any]] = {
    "broadcast_in_dim": lambda p, x: _broadcast(x, p["shape"], p["broadcast_dimensions"]),
    "concatenate": lambda p, *xs: np.concatenate(xs, p["dimension"]),
    "stack": lambda p, *xs: np.stack(xs, p["axis"]),
    "expand_dims": lambda p, x: np.expand_dims(x, p["dimensions"]),
    "reshape": lambda p, x: x.reshape(p["new_sizes"]),
    "rev": lambda p, x: np.flip(x, p["dimensions"]),
    "slice": lambda p, x: x[
        tuple(map(slice, p["start_indices"], p["limit_indices"], p["strides"] or (None,) * x.ndim))
    ],
    "squeeze": lambda p, x: np.squeeze(x, tuple(p["dimensions"])),
    "tile": lambda p, x: np.tile(x, p["reps"]),
    "transpose": lambda p, x: np.transpose(x, p["permutation"]),
}

REDUCED: dict[str, Callable[..., Any]] = {
    "argmax": lambda p, x: np.argmax(x, p["axes"][0]).astype(p["index_dtype"]),
    "argmin": lambda p, x: np.argmin(x, p["axes"][0]).astype(p["index_dtype"]),
    "reduce_and": lambda p, x: np.all(x, tuple(p["axes"])),
    "reduce_max": lambda p, x: np.max(x, tuple(p["axes"])),
    "reduce_min": lambda p, x: np.min(x, tuple(p["axes"])),
    "reduce_or": lambda p, x: np.any(x, tuple(p["axes"])),
    "reduce_prod": lambda p, x: np.prod(x, tuple(p["axes"])),
    "reduce_window_max": lambda p, x: windows(p, x, -np.inf).max(-1),
    "reduce_window_min": lambda p, x: windows(p, x, np.inf).min(-1),
    "select_and_gather_add": gathered_at_most,
}

# Sums: their rounding is that of the absolute terms.
SUMMED: dict[str, Callable[..., Any]] = {
    "cumsum": lambda p, x: (
        np.flip(np.cumsum(np.flip(x, p["axis"]), p["axis"]), p["axis"]) if p["reverse"] else np.cumsum(x, p["axis"])
    ),
    "conv_general_dilated": convolved,
    "dot_general": lambda p, x, y: _product(x, y, p["dimension_numbers"]),
    "reduce_sum": lambda p, x: np.sum(x, tuple(p["axes"])),
    "reduce_window_sum": lambda p, x: windows(p, x, 0.0).sum(-1),
}

# Results that are some operand's elements, or not rounded.
EXACT = {
    *MOVED,
    "bitcast_convert_type",
    "gather",
    "pad",
    "iota",
    "empty",
    "empty2",
    "dynamic_slice",
    "dynamic_update_slice",
    "split",
    "unstack",
} | set(
    "abs argmax argmin clamp copy copy_p max min name neg optimization_barrier pvary reduce_max reduce_min "
    "reduce_window_max reduce_window_min round select_and_gather_add select_n sign stop_gradient".split()
)

CALLED = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "remat": "jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vjp_call_jaxpr": "fun_jaxpr",
}


# Functions that JAX computes from the bits of the narrow type: of erf's derivative, from 0.12 on.
NAMED: dict[str, Callable[..., Any]] = {"exp_neg_sq": lambda p, x: np.exp(-x * x)}


def evaluate(closed: Any, args: Sequence[Any], noise: np.random.Generator | None = None) -> list[np.ndarray]:
    """Results of a closed jaxpr on arrays."""
    with np.errstate(all="ignore"):
        return _run(_opened(closed), [_widened(c) for c in _constants(closed)], [_widened(a) for a in args], noise)


def makes_nan(closed: Any, args: Sequence[Any]) -> bool:
    """Whether some step makes NaN of numbers and infinities, be it of a result that nothing uses."""
    found: list[str] = []
    with np.errstate(all="ignore", invalid="call", call=lambda error, flag: found.append(error)):
        _run(_opened(closed), [_widened(c) for c in _constants(closed)], [_widened(a) for a in args], None)
    return bool(found)


def narrow_products(closed: Any, args: Sequence[Any]) -> float:
    """The largest rounding, in absolute terms, of a product of arrays of a narrow dtype: of an attention's logits it
    has to stay below 1, or rounding decides what a row attends to."""
    found = [0.0]
    token = _WATCH.set(lambda eqn, x: found.append(_rounding(eqn, x)))
    try:
        evaluate(closed, args)
    finally:
        _WATCH.reset(token)
    return max(found)


_WATCH: contextvars.ContextVar[Callable[[Any, np.ndarray], None] | None] = contextvars.ContextVar("watch", default=None)


def _rounding(eqn: Any, x: np.ndarray) -> float:
    if eqn.primitive.name != "dot_general":
        return 0.0
    dtype = eqn.invars[0].aval.dtype
    if not jnp.issubdtype(dtype, jnp.floating) or jnp.finfo(dtype).bits > 16:
        return 0.0
    return float(jnp.finfo(dtype).eps) * float(np.max(np.abs(x[np.isfinite(x)]), initial=0.0))


def _opened(jaxpr: Any) -> Any:
    return getattr(jaxpr, "jaxpr", jaxpr)


def _constants(jaxpr: Any) -> Sequence[Any]:
    return getattr(jaxpr, "consts", ())


def _widened(x: Any) -> np.ndarray:
    if jnp.issubdtype(getattr(x, "dtype", np.asarray(x).dtype), jnp.floating):
        return np.asarray(x).astype(WIDE)
    return np.asarray(x)


def _run(jaxpr: Any, consts: Sequence[Any], args: Sequence[Any], noise: Any) -> list[np.ndarray]:
    env: dict[Any, np.ndarray] = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))

    def read(atom: Any) -> np.ndarray:
        return _widened(np.asarray(atom.val, atom.aval.dtype)) if isinstance(atom, jec.Literal) else env[atom]

    for eqn in jaxpr.eqns:
        results = _equation(eqn, [read(a) for a in eqn.invars], noise)
        for var, value in zip(eqn.outvars, results, strict=True):
            assert value.shape == var.aval.shape, f"the oracle's {eqn.primitive} has shape {value.shape}: {eqn}"
            if (watch := _WATCH.get()) is not None:
                watch(eqn, value)
            env[var] = value
    return [read(a) for a in jaxpr.outvars]


def _equation(eqn: Any, operands: list[np.ndarray], noise: Any) -> list[np.ndarray]:
    name, params = eqn.primitive.name, eqn.params
    is_named = name == "custom_jvp_call" and params.get("name") in NAMED
    if name in CALLED and not is_named:
        body = params[CALLED[name] if CALLED[name] in params else "jaxpr"]
        return _run(_opened(body), list(map(_widened, _constants(body))), operands, noise)
    if name == "scan":
        return _scan(params, operands, noise)
    if name == "cond":
        index, *rest = operands
        body = params["branches"][int(np.clip(int(index), 0, len(params["branches"]) - 1))]
        return _run(_opened(body), list(map(_widened, _constants(body))), rest, noise)
    if name == "while":
        return _while(params, operands, noise)
    if name == "unstack":
        return [np.squeeze(x, params["axis"]) for x in np.split(operands[0], len(eqn.outvars), params["axis"])]
    if name == "split":
        ends = np.cumsum(params["sizes"])[:-1]
        return list(np.split(operands[0], ends, params["axis"]))
    aval = eqn.outvars[0].aval
    magnitude = None
    if name in SUMMED:
        result = np.asarray(SUMMED[name](params, *operands))
        magnitude = SUMMED[name](params, *map(np.abs, operands)) if noise is not None else None
    elif name == "select_and_scatter_add":
        result = scattered_to_most(params, *operands)
        magnitude = scattered_to_most(params, np.abs(operands[0]), operands[1])
    elif is_named:
        result = NAMED[params["name"]](params, *operands)
    elif name == "bitcast_convert_type":
        # Bits are those of the program's dtype: erf's derivative, from jax 0.12 on, takes the upper ones of x by them.
        narrow = operands[0].astype(eqn.invars[0].aval.dtype)
        result = _widened(np.ascontiguousarray(narrow).view(aval.dtype).reshape(narrow.shape))
    elif name == "convert_element_type":
        result = _converted(operands[0], aval.dtype)
    elif name in ELEMENTWISE:
        result = np.asarray(ELEMENTWISE[name](params, *operands))
    elif name in MOVED:
        result = MOVED[name](params, *operands)
    elif name in REDUCED:
        result = np.asarray(REDUCED[name](params, *operands))
    elif name in ("empty", "empty2"):
        result = _widened(np.zeros(aval.shape, aval.dtype))
    elif name == "iota":
        shape, dimension = aval.shape, params["dimension"]
        result = _widened(
            np.broadcast_to(
                np.arange(shape[dimension]).reshape([-1 if d == dimension else 1 for d in range(len(shape))]), shape
            ).astype(aval.dtype)
        )
    else:
        result = _by_jax(eqn, operands)
    if noise is None or name in EXACT or result.dtype != WIDE:
        return [result]
    unit = float(jnp.finfo(aval.dtype).eps)
    magnitude = np.abs(result) if magnitude is None else magnitude
    moved = result + unit * np.where(np.isfinite(magnitude), magnitude, 0) * noise.uniform(-1, 1, result.shape)
    return [moved]


def _converted(x: np.ndarray, dtype: Any) -> np.ndarray:
    if not jnp.issubdtype(dtype, jnp.floating):
        return x.astype(dtype)
    if jnp.finfo(dtype).bits < 16:
        raise NotImplementedError("the oracle does not quantise")
    wide = x.astype(WIDE)
    # Where a narrower dtype has no such number, its infinity is what the program means: a mask's fill.
    return np.where(np.isfinite(wide) & (np.abs(wide) > float(jnp.finfo(dtype).max)), np.copysign(np.inf, wide), wide)


def _broadcast(x: np.ndarray, shape: Sequence[int], dimensions: Sequence[int]) -> np.ndarray:
    expanded = [1] * len(shape)
    for d, n in zip(dimensions, x.shape, strict=True):
        expanded[d] = n
    return np.broadcast_to(x.reshape(expanded), shape)


def _product(x: np.ndarray, y: np.ndarray, numbers: Any) -> np.ndarray:
    (x_contract, y_contract), (x_batch, y_batch) = numbers
    letters = iter(string.ascii_letters)
    x_letters = [next(letters) for _ in range(x.ndim)]
    y_letters = [next(letters) for _ in range(y.ndim)]
    for i, j in zip((*x_contract, *x_batch), (*y_contract, *y_batch), strict=True):
        y_letters[j] = x_letters[i]
    out = [x_letters[i] for i in x_batch]
    out += [c for i, c in enumerate(x_letters) if i not in (*x_contract, *x_batch)]
    out += [c for j, c in enumerate(y_letters) if j not in (*y_contract, *y_batch)]
    return np.einsum(f"{''.join(x_letters)},{''.join(y_letters)}->{''.join(out)}", x, y)


def _scan(params: dict[str, Any], operands: list[np.ndarray], noise: Any) -> list[np.ndarray]:
    body = params["jaxpr"]
    if "num_consts" in params:
        consts_count, carry_count = params["num_consts"], params["num_carry"]
    else:  # jax 0.11 and later
        consts_count, carry_count = map(len, params["ft_in"].unpack()[:2])
    consts, carry = operands[:consts_count], operands[consts_count : consts_count + carry_count]
    xs = operands[consts_count + carry_count :]
    length = params["length"]
    ys: list[list[np.ndarray] | None] = [None] * length
    for i in range(length - 1, -1, -1) if params["reverse"] else range(length):
        inner = [*consts, *carry, *(x[i] for x in xs)]
        results = _run(_opened(body), list(map(_widened, _constants(body))), inner, noise)
        carry, ys[i] = results[:carry_count], results[carry_count:]
    stacked = [np.stack(column) for column in zip(*ys, strict=True)] if length else []  # pyright: ignore
    return [*carry, *stacked]


def _while(params: dict[str, Any], operands: list[np.ndarray], noise: Any) -> list[np.ndarray]:
    cond_count, body_count = params["cond_nconsts"], params["body_nconsts"]
    cond_consts, body_consts = operands[:cond_count], operands[cond_count : cond_count + body_count]
    carry = operands[cond_count + body_count :]

    def call(jaxpr: Any, consts: list[np.ndarray]) -> list[np.ndarray]:
        return _run(_opened(jaxpr), list(map(_widened, _constants(jaxpr))), [*consts, *carry], noise)

    while bool(call(params["cond_jaxpr"], cond_consts)[0]):
        carry = call(params["body_jaxpr"], body_consts)
    return carry


def _by_jax(eqn: Any, operands: list[np.ndarray]) -> np.ndarray:
    """Indexing and padding, by JAX itself in float64: nothing of them is rounded, or scatter's sums a little."""
    allowed = "gather scatter scatter-add scatter_add pad dynamic_slice dynamic_update_slice sort nextafter"
    if eqn.primitive.name not in allowed.split():
        raise NotImplementedError(f"the oracle has no rule for `{eqn.primitive.name}`")
    with jax.enable_x64(True):
        if eqn.primitive.name in ("scatter-add", "scatter_add"):  # whose params hold the addition in the narrow dtype
            names = ("dimension_numbers", "indices_are_sorted", "unique_indices", "mode")
            return np.asarray(lax.scatter_add(*map(jnp.asarray, operands), **{n: eqn.params[n] for n in names}))
        result = eqn.primitive.bind(*map(jnp.asarray, operands), **eqn.params)
        return np.asarray(result)
