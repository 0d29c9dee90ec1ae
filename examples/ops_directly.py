"""The kernels as JAX functions, without any pattern matching: grad, vmap, jvp and jit work on them.

python examples/ops_directly.py
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from zenith_jax import ops
from zenith_jax.errors import ShapeError


def main() -> None:
    q, k, v = (jax.random.normal(jax.random.key(i), (2, 256, heads, 64)) for i, heads in enumerate((8, 2, 2)))

    # Grouped-query attention: 8 query heads read 2 key/value heads; causal, with a window of 64 earlier positions.
    out = ops.attention(q, k, v, is_causal=True, local_window_size=(64, 0))
    print("attention", out.shape)

    gradient = jax.grad(lambda q: ops.attention(q, k, v, is_causal=True).sum())(q)
    print("its gradient in query", gradient.shape)

    _, tangent = jax.jvp(lambda q: ops.attention(q, k, v), (q,), (jnp.ones_like(q),))
    print("its derivative along a direction", tangent.shape)

    # A residual stream: the sum and its norm in one pass over memory.
    x, update, scale = jnp.ones((4, 128, 512)), jnp.ones((4, 128, 512)), jnp.ones(512)
    y, total = ops.add_rms_norm(x, update, scale)
    print("add_rms_norm", y.shape, total.shape)

    per_example = jax.vmap(jax.grad(lambda x: ops.layer_norm(x, scale).sum()))(x)
    print("layer_norm's gradient for each example", per_example.shape)

    print("gelu", float(ops.gelu(jnp.float32(1.0), approximate=False)), "silu", float(ops.silu(jnp.float32(1.0))))

    try:
        ops.attention(q, k.swapaxes(1, 2), v)
    except ShapeError as error:
        print("a wrong call says what is wrong:", error)


if __name__ == "__main__":
    main()
