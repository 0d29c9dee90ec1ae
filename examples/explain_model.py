"""What zenith.explain says about a model that can be fused, and about three that nearly can.

python examples/explain_model.py
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from rich.console import Console

import zenith_jax as zenith


class Block(nnx.Module):
    """A transformer block that returns its attention weights when asked to."""

    def __init__(self, features: int, heads: int, rngs: nnx.Rngs):
        self.heads = heads
        self.norm = nnx.LayerNorm(features, rngs=rngs)
        self.qkv = nnx.Linear(features, 3 * features, rngs=rngs)
        self.out = nnx.Linear(features, features, rngs=rngs)

    def __call__(self, x: jax.Array, *, with_weights: bool = False):
        b, t, d = x.shape
        q, k, v = jnp.split(self.qkv(self.norm(x)).reshape(b, t, self.heads, -1), 3, axis=-1)
        logits = jnp.einsum("bthd,bshd->bhts", q, k) / (d // self.heads) ** 0.5
        weights = jax.nn.softmax(jnp.where(jnp.tri(t, dtype=bool), logits, -jnp.inf))
        y = x + self.out(jnp.einsum("bhts,bshd->bthd", weights, v).reshape(b, t, d))
        return (y, weights) if with_weights else y


def sample_norm(x: jax.Array) -> jax.Array:
    """Divides by the deviation with N - 1, which is not what layer_norm does."""
    return (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True, ddof=1) + 1e-5)


def attention_with_dropout(q: jax.Array, k: jax.Array, v: jax.Array, keep: jax.Array) -> jax.Array:
    weights = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k))
    return jnp.einsum("bhts,bshd->bthd", weights * keep, v)


def main() -> None:
    console = Console()
    block = Block(256, 4, nnx.Rngs(0))
    x = jnp.ones((2, 128, 256))
    heads = jnp.ones((2, 128, 4, 64))
    keep = jnp.ones((2, 4, 128, 128))

    console.print("[bold]a block[/]: all of its sites are fused", zenith.explain(block)(x))
    console.print(
        "[bold]the same, with its weights returned[/]: a kernel that never holds them can not return them",
        zenith.explain(lambda x: block(x, with_weights=True))(x),
    )
    console.print("[bold]a variance over N - 1[/]: another function", zenith.explain(sample_norm)(x))
    console.print("[bold]dropout[/]", zenith.explain(attention_with_dropout)(heads, heads, heads, keep))


if __name__ == "__main__":
    main()
