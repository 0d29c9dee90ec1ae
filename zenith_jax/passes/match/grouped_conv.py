"""Convolutions in groups of few channels, whichever way their dimensions are numbered."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from zenith_jax.errors import Refusal, refuse
from zenith_jax.ir._compat import JaxprEqn
from zenith_jax.ir.graph import Graph
from zenith_jax.ops.grouped_conv import Geometry, by_products, unsupported
from zenith_jax.passes.match._match import Match


def match(graph: Graph, eqn: JaxprEqn) -> Match | Refusal | None:
    """`eqn` is the convolution. Those of one group are nothing like it."""
    del graph
    if eqn.primitive.name != "conv_general_dilated" or eqn.params["feature_group_count"] == 1:
        return None
    params = eqn.params
    x, w = eqn.invars
    result = eqn.outvars[0]
    if params["batch_group_count"] != 1:
        return refuse("the convolution sums over groups of the batch, as filters' gradients do", depth=1)
    if any(d != 1 for d in params["lhs_dilation"]):
        return refuse("the image is spread out, as in a transposed convolution", depth=1)
    if not x.aval.dtype == w.aval.dtype == result.aval.dtype:
        return refuse("image, filter and result have different dtypes", depth=1)
    if not result.aval.size or not w.aval.size:
        return refuse("the result or the filter is empty", depth=1)
    x_spec, w_spec, y_spec = params["dimension_numbers"]
    channels_last = x_spec[1] == len(x_spec) - 1
    groups = params["feature_group_count"]
    refusal = unsupported(x.aval.dtype, [w.aval.shape[d] for d in w_spec], groups, channels_last=channels_last)
    if refusal is not None:
        return refusal
    return Match(
        op="grouped_conv",
        root=eqn,
        results=(result,),
        inner=(eqn,),
        leaves=(x, w),
        emit=emit,
        static=(
            ("channels_last", channels_last),
            ("geometry", Geometry(*map(tuple, (params["window_strides"], params["padding"], params["rhs_dilation"])))),
            ("groups", groups),
            ("specs", (tuple(x_spec), tuple(w_spec), tuple(y_spec))),
        ),
        detail=f"{groups} groups of {w.aval.shape[w_spec[1]]} channels",
        case=(("dtype", x.aval.dtype.name), ("size", x.aval.size)),
    )


def emit(x: Any, w: Any, *, specs: tuple, geometry: Geometry, groups: int, channels_last: bool):
    x_spec, w_spec, y_spec = specs
    order = (lambda spec: (spec[0], *spec[2:], spec[1])) if channels_last else (lambda spec: spec)
    y = by_products(
        jnp.transpose(x, order(x_spec)), jnp.transpose(w, w_spec), geometry, groups, channels_last=channels_last
    )
    of_result = order(y_spec)
    return (jnp.transpose(y, [of_result.index(d) for d in range(y.ndim)]),)
