"""Norms of many rows, whose gradients of scale and bias are summed by groups, and of rows that several blocks share."""

import formulas
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numerics import assert_error_ratio, in_float64

from zenith_jax import ops
from zenith_jax.ops import norm

NORMS = {
    "layer_norm": (ops.layer_norm, formulas.layer_norm, 1, 2),
    "rms_norm": (ops.rms_norm, formulas.rms_norm, 1, 1),
    "add_layer_norm": (ops.add_layer_norm, formulas.add_layer_norm, 2, 2),
    "add_rms_norm": (ops.add_rms_norm, formulas.add_rms_norm, 2, 1),
}


def check(name, rows, columns, dtype):
    """Values and gradients in all arguments."""
    op, formula, arrays, parameters = NORMS[name]
    key = iter(jax.random.split(jax.random.key(rows), 6))
    arguments = [jax.random.normal(next(key), (rows, columns), dtype) + 1 for _ in range(arrays)]
    arguments += [jax.random.normal(next(key), (columns,), dtype) + 1 for _ in range(parameters)]
    weight = jax.random.normal(next(key), (rows, columns), dtype)

    def value_and_gradients(function):
        def of(weight, *arguments):
            loss = lambda *xs: sum(jnp.sum(y * weight, dtype=jnp.float32) for y in jax.tree.leaves(function(*xs)))  # noqa: E731
            return function(*arguments), jax.grad(loss, tuple(range(len(arguments))))(*arguments)

        return of

    given = (weight, *arguments)
    assert_error_ratio(
        jax.jit(value_and_gradients(op))(*given),
        jax.jit(value_and_gradients(formula))(*given),
        in_float64(value_and_gradients(formula))(*given),
        floor_ulps=2,
    )


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("rows", [1, 2, 7, 1031])  # with 1031, a prime number, no groups are as long as each other
def test_any_number_of_rows(name, rows):
    check(name, rows, 24, jnp.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(
    "rows, columns", [(257, 16384), (61, 24576), (131, 32768), (67, 65528), (2, 65536), (1, 20480)]
)
def test_rows_of_clusters(name, rows, columns, dtype):
    check(name, rows, columns, jnp.dtype(dtype))


def test_partial_sums_are_few_beside_the_rows():
    """Two of float32 a group of at least four rows, and a group is a block's or a cluster's."""
    for row_bytes in (4, 2048, 2049, 16384, 16385, 1 << 17, (1 << 17) + 2):
        assert 28 <= norm._groups(row_bytes) <= 512


@pytest.mark.parametrize("batch, kept, partitions, want", [
    ((6, 4), 0, 1, (1, 1, 24)), ((2, 6, 4), 1, 1, (2, 1, 1, 24)), ((6, 4), 0, 8, (6, 4, 1)), ((6, 9), 0, 6, (6, 3, 3)),
    ((6, 0), 0, 2, (6, 2, 0)),
])  # fmt: skip
def test_runs_of_rows_stay_on_a_device(batch, kept, partitions, want):
    runs = norm.row_batch(batch, kept, partitions)
    assert runs == want
    assert np.prod(runs) == np.prod(batch)
