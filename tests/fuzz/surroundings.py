"""What stands around the patterns: elementwise operations, layout, casts, products; control flow and derivatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.ad_checkpoint
import jax.numpy as jnp
from fuzz.attention import attention, flash_like, jax_nn
from fuzz.convolution import convolution
from fuzz.images import image_layer
from fuzz.pages import paged_attention
from fuzz.quantized import quantized_product
from fuzz.rotation import rotation
from fuzz.rows import activation, norm, softmax
from fuzz.script import Script, Want
from jax import lax

# --- straight lines ---------------------------------------------------------------------------------------------------


def elementwise(script: Script, x: Any) -> tuple[Any, list[Any]]:
    y = script.pick(
        "elementwise",
        lambda: jnp.sin(x),
        lambda: x * 0.5,
        lambda: x + 1,
        lambda: x * 1.0 + 0.0,
        lambda: jnp.tanh(x),
        lambda: x * x,
        lambda: -x,
        lambda: jnp.exp(-(x * x)),
        lambda: x / 3,
        lambda: x * script.array("scale", x.shape[-1:], x.dtype),
        lambda: x + script.array("normal", x.shape[-1:], x.dtype),
        lambda: x + script.array("normal", x.shape, x.dtype),
        lambda: x - jnp.mean(x, -1, keepdims=True),
        lambda: x / (1 + jnp.max(jnp.abs(x))),
        lambda: jnp.where(script.array("mask", x.shape), x, 0),
        lambda: lax.stop_gradient(x),
        lambda: jnp.log1p(jnp.square(x)),
        lambda: jax.nn.logsumexp(x, axis=-1, keepdims=True) + x,
        lambda: jnp.cumsum(x, -1) * 0.5,
    )()
    return y, []


def layout(script: Script, x: Any) -> tuple[Any, list[Any]]:
    y = script.pick(
        "layout",
        lambda: jnp.swapaxes(x, -1, -2),
        lambda: x.reshape(-1, x.shape[-1]),
        lambda: x[None],
        lambda: jnp.flip(x, -1),
        lambda: jnp.roll(x, 1, 0),
        lambda: jnp.concatenate([x, x], -2)[..., : x.shape[-2], :],
        lambda: jnp.concatenate([x, x * 2], -1),
        lambda: x[..., 1:, :] if x.shape[-2] > 2 else x,
        lambda: jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, 1)]),
        lambda: jnp.transpose(x, script.pick("to", *_orders(x.ndim))),
        lambda: x.reshape(*x.shape[:-2], x.shape[-1], x.shape[-2]),
        lambda: jnp.broadcast_to(x[..., :1, :], x.shape),
        lambda: jnp.take(x, jnp.arange(x.shape[-2])[::-1], axis=-2),
        lambda: sum(jnp.split(x, [x.shape[-1] // 2], -1)[0:1]),
    )()
    return (y if 2 <= y.ndim <= 4 and y.size <= 400 and y.shape[-1] else x), []


def _orders(rank: int) -> list[tuple[int, ...]]:
    return [tuple((i + k) % rank for i in range(rank)) for k in range(rank)]


def product(script: Script, x: Any) -> tuple[Any, list[Any]]:
    width = script.pick("width", x.shape[-1], 6, 3)
    if script.pick("of integers", False, True):
        y = quantized_product(script, x, width)
    else:
        w = script.array("weight", (x.shape[-1], width), x.dtype)
        y = script.pick(
            "product", lambda: x @ w, lambda: jnp.einsum("...i,io->...o", x, w), lambda: x @ w.reshape(w.shape)
        )()
    if script.pick("bias", True, False):
        y = y + script.array("normal", (width,), x.dtype)
    return y, []


def cast(script: Script, x: Any) -> tuple[Any, list[Any]]:
    return x.astype(script.pick("to", jnp.float32, jnp.bfloat16, jnp.float16)), []


# --- control flow and derivatives -------------------------------------------------------------------------------------


def block(script: Script, x: Any, depth: int) -> tuple[Any, list[Any]]:
    """One part of a program: (y, inner values). depth: how much control flow may still be nested in it."""
    options = [norm, attention, activation, convolution, softmax, elementwise, norm, attention, activation, product]
    options += [rotation, image_layer, paged_attention]
    options += [layout, cast, jax_nn]
    options += [residual, flash_like]
    if depth:
        options += [scanned, branched, rematerialised, mapped, jitted, custom, repeated, shared]
        if not script.poisoned:  # what a derivative holds beside a NaN or an infinity depends on how it is written
            options.append(differentiated)
    chosen = script.pick("block", *options)
    if chosen in CONTROL:
        return chosen(script, x, depth - 1)
    return chosen(script, x)


def residual(script: Script, x: Any) -> tuple[Any, list[Any]]:
    y, taps = script.pick("residual of", norm, attention, activation)(script, x)
    return (x + y if y.shape == x.shape else y), taps


def _inside(script: Script, depth: int, keeps_type: bool) -> tuple[Callable, Callable]:
    """(part, body): body(script of the part, x) -> y, of x's shape and dtype if it must be."""
    count = script.pick("inside", 1, 2)

    def body(inner: Script, x: Any) -> Any:
        y = x
        for _ in range(count):
            y, _ = block(inner, y, depth)
        if keeps_type:
            y = (y if y.shape == x.shape else x + jnp.mean(y).astype(x.dtype)).astype(x.dtype)
        return y

    return script.part(), body


def scanned(script: Script, x: Any, depth: int) -> tuple[Any, list[Any]]:
    """Layers with parameters of their own, or shared ones."""
    part, body = _inside(script, depth, True)
    length, remat = script.pick("layers", 2, 3), script.pick("remat", False, True)
    wants = script.wanted(part, body, x)
    stacked = [script.array(w.kind, (length, *w.shape), w.dtype) for w in wants]

    def layer(carry: Any, arrays: Any) -> tuple[Any, Any]:
        given = iter(arrays)
        y = body(part(lambda want: next(given)), carry)
        return y, jnp.sum(y)

    layer = jax.checkpoint(layer) if remat else layer
    y, sums = lax.scan(layer, x, stacked, length=length, reverse=script.pick("reverse", False, True))
    return y, [sums]


def _closed(script: Script, part: Callable, body: Callable, x: Any) -> Callable:
    """The body as a function of x, its parameters asked for already."""
    arrays = [script.supply(want) for want in script.wanted(part, body, x)]

    def function(x: Any) -> Any:
        given = iter(arrays)
        return body(part(lambda want: next(given)), x)

    return function


def branched(script: Script, x: Any, depth: int) -> tuple[Any, list[Any]]:
    part, body = _inside(script, depth, True)
    function = _closed(script, part, body, x)
    return lax.cond(jnp.sum(script.array("normal", ())) > -0.5, function, lambda x: x * 2, x), []


def rematerialised(script: Script, x: Any, depth: int) -> tuple[Any, list[Any]]:
    part, body = _inside(script, depth, False)
    policies = jax.checkpoint_policies
    policy = script.pick(
        "policy", None, policies.dots_saveable, policies.dots_with_no_batch_dims_saveable, policies.everything_saveable
    )
    return jax.checkpoint(_closed(script, part, body, x), policy=policy)(x), []


def mapped(script: Script, x: Any, depth: int) -> tuple[Any, list[Any]]:
    """vmap over one axis, with parameters in common or one for each."""
    if x.ndim < 3:
        return jitted(script, x, depth)
    part, body = _inside(script, depth, False)
    axis = script.pick("over", 0, 1, x.ndim - 1)
    one = jax.ShapeDtypeStruct([n for d, n in enumerate(x.shape) if d != axis % x.ndim], x.dtype)
    shared = script.pick("parameters", True, False)
    size = x.shape[axis]
    wants = script.wanted(part, body, one)
    arrays = [script.supply(w if shared else Want(w.kind, (size, *w.shape), w.dtype)) for w in wants]

    def function(x: Any, arrays: Any) -> Any:
        given = iter(arrays)
        return body(part(lambda want: next(given)), x)

    y = jax.vmap(function, (axis, None if shared else 0), script.pick("out axis", 0, 1))(x, arrays)
    return y, []


def jitted(script: Script, x: Any, depth: int) -> tuple[Any, list[Any]]:
    part, body = _inside(script, depth, False)
    function = jax.jit(_closed(script, part, body, x))
    y = function(x)
    return (y + function(x * 2) if script.one_in(4, "called twice") else y), []


def custom(script: Script, x: Any, depth: int) -> tuple[Any, list[Any]]:
    """A user's own derivative rule around a part: of half the slope, so that it is seen whose rule runs."""
    part, body = _inside(script, depth, False)
    arrays = [script.supply(want) for want in script.wanted(part, body, x)]

    def function(x: Any, arrays: Any) -> Any:
        given = iter(arrays)
        return body(part(lambda want: next(given)), x)

    if script.pick("rule", "vjp", "jvp") == "vjp":
        ruled = jax.custom_vjp(function)

        def forward(x: Any, arrays: Any) -> Any:
            y, pull = jax.vjp(lambda x: function(x, arrays), x)
            return y, (pull, arrays)

        def backward(residuals: Any, dy: Any) -> Any:
            pull, arrays = residuals
            return pull(dy * 0.5)[0], jax.tree.map(_zero_tangent, arrays)

        ruled.defvjp(forward, backward)
        return ruled(x, arrays), []
    ruled = jax.custom_jvp(function)

    @ruled.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        x, arrays = primals
        y, dy = jax.jvp(lambda x: function(x, arrays), (x,), (tangents[0],))
        return y, dy * 0.5

    return ruled(x, arrays), []


def _zero_tangent(x: Any) -> Any:
    return jnp.zeros_like(x) if jnp.issubdtype(x.dtype, jnp.floating) else jnp.zeros(x.shape, jax.dtypes.float0)


def differentiated(script: Script, x: Any, depth: int) -> tuple[Any, list[Any]]:
    """A derivative inside of the program: of second order where the program itself is differentiated."""
    part, body = _inside(script, 0, False)
    function = _closed(script, part, body, x)

    def loss(x: Any) -> Any:
        y = function(x).astype(jnp.float32)
        return jnp.sum(y * jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape))

    def pulled(x: Any) -> Any:
        y, pull = jax.vjp(function, x)
        return x + pull(y)[0]

    return script.pick(
        "derivative",
        lambda: x - 0.1 * jax.grad(loss)(x),
        lambda: sum(jax.jvp(function, (x,), (jnp.ones_like(x),))),
        lambda: pulled(x),
        lambda: jax.linearize(function, x)[1](jnp.ones_like(x)),
    )(), []


def repeated(script: Script, x: Any, depth: int) -> tuple[Any, list[Any]]:
    """fori_loop: a scan, where the bounds are known."""
    part, body = _inside(script, depth, True)
    function = _closed(script, part, body, x)
    return lax.fori_loop(0, 2, lambda i, y: function(y), x), []


def shared(script: Script, x: Any, depth: int) -> tuple[Any, list[Any]]:
    """One value computed twice, by two traces of the same code."""
    part, body = _inside(script, depth, True)
    function = _closed(script, part, body, x)
    return function(x) + 0.5 * script.pick("again", lambda: function(x), lambda: function(x + 1), lambda: x)(), []


CONTROL = {scanned, branched, rematerialised, mapped, jitted, custom, differentiated, repeated, shared}
