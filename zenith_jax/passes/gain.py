"""What a site is worth: flops and bytes counted off the equations that an op replaces, and both versions timed."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zenith_jax.ir import _compat
from zenith_jax.ir._compat import JaxprEqn, Literal, Var
from zenith_jax.ir.graph import VIEWS, Graph
from zenith_jax.passes.match import Match

BATCHES, BATCH_SECONDS = 5, 0.02
# Bytes a second that a copy reads and writes, measured on the machines of docs/performance.md: 8 MiB by two cores of an
# EPYC in 368 us, 128 MiB by an H100 in 96.
COPY_RATE = {"cpu": 45e9, "cuda": 2.8e12}


def flops(match: Match) -> int:
    """Of the equations as they are written: 2 for each multiply-add of a product, 1 for each element of all else."""
    return sum(_flops(eqn) for eqn in match.inner)


def _flops(eqn: JaxprEqn) -> int:
    if eqn.primitive.name in VIEWS:
        return 0
    if eqn.primitive.name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        return 2 * eqn.outvars[0].aval.size * math.prod(eqn.invars[0].aval.shape[d] for d in contracted)
    if eqn.primitive.name == "conv_general_dilated":
        w, (_, (features, *_), _) = eqn.invars[1].aval, eqn.params["dimension_numbers"]
        return 2 * eqn.outvars[0].aval.size * (w.size // max(w.shape[features], 1))
    sizes = [getattr(v.aval, "size", 0) for v in (*eqn.outvars, *eqn.invars)]
    return max(sizes, default=0)


def bytes_saved(match: Match) -> int:
    """Of inner values that are written and read once each where nothing is fused: at most this is saved, since XLA
    fuses some of them by itself. Views and results do not count."""
    results = set(match.results)
    inner = [v for e in match.inner if e.primitive.name not in VIEWS for v in e.outvars if v not in results]
    return sum(2 * v.aval.size * v.aval.dtype.itemsize for v in inner if hasattr(v.aval, "dtype"))


def expected_us(saved: int, platform: str) -> float:
    """Microseconds less, at most: of `saved` bytes at the speed of a copy. What a better algorithm or fewer operations
    save besides is not in it."""
    return saved / COPY_RATE[platform] * 1e6 if platform in COPY_RATE else 0.0


def timed(graph: Graph, match: Match) -> Callable[[], tuple[float, float]]:
    """() -> microseconds of the site (fused, unfused), each compiled alone, on random operands."""
    eqns = [graph.eqns[i] for i in sorted({graph.producers[e.outvars[0]] for e in match.inner})]
    made = {v for e in eqns for v in e.outvars}
    free = list(dict.fromkeys(a for e in eqns for a in e.invars if isinstance(a, Var) and a not in made))
    known = {v: value for v in free if (value := graph.array(v)) is not None}
    avals = {v: v.aval for v in [*free, *(a for a in match.leaves if isinstance(a, Var))] if v not in known}
    static = dict(match.static)

    def fused(values: dict[Any, Any]) -> Any:
        env = {**known, **values}
        return match.emit(*(a.val if isinstance(a, Literal) else env[a] for a in match.leaves), **static)

    def unfused(values: dict[Any, Any]) -> Any:
        env = {**known, **values}
        return _evaluated(eqns, env, match.results)

    def measure() -> tuple[float, float]:
        operands = list(_operands(avals.values()))
        times = []
        for function in (fused, unfused):
            compiled = jax.jit(lambda *xs, f=function: f(dict(zip(avals, xs, strict=True))))
            times.append(_microseconds(compiled, operands))
        return times[0], times[1]

    return measure


def _evaluated(eqns: Sequence[JaxprEqn], env: dict[Any, Any], results: Sequence[Var]) -> list[Any]:
    for eqn in eqns:
        operands = [a.val if isinstance(a, Literal) else env[a] for a in eqn.invars]
        env.update(zip(eqn.outvars, _compat.evaluated(eqn, operands), strict=True))
    return [env[v] for v in results]


def _operands(avals: Any) -> list[jax.Array]:
    rng = np.random.default_rng(0)
    return [
        jnp.asarray(rng.normal(size=a.shape), a.dtype)
        if jnp.issubdtype(a.dtype, jnp.floating)
        else jnp.asarray(rng.integers(0, 2, size=a.shape), a.dtype)
        for a in avals
    ]


def _microseconds(function: Callable, operands: Sequence[Any]) -> float:
    """Median over batches of calls; the first two calls compile and warm up."""
    for _ in range(2):
        jax.block_until_ready(function(*operands))
    start = time.perf_counter()
    jax.block_until_ready(function(*operands))
    calls = max(1, int(BATCH_SECONDS / max(time.perf_counter() - start, 1e-6)))

    def batch() -> float:
        start = time.perf_counter()
        for _ in range(calls):
            out = function(*operands)
        jax.block_until_ready(out)
        return (time.perf_counter() - start) / calls * 1e6

    return statistics.median(batch() for _ in range(BATCHES))
