"""Every pattern's own jaxpr with one thing changed: a fused mutant must still be the mutant.

A mutant has one literal, one axis or dimension-number param, one primitive, one operand or one operand order changed.
All sizes are equal, so that a changed axis is nearly always a valid program. Mutants that are refused are right by
construction; those that still match are evaluated, with their gradients, against the mutant itself in float64, by an
interpreter of jaxprs that shares no code with the rewriter.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.extend.core as jec
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import zenith_jax as zenith
from zenith_jax.ir.graph import Graph
from zenith_jax.passes.match import MATCHERS, Match

N = 4  # every size: batch, heads, lengths, features
SEED = 20260102


# --- the patterns -----------------------------------------------------------------------------------------------------


def attention_einsum(q, k, v, mask, bias):
    logits = jnp.einsum("bthd,bshd->bhts", q, k) / np.sqrt(N) + bias
    logits = jnp.where(jnp.tril(jnp.ones((N, N), bool)) & mask, logits, -jnp.inf)
    return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(logits, axis=-1), v)


def attention_matmul(q, k, v, mask, bias):
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q * 0.37, k, v))
    logits = jnp.where(mask, q @ k.swapaxes(-1, -2) - bias, -1e9)
    e = jnp.exp(logits - logits.max(-1, keepdims=True))
    return ((e / e.sum(-1, keepdims=True)) @ v).transpose(0, 2, 1, 3)


def attention_additive_mask(q, k, v, mask, bias):
    del mask, bias
    logits = jnp.einsum("bthd,bshd->bhts", q, k) * 0.5 + jnp.triu(jnp.full((N, N), -jnp.inf), 1)
    return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(logits, axis=-1), v)


def attention_jax_nn(q, k, v, mask, bias):
    return jax.nn.dot_product_attention(q, k, v, bias=bias, mask=mask, is_causal=True)


def attention_window(q, k, v, mask, bias):
    del mask, bias
    return jax.nn.dot_product_attention(q, k[:, :, :2], v[:, :, :2], local_window_size=(2, 1))


def attention_repeated(q, k, v, mask, bias):
    k, v = (jnp.repeat(x[:, :, :2], 2, axis=2) for x in (k, v))
    logits = jnp.einsum("bthd,bshd->bhts", q, k) * 0.5 + bias + mask.astype(jnp.float32)
    t, s = jnp.arange(N)[:, None], jnp.arange(N)
    logits = jnp.where(jnp.abs(t - s) <= 2, logits, -1e30)
    return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(logits, axis=-1), v)


def attention_split_heads(q, k, v, mask, bias):
    del bias
    q, k, v = q.reshape(N, N, 2, 2, N), k[:, :, :2], v[:, :, :2]
    logits = jnp.einsum("btkgd,bskd->btkgs", q, k).reshape(N, N, N, N)
    p = jax.nn.softmax(jnp.where(mask, logits, -1e30), axis=-1).reshape(N, N, 2, 2, N)
    return jnp.einsum("btkgs,bskd->btkgd", p, v).reshape(N, N, N, N)


def attention_capped_prefix(q, k, v, mask, bias):
    del mask, bias
    t, s = jnp.arange(N)[:, None], jnp.arange(N)
    logits = 1.5 * jnp.tanh(jnp.einsum("bthd,bshd->bhts", q, k) * 0.4 / 1.5)
    logits = jnp.where(((s <= t) | (s < 2)) & (s < 3), logits, -1e30)
    return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(logits, axis=-1), v)


def attention_sink_column(q, k, v, mask, bias):
    """And the guard against rows of NaN."""
    logits = jnp.where(mask, jnp.einsum("bthd,bshd->bhts", q, k) * 0.5, -jnp.inf)
    p = jax.nn.softmax(jnp.concatenate([logits, bias[:, :, :, :1]], axis=-1), axis=-1)[..., :-1]
    return jnp.einsum("bhts,bshd->bthd", jnp.where(jnp.isnan(p), 0.0, p), v)


def attention_sink_addend(q, k, v, mask, bias):
    del mask
    logits, sink = jnp.einsum("bthd,bshd->bhts", q, k) * 0.5, bias[0, 0, 0][:, None, None]
    top = jnp.maximum(logits.max(-1, keepdims=True), sink)
    e = jnp.exp(logits - top)
    return jnp.einsum("bhts,bshd->bthd", e / (e.sum(-1, keepdims=True) + jnp.exp(sink - top)), v)


def attention_segments(q, k, v, labels):
    logits = jnp.einsum("bthd,bshd->bhts", q, k) * 0.5
    allowed = (labels[:, None, :, None] == labels[:, None, None]) & (jnp.arange(N) <= jnp.arange(N)[:, None] + 1)
    return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(jnp.where(allowed, logits, -1e30), axis=-1), v)


def layer_norm_two_pass(x, scale, bias):
    mean = x.mean(-1, keepdims=True)
    return (x - mean) / jnp.sqrt(x.var(-1, keepdims=True) + 0.03) * scale + bias


def layer_norm_fast(x, scale, bias):
    mean, square = x.mean(-1, keepdims=True), jnp.square(x).mean(-1, keepdims=True)
    variance = jnp.maximum(0.0, square - mean * mean)
    return (x - mean) * (jax.lax.rsqrt(variance + 0.03) * scale) + bias


def add_layer_norm(x, y, scale):
    total = x + y
    centred = total - total.mean(-1, keepdims=True)
    return total, centred * jax.lax.rsqrt((centred**2).mean(-1, keepdims=True) + 0.03) * scale


def rms_norm(x, scale):
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 0.03) * scale


def rms_norm_cast(x, scale):
    wide = x.astype(jnp.float32)
    return scale * (wide / jnp.sqrt(jnp.square(wide).mean(-1, keepdims=True) + 0.03)).astype(x.dtype)


def gelu_erf(x):
    return jax.nn.gelu(x, approximate=False)


def gelu_tanh(x):
    return 0.5 * x * (1 + jnp.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def gelu_cdf(x):
    return x * jax.scipy.stats.norm.cdf(x)


def silu(x):
    return x / (1 + jnp.exp(-x))


def cross_entropy_integer(x, labels):
    return optax.softmax_cross_entropy_with_integer_labels(x, labels)


def cross_entropy_smoothed(x, labels):
    hot = jax.nn.one_hot(labels, N) * 0.9 + 0.1 / N
    return -jnp.sum(hot * jax.nn.log_softmax(x), axis=-1)


def cross_entropy_smoothed_by_the_mean(x, labels):
    p = jax.nn.log_softmax(x)
    return -0.9 * jnp.take_along_axis(p, labels[..., None], axis=-1)[..., 0] - 0.1 * p.mean(-1)


def cross_entropy_z_loss(x, labels):
    top = x.max(-1, keepdims=True)
    lse = jnp.log(jnp.exp(x - top).sum(-1)) + top[..., 0]
    return lse - jnp.sum(jnp.where(labels[..., None] == jnp.arange(N), x, 0.0), axis=-1) + 0.01 * lse**2


def softmax_middle(x):
    return jax.nn.softmax(x, axis=1)


def softmax_by_hand(x):
    e = jnp.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def _inputs(kinds: str) -> list[np.ndarray]:
    """x: (N, N, N, N) floats; p: (N,) floats; r: (N, N, N) floats; m: a mask with one row that allows nothing;
    n: a mask without such a row; l: (N, N) labels below N."""
    rng = np.random.default_rng(SEED)
    arrays = []
    for kind in kinds:
        if kind in "mn":
            mask = rng.random((N, N, N, N)) < 0.7
            mask[0, 1, 2] = False
            mask[..., 0] |= kind == "n"
            arrays.append(mask)
        elif kind == "l":
            arrays.append(rng.integers(N, size=(N, N)).astype(np.int32))
        else:
            shape = {"x": (N,) * 4, "p": (N,), "r": (N,) * 3}[kind]
            arrays.append(rng.normal(size=shape).astype(np.float32) + (kind == "p"))
    return arrays


PATTERNS: dict[Callable[..., Any], str] = {
    attention_einsum: "xxxnx",
    attention_matmul: "xxxmx",
    attention_additive_mask: "xxxmx",
    attention_jax_nn: "xxxmx",
    attention_window: "xxxmx",
    attention_repeated: "xxxmx",
    attention_split_heads: "xxxmx",
    attention_capped_prefix: "xxxmx",
    attention_sink_column: "xxxmx",
    attention_sink_addend: "xxxmx",
    attention_segments: "xxxl",
    layer_norm_two_pass: "rpp",
    layer_norm_fast: "rpp",
    add_layer_norm: "rrp",
    rms_norm: "rp",
    rms_norm_cast: "rp",
    gelu_erf: "r",
    gelu_tanh: "r",
    gelu_cdf: "r",
    silu: "r",
    cross_entropy_integer: "rl",
    cross_entropy_smoothed: "rl",
    cross_entropy_smoothed_by_the_mean: "rl",
    cross_entropy_z_loss: "rl",
    softmax_middle: "r",
    softmax_by_hand: "r",
}


# --- jaxprs as lists of equations that one can change -----------------------------------------------------------------


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


# --- the test ---------------------------------------------------------------------------------------------------------

# Mutants of the large jaxprs are sampled, with a fixed seed, to keep the suite fast.
MOST_MUTANTS = 100


def _is_fused(jaxpr: Any) -> bool:
    return any(e.primitive.name == "zenith_call" for e in getattr(jaxpr, "jaxpr", jaxpr).eqns)


def _float_inputs(args: Sequence[np.ndarray]) -> tuple[int, ...]:
    return tuple(i for i, a in enumerate(args) if np.issubdtype(a.dtype, np.floating))


def _value_and_gradients(function: Callable, args: Sequence[Any]) -> list[Any]:
    """Results, and gradients of a sum of them with unequal weights."""
    floats = _float_inputs(args)

    def loss(*values: Any) -> tuple[Any, Any]:
        full = list(args)
        for i, value in zip(floats, values, strict=True):
            full[i] = value
        results = [r for r in function(*full) if jnp.issubdtype(r.dtype, jnp.floating)]
        total = sum(
            jnp.sum(jnp.where(jnp.isfinite(r), r, 0) * jnp.cos(jnp.arange(r.size, dtype=r.dtype)).reshape(r.shape))
            for r in results
        )
        return total, results

    if not jax.eval_shape(loss, *(args[i] for i in floats))[1]:
        return list(function(*args))
    # Not jitted: all mutants share the compiled primitives, which is ten times as fast as compiling each.
    (_, results), gradients = jax.value_and_grad(loss, tuple(range(len(floats))), has_aux=True)(
        *(args[i] for i in floats)
    )
    return [*results, *gradients]


def _assert_same(fused: Sequence[Any], plain: Sequence[Any], oracle: Sequence[Any], results: int, what: str) -> None:
    """`results`: how many of the arrays are results; the rest are gradients."""
    fused, plain, oracle = ([np.asarray(x).astype(np.float64) for x in side] for side in (fused, plain, oracle))
    largest = max(np.max(np.abs(o[np.isfinite(o)]), initial=1e-3) for o in oracle)
    for i, (a, p, o) in enumerate(zip(fused, plain, oracle, strict=True)):
        if i == results and not all(np.isfinite(x).all() for x in plain[:results]):
            return  # a NaN among the results: XLA's own gradients are NaN in part
        finite = np.isfinite(p) & np.isfinite(o)
        assert np.isfinite(a)[finite].all(), f"{what}: array {i} is not finite where it must be"
        error, plain_error = (np.max(np.abs(x[finite] - o[finite]), initial=0.0) for x in (a, p))
        # 200 float32 ulps of the largest value: gradients of 256 logits, reordered sums, exponentials to e^5. Gradients
        # that are 0 in theory are differences of others, of which the largest stands for all.
        magnitude = max(np.max(np.abs(o[finite]), initial=0.0), 0.1 * largest)
        allowed = max(8 * plain_error, 200 * np.finfo(np.float32).eps * magnitude)
        assert error <= allowed, (
            f"{what}: array {i}: error {error:.3g}, unfused {plain_error:.3g}, allowed {allowed:.3g}"
        )


def test_every_matcher_has_a_pattern_here():
    found = set()
    for pattern, kinds in PATTERNS.items():
        graph = Graph.of(jax.make_jaxpr(pattern)(*_inputs(kinds)))
        matches = ((m, m(graph, e)) for m in MATCHERS for e in graph.eqns)
        found |= {matcher for matcher, match in matches if isinstance(match, Match)}
    assert found == set(MATCHERS)


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda p: p.__name__)
def test_no_mutant_changes_value_by_fusion(pattern):
    args = _inputs(PATTERNS[pattern])
    program = Program.trace(pattern, args)
    all_mutants = list(mutants(program))
    chosen = random.Random(SEED).sample(all_mutants, min(MOST_MUTANTS, len(all_mutants)))
    counts: collections.Counter[str] = collections.Counter()
    wrong = []
    with zenith.configured(use_cost=False), np.errstate(all="ignore"):
        assert _is_fused(jax.make_jaxpr(zenith.fuse(program))(*args)), "the pattern itself must match"
        for what, mutant in chosen:
            try:
                jax.eval_shape(mutant, *args)
            except Exception:  # no valid program: JAX's own shape rules refuse it
                counts["invalid"] += 1
                continue
            if not _is_fused(jax.make_jaxpr(zenith.fuse(mutant))(*args)):
                counts["refused"] += 1
                continue
            counts["still matched"] += 1
            fused = _value_and_gradients(zenith.fuse(mutant), args)
            plain = _value_and_gradients(mutant, args)
            with jax.enable_x64(True):
                wide = [a.astype(np.float64) if a.dtype == np.float32 else a for a in args]
                oracle = _value_and_gradients(mutant, wide)
            try:
                _assert_same(fused, plain, oracle, len(program.outputs), what)
            except AssertionError as error:
                wrong.append(str(error).splitlines()[0])
    print(f"\n{pattern.__name__}: {len(all_mutants)} mutants, {len(chosen)} tried: {dict(counts)}")
    assert not wrong, "\n".join(wrong)
