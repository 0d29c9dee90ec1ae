"""verify: how far fused and unfused results are from float64, for the whole function and for each fused site."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as jec
import jax.numpy as jnp
import numpy as np

from zenith_jax.api import current_context, jit, undecorated
from zenith_jax.config import config
from zenith_jax.errors import VerificationError
from zenith_jax.ir import _compat
from zenith_jax.ir.graph import Graph
from zenith_jax.passes.rewrite import Context, plan
from zenith_jax.report import collecting


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Largest |result - float64| over all elements, in units of the largest |float64|; NaN and inf must agree."""

    name: str
    fused: float
    unfused: float
    agree_on_nonfinite: bool

    @property
    def ratio(self) -> float:
        return self.fused / self.unfused if self.unfused else (1.0 if not self.fused else float("inf"))


@dataclasses.dataclass(frozen=True)
class Verification:
    """outputs: one Comparison for each array that the function returns. sites: one for each result of a fused site in
    the function's own jaxpr (those inside control flow or jax.grad are seen through the outputs only)."""

    outputs: tuple[Comparison, ...]
    sites: tuple[Comparison, ...]

    def check(self, ratio: float = 2.0, floor: float = 1e-6) -> Verification:
        """Returns itself, or raises VerificationError where a fused error is over `ratio` times the unfused one
        (errors under `floor` count as `floor`), or NaN or inf stand elsewhere."""
        for c in (*self.outputs, *self.sites):
            if not c.agree_on_nonfinite:
                raise VerificationError(f"{c.name}: NaN or infinity stand elsewhere than in float64")
            if c.fused > ratio * max(c.unfused, floor):
                raise VerificationError(
                    f"{c.name}: the fused error {c.fused:.2e} is over {ratio} times the unfused {c.unfused:.2e}"
                )
        return self

    def __str__(self) -> str:
        lines = [f"{'':40} {'fused':>10} {'unfused':>10}   (largest error against float64, relative)"]
        for c in (*self.outputs, *self.sites):
            note = "" if c.agree_on_nonfinite else "  NaN or infinity elsewhere!"
            lines.append(f"{c.name:40} {c.fused:10.2e} {c.unfused:10.2e}{note}")
        return "\n".join(lines)


def verify(function: Callable) -> Callable[..., Verification]:
    """verify(f)(*args): runs f fused, unfused and in float64 on these arguments, and compares.

    The float64 run casts every float argument up; a function that casts to a narrower dtype by itself is compared with
    what that gives. `function` may be decorated with `zenith.jit` already. `.check()` on the result raises.
    """
    plain = undecorated(function)

    def verified(*args: Any, **kwargs: Any) -> Verification:
        fused = jit(lambda *a, **k: plain(*a, **k))(*args, **kwargs)
        unfused = jax.jit(lambda *a, **k: plain(*a, **k))(*args, **kwargs)
        with jax.enable_x64(True):
            exact = jax.jit(lambda *a, **k: plain(*a, **k))(*_wide(args), **_wide(kwargs))
        paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(fused)]
        outputs = _compared([f"output{path}" for path in paths], *(jax.tree.leaves(x) for x in (fused, unfused, exact)))
        sites = _site_comparisons(plain, current_context(config()), args, kwargs)
        return Verification(tuple(outputs), tuple(sites))

    return verified


def _wide(tree: Any) -> Any:
    def cast(x: Any) -> Any:
        is_float = isinstance(x, (jax.Array, np.ndarray)) and jnp.issubdtype(x.dtype, jnp.floating)
        return jnp.asarray(np.asarray(x).astype(np.float64)) if is_float else x

    return jax.tree.map(cast, tree)


def _compared(names: Sequence[str], fused: Sequence, unfused: Sequence, exact: Sequence) -> list[Comparison]:
    rows = []
    for name, f, u, e in zip(names, fused, unfused, exact, strict=True):
        if not jnp.issubdtype(jnp.result_type(f), jnp.floating):
            continue
        f, u, e = (np.asarray(x).astype(np.float64) for x in (f, u, e))
        finite = np.isfinite(e)
        size = np.max(np.abs(e[finite]), initial=0.0) or 1.0

        def error(x: Any, e: Any = e, finite: Any = finite, size: float = size) -> float:
            return float(np.max(np.abs(x - e)[finite & np.isfinite(x)], initial=0.0) / size)

        agree = bool(np.array_equal(np.isnan(f), np.isnan(u)) and np.array_equal(np.isinf(f), np.isinf(u)))
        rows.append(Comparison(name, error(f), error(u), agree))
    return rows


def _site_comparisons(function: Callable, context: Context, args: tuple, kwargs: dict[str, Any]) -> list[Comparison]:
    """Each fused site on the very values that reach it in the unfused function."""
    leaves, tree = jax.tree.flatten((args, kwargs))
    dynamic = [i for i, x in enumerate(leaves) if isinstance(x, (jax.Array, np.ndarray, np.generic))]

    def flat(*values: Any) -> list[Any]:
        merged = list(leaves)
        for i, value in zip(dynamic, values, strict=True):
            merged[i] = value
        inner_args, inner_kwargs = jax.tree.unflatten(tree, merged)
        return [x for x in jax.tree.leaves(function(*inner_args, **inner_kwargs)) if isinstance(x, jax.Array)]

    values = [leaves[i] for i in dynamic]
    jaxpr = jax.make_jaxpr(flat)(*values)
    graph = Graph.of(jaxpr)
    with collecting():
        matches = plan(graph, context)
    wanted = [atom for m in matches for atom in (*m.leaves, *m.results)]
    traced = _compat.rebuilt(jaxpr, graph.eqns, wanted, graph.constvars, graph.consts)
    seen = iter(jax.jit(jec.jaxpr_as_fun(traced))(*values))
    rows: list[Comparison] = []
    for i, match in enumerate(matches):
        inputs = [next(seen) for _ in match.leaves]
        unfused = [next(seen) for _ in match.results]
        static = dict(match.static)
        fused = jax.jit(lambda *xs, m=match, s=static: m.emit(*xs, **s))(*inputs)
        with jax.enable_x64(True):
            wide = {k: "float64" if k in ("dtype", "result_dtype") else v for k, v in static.items()}
            exact = jax.jit(lambda *xs, m=match, s=wide: (m.exact or m.emit)(*xs, **s))(*_wide(tuple(inputs)))
        names = [f"site {i} {match.op} {_compat.source_line(match.root).rsplit('/', 1)[-1]}"] * len(match.results)
        rows += _compared(names, fused, unfused, exact)
    return rows
