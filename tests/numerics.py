"""Comparing with float64: `from numerics import assert_error_ratio`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def in_float64(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function on its floating-point arguments as float64, on the CPU; its results as NumPy arrays.

    Compiled as one program: operation by operation, each would be compiled by itself, most of what a test costs.
    """

    def oracle(*args: Any, **kwargs: Any) -> Any:
        leaves, structure = jax.tree.flatten((args, kwargs))
        arrays = [i for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array | np.ndarray)]

        def of_arrays(values: list[Any]) -> Any:
            full = list(leaves)
            for i, value in zip(arrays, values, strict=True):
                full[i] = value
            given, named = jax.tree.unflatten(structure, full)
            return function(*given, **named)

        with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
            return jax.tree.map(np.asarray, jax.jit(of_arrays)([_as_float64(leaves[i]) for i in arrays]))

    return oracle


def _as_float64(x: Any) -> Any:
    if hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating):
        return jnp.asarray(np.asarray(x).astype(np.float64))
    return x


def max_error(actual: Any, oracle: Any) -> float:
    """Largest absolute error where the oracle is finite; NaN and infinities must be where the oracle has them."""
    actual, oracle = np.asarray(actual).astype(np.float64), np.asarray(oracle).astype(np.float64)
    assert actual.shape == oracle.shape, f"shape {actual.shape}, expected {oracle.shape}"
    finite = np.isfinite(oracle)
    np.testing.assert_array_equal(actual[~finite], oracle[~finite])
    return float(np.max(np.abs(actual - oracle)[finite], initial=0.0))


def ulps(count: float, oracle: Any, dtype: Any) -> float:
    """`count` units in the last place of `dtype` at the largest finite magnitude of the oracle."""
    oracle = np.asarray(oracle).astype(np.float64)
    largest = np.max(np.abs(oracle), where=np.isfinite(oracle), initial=0.0)
    return count * float(jnp.finfo(dtype).eps) * max(float(largest), float(jnp.finfo(dtype).tiny))


def assert_error_ratio(
    actual: Any,
    plain: Any,
    oracle: Any,
    *,
    ratio: float = 2.0,
    floor_ulps: float = 1.0,
    floor_dtype: Any = None,
    cancelling: bool = False,
) -> None:
    """Each array's error is at most `ratio` times that of the plain same-dtype implementation, both against float64.

    actual, plain, oracle: pytrees of one structure. floor_ulps: the error, in ulps at the oracle's largest magnitude,
    that is let pass whatever the plain implementation does: it may be exact by luck. floor_dtype: of these ulps; by
    default each array's own, a narrower one where its terms are rounded to that. cancelling: at the largest magnitude
    of all oracles; for gradients that are sums of terms of that size and zero in theory, as that of a bias on every key
    of an attention is.
    """
    leaves, structure = jax.tree.flatten(actual)
    plain_leaves, oracle_leaves = structure.flatten_up_to(plain), structure.flatten_up_to(oracle)
    for i, (a, p, o) in enumerate(zip(leaves, plain_leaves, oracle_leaves, strict=True)):
        floor = max(ulps(floor_ulps, x, floor_dtype or a.dtype) for x in (oracle_leaves if cancelling else [o]))
        error, allowed = max_error(a, o), max(ratio * max_error(p, o), floor)
        assert error <= allowed, (
            f"array {i} of shape {a.shape}, {a.dtype}: error {error:.3g} against float64, allowed {allowed:.3g} "
            f"({ratio} x the plain implementation's {max_error(p, o):.3g}, or {floor_ulps} ulp)"
        )
