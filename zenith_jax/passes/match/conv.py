"""relu(conv(x, w) + bias + residual): told of, and left to XLA, which has it in its own.

us on an H100, 32 x 56 x 56 of 64 to 256 channels by 1 x 1, float32: the convolution 61, with bias and relu 60, in
cuDNN's epilogue, which takes a residual along; ms on two cores of an EPYC, 1 x 56 x 56 by 1 x 1: 1.07 and 1.19, one
pass for all of it (2026-11-26).
"""

from __future__ import annotations

from zenith_jax.errors import Refusal, refuse
from zenith_jax.ir._compat import JaxprEqn
from zenith_jax.ir.graph import VIEWS, Graph
from zenith_jax.ir.term import is_float
from zenith_jax.passes.match import batch_norm
from zenith_jax.passes.match.linear import is_maximum, is_relu


def match(graph: Graph, eqn: JaxprEqn) -> Refusal | None:
    """`eqn` is the convolution. One with a batch norm behind it, or in groups, is a site of its own."""
    if eqn.primitive.name != "conv_general_dilated" or eqn.params["feature_group_count"] != 1:
        return None
    if not is_float(eqn.outvars[0].aval.dtype) or batch_norm.match(graph, eqn) is not None:
        return None
    var, sums = eqn.outvars[0], 0
    while (user := graph.only_user(var)) is not None and user.outvars[0].aval.shape == eqn.outvars[0].aval.shape:
        if is_relu(user) or is_maximum(graph, user):
            what = ("relu", "bias or residual, and relu", "bias, residual and relu")[min(sums, 2)]
            return refuse(
                "XLA computes {what} with a convolution by itself: in its epilogue, or in one pass", what=what
            )
        if user.primitive.name == "add":
            sums += 1
        elif user.primitive.name not in VIEWS:
            return None
        var = user.outvars[0]
    return None
