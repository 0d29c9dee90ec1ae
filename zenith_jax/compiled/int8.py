"""`compile(precision="int8")`: the matrices of a model's dense layers as 8-bit integers with a scale for each result.

  w[k, n]  ->  q[k, n] = round(w[k, n] / s[n]),   s[n] = max over k of |w[k, n]| / 127,   read as q * s

Symmetric, and the weights alone: inputs, biases and sums stay floats. Of each weight at most s[n] / 2 is lost, so that
a result of the layer changes by at most

  |y' - y|[n]  <=  sum over k of |x[k]| * s[n] / 2

besides rounding. Where rows are few, ops/quantized_linear.py reads the integers themselves (passes/choose/).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zenith_jax.compiled.structure import Structure
from zenith_jax.errors import FrontendError, Refusal, refuse
from zenith_jax.frontends._source import Source
from zenith_jax.ir.graph import Graph
from zenith_jax.passes.dense import Summed, dense
from zenith_jax.report import Narrowed

# Numbers from which a matrix is worth it: 4 KiB of 16 saved.
_LEAST_SIZE = 4096
_LARGEST = 127  # not -128: the range is symmetric


def with_int8(source: Source, args: tuple[Any, ...]) -> tuple[Source, list[Narrowed]]:
    """The source whose dense layers have 8-bit weights, and what became of each of its matrices.

    args: the source's own, arrays or structs of fixed sizes. The new one's parameters are a dict by path, in which a
    quantised one is {"int8": q, "scale": s}. Raises FrontendError where there is nothing to quantise.
    """
    structure, params = Structure.of(source.params)
    found = _found(source, structure, params, args)
    names = structure.names
    scaled = {}
    narrowed = []
    for name, param, summed in zip(names, params, found, strict=True):
        if isinstance(summed, tuple):
            matrix = np.asarray(param)
            q, scale, error = quantized(matrix, summed)
            if q is None:
                summed = refuse("it holds an infinity or a NaN")
            else:
                scaled[name] = {"int8": jnp.asarray(q), "scale": jnp.asarray(scale)}
                narrowed.append(Narrowed(name, tuple(param.shape), error=error))
        if isinstance(summed, Refusal) and is_matrix(param):
            narrowed.append(Narrowed(name, tuple(param.shape), reason=str(summed)))
    if not scaled:
        reasons = "".join(f"; {n.name}{list(n.shape)}: {n.reason}" for n in narrowed[:3])
        raise FrontendError(
            f'{source.name}: precision="int8" finds no matrix of a dense layer among the {len(params)} parameters'
            f"{reasons or ', of which none is a float matrix'}. Compile with another precision"
        )
    dtypes = {name: param.dtype for name, param in zip(names, params, strict=True) if name in scaled}

    def function(params: dict[str, Any], *args: Any) -> Any:
        leaves = [_widened(params[n], dtypes[n]) if n in dtypes else params[n] for n in names]
        return source.function(structure.filled(leaves), *args)

    kept = {name: scaled.get(name, param) for name, param in zip(names, params, strict=True)}
    return dataclasses.replace(source, function=function, params=kept), narrowed


def _found(
    source: Source, structure: Structure, params: Sequence[Any], args: tuple[Any, ...]
) -> list[Summed | Refusal]:
    """For each parameter the dimensions that a dense layer sums over, or why it stays a float."""
    inputs, examples = Structure.of(args)

    def flat(*values: Any) -> list[Any]:
        filled = structure.filled(values[: len(params)])
        results = source.function(filled, *inputs.filled(values[len(params) :]))
        return [r for r in jax.tree.leaves(results) if hasattr(r, "dtype")]

    structs = [jax.ShapeDtypeStruct(x.shape, jax.dtypes.canonicalize_dtype(x.dtype)) for x in (*params, *examples)]
    graph = Graph.of(jax.make_jaxpr(flat)(*structs))
    return [_worth(p, summed) for p, summed in zip(params, dense(graph, len(params)), strict=True)]


def _worth(param: Any, summed: Summed | Refusal) -> Summed | Refusal:
    if not is_matrix(param):
        return refuse("it is no float matrix")
    if isinstance(summed, tuple) and param.size < _LEAST_SIZE:
        return refuse("{n} numbers are too few to be worth it", n=param.size)
    return summed


def is_matrix(param: Any) -> bool:
    return param.ndim >= 2 and jnp.issubdtype(param.dtype, jnp.floating)


def quantized(matrix: np.ndarray, summed: Summed) -> tuple[np.ndarray | None, np.ndarray, float]:
    """(q, its scale with size 1 along `summed`, the error of q * scale: root mean square, relative to the matrix's).

    q is None where the matrix holds what is not finite.
    """
    wide = matrix.astype(np.float32 if matrix.dtype != np.float64 else np.float64)
    scale = np.abs(wide).max(axis=summed, keepdims=True, initial=0) / _LARGEST
    if not np.isfinite(scale).all():
        return None, scale, 0.0
    # A scale of zero, or one that is too small to divide by: all of its weights are zero, or as good as.
    divisor = np.where(scale >= np.finfo(wide.dtype).tiny, scale, 1)
    scale = np.where(scale >= np.finfo(wide.dtype).tiny, scale, 0).astype(wide.dtype)
    q = np.clip(np.rint(wide / divisor), -_LARGEST, _LARGEST).astype(np.int8)
    size = float(np.sqrt(np.mean(np.square(wide, dtype=np.float64)))) or 1.0
    return q, scale, float(np.sqrt(np.mean(np.square(q * scale - wide, dtype=np.float64)))) / size


def _widened(param: dict[str, Any], dtype: Any) -> Any:
    scale = param["scale"]
    return (param["int8"].astype(scale.dtype) * scale).astype(dtype)
