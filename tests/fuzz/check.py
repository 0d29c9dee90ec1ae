"""Fused against unfused, both against float64."""

from __future__ import annotations

import contextlib
import dataclasses
import functools as ft
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as jec
import jax.numpy as jnp
import numpy as np
from fuzz.oracle import evaluate, makes_nan, narrow_products
from fuzz.programs import Program

import zenith_jax as zenith
from zenith_jax.report import collecting

# A fused error is let pass up to RATIO times the unfused one, or up to NOISE times what rounding was seen to do to the
# program, at least: the samples of `oracle.evaluate` take each equation at half an ulp to an ulp, and a kernel has
# more steps than the program where it computes a derivative by another formula. What a wrong formula does is larger by
# orders: 1e-2 of the values, against 1e-6 in float32.
RATIO, NOISE, SAMPLES = 4.0, 32.0, 3
# Tiny programs, most of whose time is compilation: this takes a fifth of it.
COMPILER_OPTIONS = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_parallel_codegen_split_count": 1,
    "xla_cpu_use_fusion_emitters": False,
}


@dataclasses.dataclass
class Tally:
    """What was seen: sites by op, and programs by verdict."""

    fused: Counter[str] = dataclasses.field(default_factory=Counter)
    refused: Counter[str] = dataclasses.field(default_factory=Counter)
    programs: Counter[str] = dataclasses.field(default_factory=Counter)

    def __str__(self) -> str:
        total = self.programs["fused"] + self.programs["untouched"]
        ops = ", ".join(f"{op} {n}" for op, n in self.fused.most_common())
        return (
            f"{total} programs: {self.programs['fused']} fused and compared, {self.programs['untouched']} untouched, "
            f"{self.programs['wrong']} wrong ({self.programs['overflowing']} more overflowed, "
            f"{self.programs['invalid']} were invalid); sites fused: {ops}; sites refused: {sum(self.refused.values())}"
        )

    def __add__(self, other: Tally) -> Tally:
        return Tally(self.fused + other.fused, self.refused + other.refused, self.programs + other.programs)


class Wrong(AssertionError):
    pass


def check(program: Program, tally: Tally) -> None:
    """Raises Wrong where the fused program is another function."""
    try:
        _check(program, tally)
    except (TypeError, NotImplementedError) as error:
        if "forward-mode" not in str(error) and "custom_lin" not in str(error):
            raise
        tally.programs["invalid"] += 1  # forward mode through a user's custom_vjp


def _check(program: Program, tally: Tally) -> None:
    arrays = program.arrays()
    plain = transformed(program, lambda f: f)
    written = jax.make_jaxpr(plain)(*arrays)
    with zenith.configured(use_cost=False), collecting() as sites:
        fused = jax.make_jaxpr(transformed(program, zenith.fuse, inside=program.mode != "grad outside"))(*arrays)
    tally.fused.update(s.op for s in sites if s.fused)
    tally.refused.update(s.op for s in sites if not s.fused)
    if not any(s.fused for s in sites):
        tally.programs["untouched"] += 1
        return
    actual, oracle = _compiled(fused, arrays), evaluate(written, arrays)
    samples = [evaluate(written, arrays, np.random.default_rng(i)) for i in range(SAMPLES)]

    # A gradient through a softmax is a difference of what comes from above; its rounding is that of the operands. Where
    # the difference is zero by a symmetry, the formula as written may round to less by cancelling elsewhere.
    cancels = any(s.op in ("attention", "softmax") and s.fused for s in sites)
    # Keys that a mask forbids are not read where it is structure; in plain JAX 0 times their infinity is NaN.
    skips = program.poison is not None and any("attention" in s.op and s.fused for s in sites)
    # An infinite scale of integer weights is multiplied behind the sum over them: an infinity, where 0 times it is NaN.
    scales = program.poison is not None and any(s.op == "quantized_linear" and s.fused for s in sites)
    # A batch norm is one factor and one sum: an infinite one of its parameters may take the other's infinity away.
    folds = program.poison is not None and any(s.op in ("batch_norm", "conv") and s.fused for s in sites)
    largest = max((np.max(np.abs(o[np.isfinite(o)]), initial=0.0) for o in oracle if o.dtype == np.float64), default=0)

    overflow = any(any(map(_overflows, run, written.out_avals)) for run in (oracle, *samples))
    if overflow and program.poison is None:
        tally.programs["overflowing"] += 1  # float64 goes on where the program's dtype has infinities and NaN
        return
    tally.programs["fused"] += 1
    results = len(jax.eval_shape(program, *arrays))
    if not all(np.isfinite(o).all() for o in oracle[:results]):
        # A NaN among the results, or a row without any key: what derivatives hold then depends on how they are written.
        oracle = oracle[:results]

    def compare(unfused: Sequence[Any], defined: bool = True) -> None:
        for i, (a, u, o) in enumerate(zip(actual, unfused, oracle, strict=False)):
            floor = largest if cancels else 0.0
            if not defined:
                u, o = np.where(np.isnan(a), a, u), np.where(np.isnan(a), a, o)
            _compare(i, a, u, o, [s[i] for s in samples], written.out_avals[i], floor, skips, scales, folds)

    try:
        compare(oracle)
    except AssertionError:
        # The unfused program is compiled, which takes most of the time, only where it could excuse the fused one.
        # A derivative inside of it may be of NaN, in a row without any key, although its own results are numbers:
        # they depend on how it is written, as above.
        unfused = _compiled(written, arrays)
        pairs = zip(unfused, oracle, strict=False)
        overflows = program.poison is None and any(np.any(np.isfinite(o) & ~np.isfinite(u)) for u, o in pairs)
        # Which key a row attends to is decided by rounding, or nearly. The gradient's sum over keys, dout . out, is of
        # the rounded result then, and large where the gradient is small.
        if overflows or (cancels and narrow_products(written, arrays) > 1):
            tally.programs["fused"] -= 1
            tally.programs["overflowing"] += 1  # on the way, though not in float64
            return
        try:
            compare(unfused, not makes_nan(written, arrays))
        except AssertionError as error:
            tally.programs["wrong"] += 1
            raise Wrong(f"{error}\n{program}\n{program!r}") from None


def _compiled(jaxpr: Any, arrays: Sequence[Any]) -> list[np.ndarray]:
    """Results of the jaxpr, compiled by XLA."""
    return list(map(_wide, jax.jit(jec.jaxpr_as_fun(jaxpr), compiler_options=_compiler_options())(*arrays)))


@ft.cache
def _compiler_options() -> dict[str, Any]:
    """Of COMPILER_OPTIONS those that this version of XLA has."""
    known = {}
    for name, value in COMPILER_OPTIONS.items():
        with contextlib.suppress(Exception):
            jax.jit(lambda x: x + 1, compiler_options={name: value})(1.0)
            known[name] = value
    return known


def _overflows(x: np.ndarray, aval: Any) -> bool:
    """Whether a result is so large that what leads to it may be infinite: for float32, 1e29."""
    if not jnp.issubdtype(aval.dtype, jnp.floating):
        return False
    return bool(np.any(np.abs(x[np.isfinite(x)]) > float(jnp.finfo(aval.dtype).max) ** 0.75))


def _wide(x: Any) -> np.ndarray:
    return np.asarray(x).astype(np.float64)


def _compare(
    i: int, actual: Any, unfused: Any, oracle: Any, samples: Sequence[Any], aval: Any, largest: float,
    skips: bool, scales: bool, folds: bool,
) -> None:  # fmt: skip
    what = f"array {i}, {aval.str_short()}"
    assert actual.shape == unfused.shape, f"{what}: shape {actual.shape} for {unfused.shape}"
    if not jnp.issubdtype(aval.dtype, jnp.floating):
        if skips or folds:  # an index of the largest is that of a NaN
            return
        oracle = oracle.astype(np.float64)
        firm = np.all([s == oracle for s in samples], axis=0)  # elsewhere rounding decides
        assert (actual == unfused)[firm].all(), f"{what}: {actual} for {unfused}"
        return
    kinds = [_kind(x) for x in (unfused, oracle, *samples)]
    agreed = np.all([k == kinds[0] for k in kinds], axis=0)
    if folds:
        agreed &= _kind(actual) != 2
    other = agreed & (_kind(actual) != kinds[0])
    if skips:
        other &= ~((_kind(actual) == 0) & (kinds[0] == 2))
    if scales:
        other &= kinds[0] != 2
    assert not other.any(), f"{what}: {actual[other]} for {unfused[other]}, {oracle[other]} in float64"
    finite = agreed & (kinds[0] == 0)
    if not finite.any():
        return
    oracle, actual, unfused = oracle[finite], actual[finite], unfused[finite]
    error, plain = np.max(np.abs(actual - oracle)), np.max(np.abs(unfused - oracle))
    noise = max(np.max(np.abs(s[finite] - oracle)) for s in samples)
    unit = float(jnp.finfo(aval.dtype).eps)
    floor = unit * max(float(np.max(np.abs(oracle))), largest) + float(jnp.finfo(aval.dtype).tiny)
    allowed = max(RATIO * plain, NOISE * noise, 4 * floor)
    assert error <= allowed, (
        f"{what}: error {error:.3g}, unfused {plain:.3g}, rounding {noise:.3g}, allowed {allowed:.3g}"
    )


def _kind(x: np.ndarray) -> np.ndarray:
    """0 for a number, 1 and -1 for infinities, 2 for NaN."""
    return np.where(np.isnan(x), 2.0, np.where(np.isinf(x), np.sign(x), 0.0))


# --- what is compared -------------------------------------------------------------------------------------------------


def transformed(program: Program, fuse: Callable[[Callable], Callable], inside: bool = True) -> Callable:
    """The results of a program, and their derivatives in the way that it names; `fuse` around all of it or, not
    `inside`, around the program that is differentiated."""
    derivative = _with_derivative(program)
    return fuse(derivative(program)) if inside else derivative(fuse(program))


def _with_derivative(program: Program) -> Callable[[Callable], Callable]:
    if program.mode == "value" or program.poison is not None:
        return lambda function: function
    return _with_tangents if program.mode == "jvp" else _with_gradients


def _split(arrays: Sequence[Any]) -> list[int]:
    return [i for i, a in enumerate(arrays) if jnp.issubdtype(a.dtype, jnp.floating)]


def _with_gradients(function: Callable) -> Callable:
    """Results, and gradients of their sum with unequal weights."""

    def both(*arrays: Any) -> list[Any]:
        floats = _split(arrays)

        def loss(*values: Any) -> Any:
            full = list(arrays)
            for i, value in zip(floats, values, strict=True):
                full[i] = value
            results = function(*full)
            return sum(map(_weighted, results)), results

        (_, results), gradients = jax.value_and_grad(loss, tuple(range(len(floats))), has_aux=True)(
            *(arrays[i] for i in floats)
        )
        return [*results, *gradients]

    return both


def _weighted(x: Any) -> Any:
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return 0.0
    x = x.astype(jnp.float32)
    weights = jnp.cos(0.7 * jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape)
    return jnp.sum(jnp.where(jnp.isfinite(x), x, 0) * weights)


def _with_tangents(function: Callable) -> Callable:
    def both(*arrays: Any) -> list[Any]:
        floats = _split(arrays)

        def of_floats(*values: Any) -> Any:
            full = list(arrays)
            for i, value in zip(floats, values, strict=True):
                full[i] = value
            return [r for r in function(*full) if jnp.issubdtype(r.dtype, jnp.floating)]

        values = tuple(arrays[i] for i in floats)
        tangents = tuple(jnp.cos(jnp.arange(v.size)).reshape(v.shape).astype(v.dtype) for v in values)
        results, dots = jax.jvp(of_floats, values, tangents)
        return [*results, *dots]

    return both
