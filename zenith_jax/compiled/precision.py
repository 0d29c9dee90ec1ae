"""`compile(precision="bf16" | "f16")`: a Source whose parameters and computation are narrower. int8: int8.py."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from zenith_jax.frontends._source import Source

DTYPES = {"bf16": jnp.bfloat16, "f16": jnp.float16}
PRECISIONS = (None, *DTYPES, "int8")


def with_precision(source: Source, precision: str) -> Source:
    """The source with its float32 and float64 parameters and inputs cast, and outputs cast back to their dtypes.

    What the model itself casts to float32 stays float32; the fused norms, softmax and attention accumulate in it.
    """
    dtype = DTYPES[precision]
    # Of the original, which the outputs' dtypes are those of.
    structs = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype) if _is_wide(p) else p, source.params)

    def function(params: Any, *args: Any) -> Any:
        results = source.function(params, *jax.tree.map(narrow, args))
        wanted = _wanted(source, structs, args)
        return jax.tree.map(lambda r, w: r.astype(w.dtype) if hasattr(r, "astype") else r, results, wanted)

    def narrow(x: Any) -> Any:
        return jnp.asarray(x).astype(dtype) if _is_wide(x) else x

    return dataclasses.replace(source, function=function, params=jax.tree.map(narrow, source.params))


def _wanted(source: Source, structs: Any, args: tuple[Any, ...]) -> Any:
    """Outputs of the original for such arguments: shapes and dtypes, and Python values as they are."""
    leaves, tree = jax.tree.flatten((structs, args))
    arrays = [i for i, x in enumerate(leaves) if hasattr(x, "dtype")]
    kept: dict[str, Any] = {}

    def original(values: list[Any]) -> Any:
        full = list(leaves)
        for i, value in zip(arrays, values, strict=True):
            full[i] = value
        params, inputs = jax.tree.unflatten(tree, full)
        results, kept["tree"] = jax.tree.flatten(source.function(params, *inputs))
        kept["values"] = [None if hasattr(r, "dtype") else r for r in results]
        return [r for r in results if hasattr(r, "dtype")]

    shapes = iter(jax.eval_shape(original, [jax.ShapeDtypeStruct(leaves[i].shape, leaves[i].dtype) for i in arrays]))
    return jax.tree.unflatten(kept["tree"], [next(shapes) if v is None else v for v in kept["values"]])


def _is_wide(x: Any) -> bool:
    return hasattr(x, "dtype") and x.dtype in (jnp.float32, jnp.float64)
