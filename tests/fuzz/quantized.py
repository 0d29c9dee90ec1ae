"""Products with integer weights and their scales, and what is nearly one."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from fuzz.script import Script


def quantized_product(script: Script, x: Any, width: int) -> Any:
    """x @ (w * scale) in the spellings that people use; scales of groups, where two divide x's features."""
    k, kind = x.shape[-1], script.pick("integers", "int8", "int4")
    w = script.array("integer", (k, width), kind)
    groups = script.pick("groups", 1, 2) if k % 2 == 0 else 1
    scale = 0.1 * script.array("scale", (groups, width), script.pick("scale's dtype", jnp.float32, x.dtype))
    widened = script.pick("widened", lambda: w.astype(x.dtype), lambda: w.astype(jnp.int32).astype(jnp.float32))()

    def by_group(wide: Any, parts: tuple[int, int], scales: Any) -> Any:
        return (wide.reshape(*parts, width) * scales).reshape(k, width)

    right = [
        lambda: x @ by_group(widened, (groups, k // groups), scale[:, None]).astype(x.dtype),
        lambda: x @ (widened * jnp.repeat(scale, k // groups, 0)).astype(x.dtype),
        lambda: jnp.einsum("...k,nk->...n", x, (widened.T * jnp.repeat(scale, k // groups, 0).T).astype(x.dtype)),
    ]
    if groups == 1:
        right += [
            lambda: ((x @ widened.astype(x.dtype)) * scale[0]).astype(x.dtype),
            lambda: (x @ w.astype(jnp.int8)) * scale[0],
        ]
    wrong = [
        lambda: x @ by_group(widened, (k // groups, groups), scale).astype(x.dtype),  # the groups interleave
        lambda: x @ ((widened - 3) * jnp.repeat(scale, k // groups, 0)).astype(x.dtype),
        lambda: (x @ (w + w).astype(x.dtype)) * scale[0].astype(x.dtype),  # wraps
        lambda: x @ (widened * jnp.flip(jnp.repeat(scale, k // groups, 0), 0)).astype(x.dtype),
        lambda: (x @ widened.astype(x.dtype) + 1) * scale[0].astype(x.dtype),
    ]
    return script.spell("quantised", right, wrong)().astype(x.dtype)
