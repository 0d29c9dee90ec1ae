"""Every pattern's own jaxpr with one thing changed: a fused mutant must still be the mutant.

All sizes are equal, so that a changed axis is nearly always a valid program. Mutants that are refused are right by
construction; those that still match are evaluated, with their gradients, against the mutant itself in float64, by an
interpreter of jaxprs that shares no code with the rewriter.
"""

from __future__ import annotations

import collections
import random
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mutants import Program, mutants
from mutated_patterns import PATTERNS, ROUNDED_OTHERWISE, SEED, inputs

import zenith_jax as zenith
from zenith_jax.ir.graph import Graph
from zenith_jax.passes.match import MATCHERS, Match, gated_linear

# Mutants of the large jaxprs are sampled, with a fixed seed, to keep the suite fast; with --share N, one in N of these,
# and gradients, whose primitives are two thirds of what is compiled, of those only that change nothing else.
MOST_MUTANTS = 100


def _is_fused(program: Program, args: Sequence[Any]) -> bool:
    return bool(zenith.explain(program)(*args).fused)


def _float_inputs(args: Sequence[np.ndarray]) -> tuple[int, ...]:
    return tuple(i for i, a in enumerate(args) if np.issubdtype(a.dtype, np.floating))


def _value_and_gradients(function: Callable, args: Sequence[Any], *, gradients: bool) -> list[Any]:
    """Results, and gradients of a sum of them with unequal weights."""
    if not gradients:
        return list(function(*args))
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
    (_, results), found = jax.value_and_grad(loss, tuple(range(len(floats))), has_aux=True)(*(args[i] for i in floats))
    return [*results, *found]


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
        graph = Graph.of(jax.make_jaxpr(pattern)(*inputs(kinds)))
        matches = ((m, m(graph, e)) for m in MATCHERS for e in graph.eqns)
        found |= {matcher for matcher, match in matches if isinstance(match, Match)}
    # A gated linear layer is one for GPUs, and test_gated_linear.py mutates it.
    assert found == set(MATCHERS) - {gated_linear.match}


@pytest.mark.every_case
@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda p: p.__name__)
def test_no_mutant_changes_value_by_fusion(pattern, pytestconfig):
    args = inputs(PATTERNS[pattern])
    program = Program.trace(pattern, args)
    all_mutants = [m for m in mutants(program) if not (pattern in ROUNDED_OTHERWISE and "truncated" in m[0])]
    counts: collections.Counter[str] = collections.Counter()
    # XLA's compiler (jaxlib 0.10.2) aborts the process at gradients of some convolutions; what takes the place of one
    # is plain JAX code, and has no derivative of its own.
    # Each of their mutants is compiled anew, and takes as long as three others.
    has_conv = any(e.primitive.name == "conv_general_dilated" for e in program.eqns)
    share = pytestconfig.getoption("share")
    most = max(1, MOST_MUTANTS // share // (3 if has_conv else 1))
    chosen = random.Random(SEED).sample(all_mutants, min(most, len(all_mutants)))
    wrong = []
    with zenith.configured(use_cost=False), np.errstate(all="ignore"):
        assert _is_fused(program, args), "the pattern itself must match"
        for what, mutant in chosen:
            try:
                jax.eval_shape(mutant, *args)
            except Exception:  # no valid program: JAX's own shape rules refuse it
                counts["invalid"] += 1
                continue
            if not _is_fused(mutant, args):
                counts["refused"] += 1
                continue
            counts["still matched"] += 1
            differentiated = not has_conv and (share == 1 or what.endswith("stopped"))
            fused = _value_and_gradients(zenith.fuse(mutant), args, gradients=differentiated)
            plain = _value_and_gradients(mutant, args, gradients=differentiated)
            with jax.enable_x64(True):
                wide = [a.astype(np.float64) if a.dtype == np.float32 else a for a in args]
                oracle = _value_and_gradients(mutant, wide, gradients=differentiated)
            try:
                _assert_same(fused, plain, oracle, len(program.outputs), what)
            except AssertionError as error:
                wrong.append(str(error).splitlines()[0])
    print(f"\n{pattern.__name__}: {len(all_mutants)} mutants, {len(chosen)} tried: {dict(counts)}")
    assert not wrong, "\n".join(wrong)
