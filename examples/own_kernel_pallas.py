"""A Pallas kernel of one's own, put into a model that knows nothing of it.

python examples/own_kernel_pallas.py

The kernel computes RMS-normalised, gated rows: one pass over x where XLA makes a reduction and a loop. On the CPU it
runs in Pallas' interpret mode, which is slow and right; on a GPU the same call is compiled.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import pallas as pl

import zenith_jax as zenith


def gated_norm(x: jax.Array, gate: jax.Array, scale: jax.Array, *, eps: float) -> jax.Array:
    """What the kernel computes, in plain jnp: the pattern, the oracle, and the source of derivatives."""
    rrms = jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)
    return x * rrms * scale * jnp.tanh(gate)


def gated_norm_pallas(x: jax.Array, gate: jax.Array, scale: jax.Array, *, eps: float) -> jax.Array:
    """One program a row: reads x and gate once, writes the result once."""
    features = x.shape[-1]
    rows = x.size // features

    def row(x_ref, gate_ref, scale_ref, out_ref):
        x = x_ref[...]
        rrms = jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) / features + eps)
        out_ref[...] = x * rrms * scale_ref[...] * jnp.tanh(gate_ref[...])

    one_row = pl.BlockSpec((1, features), lambda i: (i, 0))
    call = pl.pallas_call(
        row,
        grid=(rows,),
        in_specs=[one_row, one_row, pl.BlockSpec((1, features), lambda i: (0, 0))],
        out_specs=one_row,
        out_shape=jax.ShapeDtypeStruct((rows, features), x.dtype),
        interpret=jax.default_backend() == "cpu",
    )
    return call(x.reshape(rows, features), gate.reshape(rows, features), scale[None]).reshape(x.shape)


def float32_only(x, gate, scale, *, eps):
    """Why the kernel does not take these arguments, or None: the reason goes into the report."""
    del gate, scale, eps
    return None if x.dtype == jnp.float32 else f"the kernel is written for float32, not {x.dtype}"


class Block(nnx.Module):
    """Somebody else's model: another spelling of the same computation, with axes in another order."""

    def __init__(self, features: int, rngs: nnx.Rngs):
        self.into_gate = nnx.Linear(features, features, rngs=rngs)
        self.scale = nnx.Param(jnp.linspace(0.5, 1.5, features))

    def __call__(self, x: jax.Array) -> jax.Array:
        mean_square = jnp.mean(jnp.square(x), axis=-1)
        normed = self.scale[...] * (x / jnp.sqrt(mean_square + 1e-5)[..., None])
        return x + jnp.tanh(self.into_gate(x)) * normed


def main() -> None:
    block = Block(32, nnx.Rngs(0))
    x = jnp.sin(jnp.arange(2 * 6 * 32, dtype=jnp.float32)).reshape(2, 6, 32)

    zenith.register(gated_norm, gated_norm_pallas, "*b d, *b d, d", attributes={"eps": 1e-6}, supports=float32_only)

    print(zenith.explain(block)(x))
    print(zenith.verify(block)(x).check())
    gradient = jax.grad(lambda x: jnp.sum(block(x) ** 2))
    error = jnp.max(jnp.abs(zenith.jit(gradient)(x) - gradient(x)))
    print(f"gradient, fused against plain: largest difference {error:.1e}")
    print(zenith.explain(block)(x.astype(jnp.bfloat16)))


if __name__ == "__main__":
    main()
