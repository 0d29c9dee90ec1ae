"""jit, fuse, explain, verify: what users call."""

from __future__ import annotations

import dataclasses
import functools as ft
import logging
import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.extend.core as jec
import numpy as np

from zenith_jax import native
from zenith_jax.config import Config, config
from zenith_jax.ir import _compat
from zenith_jax.passes.registered import active
from zenith_jax.passes.rewrite import Context, rewrite
from zenith_jax.report import Report, collecting, log_sites
from zenith_jax.telemetry import compiling, sampling

logger = logging.getLogger("zenith_jax")

# The Context of the rewriting that traces are part of, or None. Public to JAX's caches: a function traced inside a
# decorated one and outside of it has two entries.
_rewriting = jax.make_user_context(None)


def jit(function: Callable | None = None, **options: Any) -> Any:
    """`jax.jit` of `fuse(function)`: same arguments, same methods (.lower, .trace, .eval_shape), same dispatch.

    As a decorator with or without options: `@zenith.jit`, `@zenith.jit(static_argnames=("train",))`. `jax.grad` and
    other transformations work inside and outside of it. Fused sites round differently from XLA's code, in float32 by
    about 1e-6 relative; `zenith.verify` shows by how much. ZENITH_DISABLE=1 makes it `jax.jit`.
    """
    if function is None:
        return ft.partial(jit, **options)
    settings = config()
    jitted = jax.jit(fuse(function) if settings.enabled else function, **options)
    return sampling.sampled(jitted, settings.telemetry) if settings.telemetry else jitted


def fuse(function: Callable) -> Callable:
    """`function` with its fusible parts computed by Zenith's kernels: the transformation without the jit.

    Takes and returns what `function` does. Arrays among the arguments are traced; all else (Python numbers included)
    is passed as it is. Composes with every JAX transformation.
    """

    if not callable(function):
        raise TypeError(f"zenith.jit and zenith.fuse take a function, got {function!r}")

    @ft.wraps(function)
    def fused(*args: Any, **kwargs: Any) -> Any:
        settings = config()
        if not settings.enabled:
            return function(*args, **kwargs)
        return _fused_call(function, current_context(settings), args, kwargs)

    fused.__zenith_function__ = function  # pyright: ignore[reportAttributeAccessIssue]
    return fused


def undecorated(function: Callable) -> Callable:
    """The function that was given to `jit` or `fuse`; any other function as it is."""
    for candidate in (function, getattr(function, "__wrapped__", None)):
        original = getattr(candidate, "__zenith_function__", None)
        if original is not None:
            return original
    return function


def explain(function: Callable, *, measure: bool = False) -> Callable[..., Report]:
    """explain(f)(*args): the Report of what `jit(f)` fuses for such arguments, and why not the rest. Runs nothing.

    Arguments that are sharded, arrays or structs with a NamedSharding, show what the partitioner would gather.

    `function` may be decorated with `zenith.jit` already; `jax.ShapeDtypeStruct`s do for arrays. measure: compile and
    run each fused site alone, both ways, on random operands, and put the times into the report.
    """
    plain = undecorated(function)

    def explained(*args: Any, **kwargs: Any) -> Report:
        shardings = tuple(map(_spec, jax.tree.leaves((args, kwargs))))
        context = dataclasses.replace(current_context(config()), shardings=shardings)
        # A fresh function: JAX's caches must not answer for an earlier trace.
        fresh = lambda *a, **k: _fused_call(plain, context, a, k)  # noqa: E731
        with collecting() as sites:
            jax.make_jaxpr(fresh)(*args, **kwargs)
        report = Report(tuple(sites), context.platform)
        return report.measured() if measure else report

    return explained


def _spec(x: Any) -> tuple[Any, ...]:
    """Mesh axes of each dimension of an argument; () where they are not known."""
    sharding = getattr(x, "sharding", None)
    return tuple(sharding.spec) if isinstance(sharding, jax.sharding.NamedSharding) else ()


def current_context(settings: Config) -> Context:
    """What a rewriting that starts now is part of."""
    platform = settings.platform or native.default_platform()
    use_cost = settings.use_cost and settings.choices is None
    return Context(platform, use_cost, registered=active(), choices=settings.choices)


def _is_array(x: Any) -> bool:
    return isinstance(x, (jax.Array, np.ndarray, np.generic))


def _fused_call(function: Callable, context: Context, args: tuple, kwargs: dict[str, Any]) -> Any:
    """function(*args, **kwargs), traced, rewritten, and evaluated."""
    leaves, tree = jax.tree.flatten((args, kwargs))
    dynamic = [i for i, x in enumerate(leaves) if _is_array(x)]
    out: dict[str, Any] = {}

    def flat(*values: Any) -> list[Any]:
        merged = list(leaves)
        for i, value in zip(dynamic, values, strict=True):
            merged[i] = value
        inner_args, inner_kwargs = jax.tree.unflatten(tree, merged)
        results, out["tree"] = jax.tree.flatten(function(*inner_args, **inner_kwargs))
        out["leaves"] = [None if _is_array(r) else r for r in results]
        return [r for r in results if _is_array(r)]

    values = [leaves[i] for i in dynamic]
    # Inside a primal that is about to be differentiated, nested differentiation is left alone.
    with compiling.rewriting(function, context.platform), _rewriting(None if context.differentiated else context):
        jaxpr = jax.make_jaxpr(flat)(*values)
        with _rewriting(None), collecting() as sites, compiling.rewrite_clock():
            new = _rewritten(jaxpr, context)
        compiling.found(sites)
        log_sites(function, sites, context.platform)
    arrays = iter(jec.jaxpr_as_fun(new)(*values))
    return jax.tree.unflatten(out["tree"], [next(arrays) if x is None else x for x in out["leaves"]])


def _rewritten(jaxpr: Any, context: Context) -> Any:
    try:
        return rewrite(jaxpr, context)
    except Exception as error:
        compiling.failed(error)
        logger.exception("rewriting failed, the function runs as it was written; please report it")
        return jaxpr


# --- differentiation inside a decorated function ----------------------------------------------------------------------


def _fuse_primal(function: Callable) -> Callable:
    """What reverse-mode differentiation inside a rewriting differentiates instead of `function`."""
    context = dataclasses.replace(_rewriting.value, differentiated=True, shardings=())

    def primal(*args: Any, **kwargs: Any) -> Any:
        return _fused_call(function, context, args, kwargs)

    return primal


def _unfused(function: Callable) -> Callable:
    def plain(*args: Any, **kwargs: Any) -> Any:
        with _rewriting(None):
            return function(*args, **kwargs)

    return plain


def _install_hook() -> None:
    _compat.install_linearize_hook(_fuse_primal, lambda: _rewriting.value is not None, _unfused)
    reason = _hook_failure()
    if reason:
        _compat.warn_hook_missing(reason)


def _hook_failure() -> str | None:
    """Differentiates a tiny function inside a rewriting: "" when the primal came by our hook."""
    seen: list[bool] = []

    def probe(x: Any) -> Any:
        seen.append(_rewriting.value is None)
        return x * x

    try:
        with _rewriting(Context("cpu")):
            jax.make_jaxpr(jax.grad(probe))(1.0)
    except Exception as error:
        return repr(error)
    return None if seen and all(seen) else "reverse-mode differentiation no longer reaches ad.linearize"


_install_hook()
compiling.clear()  # of the tiny function
_here = pathlib.Path(__file__).parent
_compat.hide_frames(__file__, *(f"{_here / name}{os.sep}" for name in ("compiled", "ops", "passes")))
