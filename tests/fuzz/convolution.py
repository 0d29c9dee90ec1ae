"""Convolutions of few channels a group, and their neighbours; and what a convolution is, for the oracle."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from fuzz.script import Script
from jax import lax


def convolution(script: Script, x: Any) -> tuple[Any, list[Any]]:
    """Along the axis before the last, in any layout; of more or fewer groups than is matched too."""
    *lead, length, channels = x.shape
    image = x.reshape(math.prod(lead), length, channels)
    groups = script.pick("groups", *(g for g in (channels, channels, 1, 2) if channels % g == 0))
    size = script.pick("filter", 1, 2, 3)
    # One of them, and no more padding than the filter's extent less one: XLA's compiler (jaxlib 0.10.2) aborts the
    # process at gradients of some other convolutions.
    stride, dilation, spread = script.pick("strides", (1, 1, 1), (1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2))
    extent = (size - 1) * dilation + 1
    low = script.pick("low", 0, extent - 1)
    high = max(script.pick("high", 0, extent - 1), extent - (length - 1) * spread - 1 - low)
    outputs = groups * script.pick("outputs of a group", 1, 1, 2)
    w = script.array("normal", (size, channels // groups, outputs), x.dtype)
    x_spec, w_spec, y_spec = script.pick("layout", ("NWC", "WIO", "NWC"), ("NCW", "OIW", "NCW"), ("CWN", "IOW", "WNC"))
    y = lax.conv_general_dilated(
        image.transpose(["NWC".index(c) for c in x_spec]),
        w.transpose(["WIO".index(c) for c in w_spec]),
        (stride,),
        ((low, high),),
        lhs_dilation=(spread,),
        rhs_dilation=(dilation,),
        dimension_numbers=(x_spec, w_spec, y_spec),
        feature_group_count=groups,
    )
    y = y.transpose([y_spec.index(c) for c in "NWC"])
    return y.reshape(*lead, *y.shape[1:]), [y]


# --- the oracle's -----------------------------------------------------------------------------------------------------


def convolved(params: dict[str, Any], x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """conv_general_dilated, element of the filter by element."""
    x_spec, w_spec, y_spec = params["dimension_numbers"]
    x = _spread(x.transpose(x_spec), params["lhs_dilation"])
    x = _padded(x, params["padding"])
    w = _spread(w.transpose(w_spec), params["rhs_dilation"])
    batches, groups = params["batch_group_count"], params["feature_group_count"]
    # Groups of the batch are groups of channels too, each of the whole batch's part.
    if batches > 1:
        x = np.concatenate(np.split(x, batches, axis=0), axis=1)
        groups = batches
    n, channels = x.shape[:2]
    kernel, strides = w.shape[2:], params["window_strides"]
    sizes = [max(0, (m - k) // s + 1) for m, k, s in zip(x.shape[2:], kernel, strides, strict=True)]
    by_group = x.reshape(n, groups, channels // groups, *x.shape[2:])
    filters = w.reshape(groups, w.shape[0] // groups, *w.shape[1:])
    y = np.zeros((n, groups, filters.shape[1], *sizes), np.result_type(x, w))
    if y.size:
        for tap in itertools.product(*map(range, kernel)):
            window = tuple(slice(t, t + (m - 1) * s + 1, s) for t, m, s in zip(tap, sizes, strides, strict=True))
            y += np.einsum("ngi...,goi->ngo...", by_group[(..., *window)], filters[(..., *tap)])
    y = y.reshape(n, -1, *sizes)
    return y.transpose([list(y_spec).index(d) for d in range(y.ndim)])


def _spread(x: np.ndarray, dilation: Sequence[int]) -> np.ndarray:
    """Zeros between neighbours."""
    sizes = [max(0, (n - 1) * d + 1) for n, d in zip(x.shape[2:], dilation, strict=True)]
    y = np.zeros((*x.shape[:2], *sizes), x.dtype)
    y[(slice(None), slice(None), *(slice(None, None, d) for d in dilation))] = x
    return y


def _padded(x: np.ndarray, padding: Sequence[tuple[int, int]]) -> np.ndarray:
    """Negative padding takes away."""
    x = np.pad(x, [(0, 0), (0, 0), *((max(low, 0), max(high, 0)) for low, high in padding)])
    kept = (slice(max(-low, 0), n - max(-high, 0)) for (low, high), n in zip(padding, x.shape[2:], strict=True))
    return x[(slice(None), slice(None), *kept)]
