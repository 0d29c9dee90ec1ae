"""Cross entropy where its logits are what masks are filled with."""

import jax.numpy as jnp
import numpy as np
import pytest

from zenith_jax import ops


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("columns", [3, 64, 1000])
def test_fills_of_masks_are_numbers(dtype, columns):
    """A row of nothing else is uniform, if float32 has digits left for it; beside a number a fill has no weight."""
    low, high = float(jnp.finfo(dtype).min), float(jnp.finfo(dtype).max)
    rows = np.full((4, columns), low)
    rows[1], rows[2, 1], rows[3, 1] = high, 0.5, high
    loss = np.asarray(ops.cross_entropy(jnp.asarray(rows, dtype), jnp.full(4, 1)), np.float32)
    np.testing.assert_allclose(loss[2:], 0, atol=1e-6)
    np.testing.assert_allclose(loss[:2], np.log(columns) if dtype == "float16" else 0, atol=0.008)  # an ulp of 65504
