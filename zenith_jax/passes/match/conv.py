"""activation(scale * conv(x, w) + bias + residual), or of that without residual the maximum of windows that lie side
by side, read upwards from the convolution of images.

  y[n, *s, o] = act(scale[o] * sum over i, *k of x[n, *s + *k, i] * w[*k, i, o]  + bias[o] + residual[n, *s, o])

whichever way dimensions are numbered: channels first or last, filters (o, i, *k) or (*k, i, o). Scale and bias are
whatever multiplies and shifts the channels: a bias, a batch norm with stored statistics (`batch_norm.read`). Each value
in between is used by the next step alone. A convolution alone is a site too, where a kernel takes it; one that none
takes is told of where relu follows, which is what people look for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from zenith_jax.errors import Refusal, refuse
from zenith_jax.ir import _compat
from zenith_jax.ir._compat import JaxprEqn, Var
from zenith_jax.ir.graph import Atom, Graph
from zenith_jax.ir.term import is_float
from zenith_jax.ops.conv import NO_POOL, Geometry, Pool, conv
from zenith_jax.passes.match import batch_norm
from zenith_jax.passes.match._match import Match
from zenith_jax.passes.match.batch_norm import Scaled
from zenith_jax.passes.match.linear import is_maximum, is_relu

RANK = 4  # images; other ranks are not measured
IMAGES = ((0, 1, 2, 3), (0, 3, 1, 2))  # NCHW and NHWC, as JAX's (batch, channel, *spatial)
FILTERS = ((0, 1, 2, 3), (3, 2, 0, 1))  # OIHW and HWIO, as (out, in, *spatial); those of gradients have others


@dataclasses.dataclass(frozen=True)
class Layer:
    """What has been read so far: `top` is its result."""

    scaled: Scaled
    top: Var
    inner: tuple[JaxprEqn, ...]
    residual: Atom | None = None
    activation: str = "none"
    pool: Pool = NO_POOL

    def above(self, eqn: JaxprEqn, **found: Any) -> Layer:
        return dataclasses.replace(self, top=eqn.outvars[0], inner=(*self.inner, eqn), **found)

    @property
    def parts(self) -> str:
        affine = "batch norm" if self.scaled.is_scaled() else "bias"
        residual, pool = "residual" * (self.residual is not None), "max pool" * (self.pool != NO_POOL)
        names = (affine * bool(self.scaled.steps), residual, self.activation, pool)
        return ", ".join(n for n in names if n and n != "none")


def match(graph: Graph, eqn: JaxprEqn) -> Match | Refusal | None:
    """`eqn` is the convolution. Those in groups are sites of their own."""
    if eqn.primitive.name != "conv_general_dilated" or eqn.params["feature_group_count"] != 1:
        return None
    layers = _layers(graph, eqn)
    if not layers:
        return None
    refusal = _unreadable(eqn)
    if refusal is not None:
        is_told = layers[-1].activation != "none" and batch_norm.match(graph, eqn) is None
        return refusal if is_told else None
    user = graph.only_user([layer for layer in layers if layer.pool == NO_POOL][-1].top)
    in_window = user is not None and _is_tiled(user)
    found: Match | None = None
    for layer in layers:
        if graph.escapes(layer.inner, [layer.top]) is None:
            found = _build(eqn, layer, found, in_window and layer.pool == NO_POOL)
    return found


def _unreadable(eqn: JaxprEqn) -> Refusal | None:
    """Why the op cannot be this convolution."""
    params, (x, w), y = eqn.params, eqn.invars, eqn.outvars[0]
    if params["batch_group_count"] != 1:
        return refuse("the convolution sums over groups of the batch, as filters' gradients do")
    if any(d != 1 for d in params["lhs_dilation"]):
        return refuse("the image is spread out, as in a transposed convolution")
    if x.aval.ndim != RANK:
        return refuse("a convolution has a kernel for images, not for {n} spatial dimensions", n=x.aval.ndim - 2)
    if not x.aval.dtype == w.aval.dtype == y.aval.dtype:
        return refuse("image, filter and result have different dtypes")
    x_spec, w_spec, y_spec = params["dimension_numbers"]
    if tuple(x_spec) not in IMAGES or tuple(y_spec) not in IMAGES or tuple(w_spec) not in FILTERS:
        return refuse("the dimensions are numbered as in no model: channels must be first or last")
    if any(_compat.explicit_sharding(a.aval) is not None for a in (x, w)):
        return refuse("XLA splits the convolution over the devices, as it is written")
    return None


def _layers(graph: Graph, eqn: JaxprEqn) -> list[Layer]:
    """The convolution with ever more of what follows it."""
    if not is_float(eqn.outvars[0].aval.dtype):
        return []
    dtype, of_conv = eqn.outvars[0].aval.dtype, eqn.outvars[0]
    alone = Layer(Scaled((), tuple(eqn.invars), (eqn,), of_conv, 0, 0), of_conv, (eqn,))
    layers = [alone]
    scaled = batch_norm.read(graph, eqn)
    if scaled is not None and scaled.steps and _is_readable(graph, scaled, of_conv):
        layers.append(Layer(scaled, scaled.result, scaled.inner))
    if (user := _user(graph, layers[-1].top, dtype)) is not None and user.primitive.name == "add":
        residual = user.invars[1 if user.invars[0] is layers[-1].top else 0]
        is_array = isinstance(residual, Var) and residual.aval.shape == of_conv.aval.shape
        # XLA reads what is repeated once, and the kernel every element.
        if is_array and not _is_repeated(graph, residual) and not graph.depends_on([residual], of_conv):
            layers.append(layers[-1].above(user, residual=residual))
    if (user := _user(graph, layers[-1].top, dtype)) is not None and (is_relu(user) or is_maximum(graph, user)):
        # They differ in their derivative at 0: that of maximum is 1/2.
        layers.append(layers[-1].above(user, activation="relu" if is_relu(user) else "maximum"))
    pool = _pool(graph, layers[-1].top, eqn.params["dimension_numbers"].out_spec)
    if pool is not None and layers[-1].residual is None:
        layers.append(layers[-1].above(graph.users_of(layers[-1].top)[0], pool=pool))
    return layers


def _is_tiled(eqn: JaxprEqn) -> bool:
    """Whether it reduces windows that lie side by side."""
    params = eqn.params
    return eqn.primitive.name.startswith("reduce_window") and tuple(params["window_dimensions"]) == tuple(
        params["window_strides"]
    )


def _pool(graph: Graph, var: Var, spec: Sequence[int]) -> Pool | None:
    """The windows of an image whose maximum alone uses the value, if they lie side by side from its first pixel on."""
    user = graph.only_user(var)
    if user is None or user.primitive.name != "reduce_window_max" or not _is_tiled(user):
        return None
    params, size = user.params, user.params["window_dimensions"]
    is_dilated = any(d != 1 for d in (*params["base_dilation"], *params["window_dilation"]))
    is_padded = any(low or high for low, high in params["padding"])
    if is_dilated or is_padded:
        return None
    batch, channel, *pool = (size[d] for d in spec)
    return (pool[0], pool[1]) if batch == channel == 1 else None


def _is_readable(graph: Graph, scaled: Scaled, of_conv: Var) -> bool:
    """Whether steps are of the convolution's own shape and dtype, and of nothing that it gives."""
    same = scaled.result.aval.shape == of_conv.aval.shape and scaled.result.aval.dtype == of_conv.aval.dtype
    vectors = scaled.leaves[2:]
    return (
        same
        and all(a.aval.dtype == of_conv.aval.dtype for a in vectors)
        and not any(graph.depends_on([a], of_conv) for a in vectors)
    )


def _user(graph: Graph, var: Var, dtype: Any) -> JaxprEqn | None:
    """What alone uses the value, if that is of its shape and dtype."""
    user = graph.only_user(var)
    if user is None or len(user.outvars) != 1:
        return None
    result = user.outvars[0].aval
    return user if (result.shape, result.dtype) == (var.aval.shape, dtype) else None


def _is_repeated(graph: Graph, residual: Atom) -> bool:
    producer = graph.producer(residual) if isinstance(residual, Var) else None
    return producer is not None and producer.primitive.name == "broadcast_in_dim"


def _build(eqn: JaxprEqn, layer: Layer, simpler: Match | None, in_window: bool) -> Match:
    params = eqn.params
    x_spec, w_spec, y_spec = (tuple(s) for s in params["dimension_numbers"])
    x, w = (a.aval for a in eqn.invars)
    y = eqn.outvars[0].aval
    geometry = Geometry(
        tuple(w.shape[d] for d in w_spec[2:]),
        tuple(params["window_strides"]),
        tuple((low, high) for low, high in params["padding"]),
        tuple(params["rhs_dilation"]),
    )
    optional = () if layer.residual is None else (layer.residual,)
    return Match(
        op="conv",
        root=layer.inner[-1],
        results=(layer.top,),
        inner=layer.inner,
        leaves=(*layer.scaled.leaves, *optional),
        emit=emit,
        static=(
            ("specs", (x_spec, w_spec, y_spec)),
            ("geometry", geometry),
            ("steps", layer.scaled.steps),
            ("is_scaled", layer.scaled.is_scaled()),
            ("has_residual", layer.residual is not None),
            ("activation", layer.activation),
            ("pool", layer.pool),
        ),
        detail=layer.parts,
        case=(
            ("dtype", x.dtype.name),
            ("pixels", y.size // max(1, y.shape[y_spec[1]])),
            ("k", w.size // max(1, w.shape[w_spec[0]])),
            ("n", w.shape[w_spec[0]]),
            ("parts", layer.parts),
            ("in_window", in_window),
            ("pool", layer.pool),
        ),
        simpler=simpler,
        yields=True,
        unmentioned=layer.activation == "none" or layer.scaled.is_scaled(),
    )


def _last(spec: tuple[int, ...]) -> tuple[int, ...]:
    """(batch, channel, *spatial) -> (batch, *spatial, channel)."""
    return (spec[0], *spec[2:], spec[1])


def emit(x, w, *more, specs: tuple, geometry: Geometry, steps: tuple, is_scaled: bool, has_residual: bool,
         activation: str, pool: Pool):  # fmt: skip
    x_spec, w_spec, y_spec = specs
    vectors, residual = (more[:-1], more[-1]) if has_residual else (more, None)
    scale = bias = None
    if steps:
        scale, bias = batch_norm.coefficients(steps, (x, w, *vectors), w.shape[w_spec[0]], x.dtype)
    order = _last(y_spec)
    y = conv(
        jnp.transpose(x, _last(x_spec)),
        jnp.transpose(w, (*w_spec[2:], w_spec[1], w_spec[0])),
        bias,
        None if residual is None else jnp.transpose(residual, order),
        scale=scale if is_scaled else None,
        strides=geometry.strides,
        padding=geometry.padding,
        dilation=geometry.dilation,
        activation=activation,
        pool=pool,
    )
    return (jnp.transpose(y, [order.index(d) for d in range(y.ndim)]),)
