"""Cross entropy where its logits are what masks are filled with."""

import jax.numpy as jnp
import numpy as np
import pytest

from zenith_jax import ops


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("rows, columns", [(4, 3), (4, 64), (4, 1000), (600, 1024)])  # Hopper has a kernel for the last
def test_fills_of_masks_are_numbers(dtype, rows, columns):
    """A row of nothing else is uniform, if float32 has digits left for it; beside a number a fill has no weight."""
    low, high = float(jnp.finfo(dtype).min), float(jnp.finfo(dtype).max)
    logits = np.full((rows, columns), low)
    logits[1], logits[2, 1], logits[3, 1] = high, 0.5, high
    loss = np.asarray(ops.cross_entropy(jnp.asarray(logits, dtype), jnp.full(rows, 1)), np.float32)[:4]
    np.testing.assert_allclose(loss[2:], 0, atol=1e-6)
    np.testing.assert_allclose(loss[:2], np.log(columns) if dtype == "float16" else 0, atol=0.008)  # an ulp of 65504
