"""Layers of images: a convolution and what networks put behind it, channels first or last; and near misses."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from fuzz.script import Script
from jax import lax

LAYOUTS = (("NHWC", "HWIO", "NHWC"), ("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NCHW"), ("NCHW", "OIHW", "NHWC"))
MOST = 400  # elements of a result


def image_layer(script: Script, x: Any) -> tuple[Any, list[Any]]:
    """The last three axes of x are height, width and channels; images of fewer have one row."""
    image = x.reshape((1,) * (4 - x.ndim) + x.shape)
    pixels = image.size // max(1, image.shape[-1])
    features = script.pick("features", *(n for n in (4, 1, 17, 32) if n == 4 or n * pixels <= MOST))
    y, numbers = _convolved(script, image, features)
    taps = [y]
    y = _by_channel(script, y, numbers)
    if script.one_in(3, "residual"):
        r = script.array("normal", y.shape, y.dtype)
        y = script.pick("residual", lambda: y + r, lambda: r + y)()
    y = script.spell(
        "activation",
        [lambda: y, lambda: jax.nn.relu(y), lambda: jnp.maximum(y, 0), lambda: jnp.maximum(0.0, y).astype(y.dtype)],
        [lambda: jnp.maximum(y, 1), lambda: jnp.minimum(y, 0), lambda: abs(y), lambda: jax.nn.relu(-y)],
    )()
    if script.pick("pooled", False, True):
        y = _pooled(script, y, numbers)
    y = y.transpose([numbers.index(c) for c in "NHWC"])
    y = y.reshape(y.shape[1:]) if y.shape[0] == 1 else y
    return (y if 0 < y.size <= MOST else x), taps


def _convolved(script: Script, image: Any, features: int) -> tuple[Any, str]:
    x_spec, w_spec, y_spec = script.pick("layout", *LAYOUTS)
    filters = script.pick("filter", (1, 1), (3, 3), (2, 1), (1, 3))
    # As in convolution.py: other gradients make XLA's compiler abort.
    strides, dilation = script.pick(
        "strides", ((1, 1), (1, 1)), ((2, 2), (1, 1)), ((1, 2), (1, 1)), ((1, 1), (2, 1)), ((1, 1), (1, 2))
    )
    padding = []
    for n, k, d in zip(image.shape[1:3], filters, dilation, strict=True):
        extent = (k - 1) * d + 1
        low = script.pick("low", (extent - 1) // 2, 0, extent - 1)
        padding.append((low, max(script.pick("high", extent // 2, 0, extent - 1), extent - n - low)))
    w = script.array("normal", (*filters, image.shape[-1], features), image.dtype)
    y = lax.conv_general_dilated(
        image.transpose(["NHWC".index(c) for c in x_spec]),
        w.transpose(["HWIO".index(c) for c in w_spec]),
        strides,
        padding,
        rhs_dilation=dilation,
        dimension_numbers=(x_spec, w_spec, y_spec),
    )
    return y, y_spec


def _by_channel(script: Script, y: Any, numbers: str) -> Any:
    """A bias, or a batch norm with stored statistics; seldom a vector along another axis."""
    axis = numbers.index(script.spell("vector along", ["C"], ["H", "W", "N"]))

    def vector(kind: str) -> Any:
        return script.array(kind, [n if d == axis else 1 for d, n in enumerate(y.shape)], y.dtype)

    return script.pick(
        "channels",
        lambda: y,
        lambda: y + vector("normal"),
        lambda: vector("normal") - y,
        lambda: y * vector("scale"),
        lambda: (
            (y - vector("normal")) * lax.rsqrt(jnp.square(vector("scale")) + 0.1) * vector("scale") + vector("normal")
        ),
    )()


def _pooled(script: Script, y: Any, numbers: str) -> Any:
    """The maximum of windows of two by two that lie side by side; and neighbours of that."""

    def pooled(size: int, stride: int, padding: str, reducer: Any = lax.max, init: Any = -jnp.inf) -> Any:
        window, strides = ([n if c in "HW" else 1 for c in numbers] for n in (size, stride))
        if padding == "VALID" and any(m < n for m, n in zip(y.shape, window, strict=True)):
            return y
        # A constant, as JAX has derivatives of maxima and sums, not of any reduction.
        return lax.reduce_window(y, np.array(init, y.dtype), reducer, window, strides, padding)

    return script.spell(
        "pool",
        [lambda: pooled(2, 2, "VALID"), lambda: pooled(2, 2, "SAME"), lambda: pooled(3, 2, "SAME")],
        [
            lambda: pooled(2, 1, "VALID"),
            lambda: pooled(2, 3, "VALID"),
            lambda: pooled(2, 2, "VALID", lax.min, jnp.inf),
            lambda: pooled(2, 2, "VALID", lax.add, 0),
        ],
    )()


# --- the oracle's -----------------------------------------------------------------------------------------------------


def windows(params: dict[str, Any], x: np.ndarray, fill: float) -> np.ndarray:
    """(*results, elements of a window)."""
    assert all(d == 1 for name in ("base_dilation", "window_dilation") for d in params.get(name, ()))
    padded = np.pad(x, params["padding"], constant_values=fill)
    views = np.lib.stride_tricks.sliding_window_view(padded, params["window_dimensions"])
    views = views[tuple(slice(None, None, s) for s in params["window_strides"])]
    return views.reshape(*views.shape[: x.ndim], -1)


def gathered_at_most(params: dict[str, Any], tangents: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Of each window the tangent of the first largest element, or smallest."""
    chosen, _ = _chosen(params, x)
    return np.take_along_axis(windows(params, tangents, 0.0), chosen, -1)[..., 0]


def scattered_to_most(params: dict[str, Any], source: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Each window's number added to its first largest element, or smallest."""
    chosen, places = _chosen(params, x)
    y = np.zeros(x.size + 1, source.dtype)  # the last: of padding
    np.add.at(y, np.take_along_axis(places, chosen, -1)[..., 0], source)
    return y[:-1].reshape(x.shape)


def _chosen(params: dict[str, Any], x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which element of each window, (*results, 1), and where each of its elements lies, -1 in padding."""
    sign = {"ge": 1, "le": -1}[params["select_prim"].name]
    places = windows(params, np.arange(x.size).reshape(x.shape), -1)
    return np.argmax(windows(params, sign * x, -np.inf), -1, keepdims=True), places
