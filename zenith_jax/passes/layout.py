"""Convolutions that no kernel takes, and pooling windows, as XLA's CPU compiler computes them best: channels last, 1x1
as a matrix product.

    conv(x[n, c, h, w], filter[o, i, kh, kw])  ->  transposes around  conv(x[n, h, w, c], filter[kh, kw, i, o])
    conv(x[n, h, w, c], filter[1, 1, i, o])    ->  x @ filter

The transposes between two such operations, elementwise ones in between, are removed by XLA. Those of filters are made
once where the filters are known (passes/known.py), else in each call, as XLA itself would.

ms, channels first with (o, i, kh, kw) / last / last and as a product; float32, of one image and of eight: 56 x 56,
64 to 256 by 1 x 1, 4.4 / 1.3 / 1.2, 20 / 9.7 / 5.5; 28 x 28, 512 to 128 by 1 x 1, 1.7 / 1.1 / 0.6, 14 / 9.4 / 4.2;
56 x 56, 64 to 64 by 3 x 3, 2.6 / 2.3, 21 / 19; 14 x 14, 256 to 256 by 3 x 3, 2.7 / 1.4, 10.4 / 9.4; 2 x 2 windows of
28 x 28 x 32, 64 images, 0.82 / 0.40. Two convolutions of MNIST with bias, relu and windows, 64 images, 11.6 / 2.9.
(AMD EPYC, AVX-512, two cores, jax 0.10.2, 2026-11-26.)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from zenith_jax.ir._compat import JaxprEqn
from zenith_jax.ir.graph import Graph
from zenith_jax.passes.match import Match
from zenith_jax.passes.match.conv import FILTERS, IMAGES, RANK

_WINDOWS = {"reduce_window_max", "reduce_window_min", "reduce_window_sum"}
# Rows of the product up to which a larger filter is one too, of shifted images side by side, and the least number of
# terms: 7 x 7, 512 to 512 by 3 x 3, 3.4 / 1.5 ms, of eight images 12.2 / 9.7; 14 x 14, 256 to 256, 1.37 / 1.44.
_SHIFTED_ROWS, _SHIFTED_TERMS = 512, 4096


def matches(graph: Graph, platform: str, taken: set[int]) -> Iterator[Match]:
    """Of equations that no op has claimed: `taken`, by id. They are no sites: what they compute stays XLA's."""
    if platform != "cpu":
        return
    free = [e for e in graph.eqns if id(e) not in taken]
    has_convolution = any(e.primitive.name == "conv_general_dilated" for e in free)
    for eqn in free if has_convolution else ():
        if eqn.primitive.name == "conv_general_dilated":
            found = _convolution(eqn)
        elif eqn.primitive.name in _WINDOWS:
            found = _window(eqn)
        else:
            continue
        if found is not None:
            yield found


def _match(eqn: JaxprEqn, emit: Any, **static: Any) -> Match:
    (result,) = eqn.outvars
    return Match("layout", eqn, (result,), (eqn,), tuple(eqn.invars), emit, tuple(static.items()))


def _convolution(eqn: JaxprEqn) -> Match | None:
    params = eqn.params
    x, w, y = eqn.invars[0].aval, eqn.invars[1].aval, eqn.outvars[0].aval
    is_plain = (
        params["feature_group_count"] == params["batch_group_count"] == 1
        and all(d == 1 for d in params["lhs_dilation"])
        and x.dtype == w.dtype == y.dtype == jnp.float32
        and x.ndim == RANK
        and all(isinstance(n, int) for n in (*x.shape, *w.shape, *y.shape))  # jax.export makes symbols of some
        and min(x.size, w.size, y.size) > 0
    )
    if not is_plain:
        return None
    x_spec, w_spec, y_spec = (tuple(s) for s in params["dimension_numbers"])
    if x_spec not in IMAGES or y_spec not in IMAGES or w_spec not in FILTERS:
        return None  # those of gradients: with channels last some took longer, 29 against 23 ms
    is_product = _is_product([w.shape[d] for d in w_spec], [y.shape[d] for d in y_spec], params)
    if not is_product and _last(x_spec) == _last(y_spec) == (0, 1, 2, 3) == (*w_spec[2:], w_spec[1], w_spec[0]):
        return None
    return _match(
        eqn,
        _as_product if is_product else _channels_last,
        specs=(x_spec, w_spec, y_spec),
        strides=tuple(params["window_strides"]),
        padding=tuple(map(tuple, params["padding"])),
        dilation=tuple(params["rhs_dilation"]),
        precision=params["precision"],
        preferred=params["preferred_element_type"],
    )


def _is_product(w: Sequence[int], y: Sequence[int], params: Any) -> bool:
    """w: (o, i, *kernel) and y: (n, o, *spatial), sizes."""
    is_padded = any(low or high for low, high in params["padding"])
    if math.prod(w[2:]) == 1:
        return not is_padded
    rows = math.prod((y[0], *y[2:]))
    is_cropped = any(low < 0 or high < 0 for low, high in params["padding"])
    return rows <= _SHIFTED_ROWS and math.prod(w[1:]) >= _SHIFTED_TERMS and w[0] > 1 and not is_cropped


def _last(spec: Sequence[int]) -> tuple[int, ...]:
    """(batch, channel, *spatial) -> (batch, *spatial, channel)."""
    return (spec[0], *spec[2:], spec[1])


def _filter(w: Any, spec: tuple[int, ...]) -> Any:
    return jnp.transpose(w, (*spec[2:], spec[1], spec[0]))


def _restored(y: Any, spec: tuple[int, ...]) -> Any:
    order = _last(spec)
    return (jnp.transpose(y, [order.index(d) for d in range(y.ndim)]),)


def _channels_last(x, w, *, specs, strides, padding, dilation, precision, preferred):
    x_spec, w_spec, y_spec = specs
    y = lax.conv_general_dilated(
        jnp.transpose(x, _last(x_spec)),
        _filter(w, w_spec),
        strides,
        padding,
        rhs_dilation=dilation,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=precision,
        preferred_element_type=preferred,
    )
    return _restored(y, y_spec)


def _as_product(x, w, *, specs, strides, padding, dilation, precision, preferred):
    x_spec, w_spec, y_spec = specs
    x = jnp.transpose(x, _last(x_spec))
    outputs, inputs, *kernel = (w.shape[d] for d in w_spec)
    x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *((*p, 0) for p in padding), (0, 0, 0)])
    reach = [(k - 1) * d for k, d in zip(kernel, dilation, strict=True)]
    size = [(n - r - 1) // s + 1 for n, r, s in zip(x.shape[1:3], reach, strides, strict=True)]
    shifted = [
        lax.slice(
            x,
            (0, i * dilation[0], j * dilation[1], 0),
            (
                x.shape[0],
                i * dilation[0] + (size[0] - 1) * strides[0] + 1,
                j * dilation[1] + (size[1] - 1) * strides[1] + 1,
                inputs,
            ),
            (1, *strides, 1),
        )
        for i in range(kernel[0])
        for j in range(kernel[1])
    ]
    rows = (shifted[0] if len(shifted) == 1 else jnp.concatenate(shifted, -1)).reshape(-1, inputs * len(shifted))
    if len(shifted) == 1:  # a matrix already, whose transpose a product takes
        w = w.reshape(outputs, inputs).T if w_spec[0] < w_spec[1] else w.reshape(inputs, outputs)
    else:
        w = _filter(w, w_spec).reshape(-1, outputs)
    y = lax.dot(rows, w, precision=precision, preferred_element_type=preferred)
    return _restored(y.reshape(x.shape[0], *size, outputs), y_spec)


# --- windows ----------------------------------------------------------------------------------------------------------


def _window(eqn: JaxprEqn) -> Match | None:
    """Of (n, c, h, w), along the last two."""
    x, y = eqn.invars[0].aval, eqn.outvars[0].aval
    size = eqn.params["window_dimensions"]
    moves = any(n != 1 for n in (*size[:2], *eqn.params["window_strides"][:2])) or any(
        low or high for low, high in eqn.params["padding"][:2]
    )
    dilates = any(d != 1 for d in eqn.params["base_dilation"])
    if x.ndim != RANK or moves or dilates or size[2:] == (1, 1) or x.dtype != jnp.float32 or not min(x.size, y.size):
        return None
    params = {k: tuple(map(tuple, v)) if k == "padding" else v for k, v in eqn.params.items()}
    return _match(eqn, _window_last, primitive=eqn.primitive, params=tuple(params.items()))


def _window_last(x, *, primitive, params):
    order = lambda of: (of[0], *of[2:], of[1])  # noqa: E731
    y = primitive.bind(jnp.transpose(x, (0, 2, 3, 1)), **{k: order(v) for k, v in params})
    return (jnp.transpose(y, (0, 3, 1, 2)),)
