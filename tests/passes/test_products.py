"""Products by weights on a GPU: those of one input become one, float32 weights lie (n, k), all of it split off."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zenith_jax as zenith
from zenith_jax import native
from zenith_jax.passes import known, products
from zenith_jax.passes.products import with_fast_products

RNG = np.random.default_rng(0)


def array(*shape, dtype=jnp.float32):
    return jnp.asarray(RNG.normal(size=shape), dtype)


def dots(jaxpr):
    return [e for e in jaxpr.jaxpr.eqns if e.primitive.name == "dot_general"]


def changed(function, params, x, platform="cuda"):
    """The jaxpr as it was and as it is, after its answers were found to be the same."""
    before = jax.jit(function).trace(params, x).jaxpr
    after = with_fast_products(before, len(params), platform)
    evaluated = [jax.core.eval_jaxpr(j.jaxpr, j.consts, *params, x) for j in (before, after)]
    for a, b in zip(*evaluated, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        np.testing.assert_allclose(
            np.float32(a), np.float32(b), rtol=1e-5, atol=1e-5
        )  # one order of summation or other
    return before, after


def made(jaxpr, params):
    """Shapes of what is computed from the parameters alone."""
    split = known.split(jaxpr, len(params), "cuda")
    return [] if split is None else [tuple(v.shape) for v in split.prepare(*params)]


def three(params, x):
    return [x @ w for w in params]


@pytest.mark.parametrize("rows", [1, 8, 600])
def test_products_of_one_input_are_one(rows):
    params = [array(16, n) for n in (16, 4, 8)]
    before, after = changed(three, params, array(rows, 16))
    assert (len(dots(before)), len(dots(after))) == (3, 1)
    assert made(after, params) == [(28, 16)]  # (n, k)


def test_narrow_weights_keep_their_order():
    params = [array(16, n, dtype=jnp.bfloat16) for n in (16, 8)]
    _, after = changed(three, params, array(4, 16, dtype=jnp.bfloat16))
    assert made(after, params) == [(16, 24)]
    params = [w.T for w in params]
    _, after = changed(lambda p, x: [x @ w.T for w in p], params, array(4, 16, dtype=jnp.bfloat16))
    assert made(after, params) == [(24, 16)]


def test_heads_are_features():
    params = [array(16, 2, 4), array(16, 3, 4)]
    _, after = changed(lambda p, x: [jnp.einsum("btc,chd->bthd", x, w) for w in p], params, array(2, 5, 16))
    assert len(dots(after)) == 1 and made(after, params) == [(20, 16)]


def test_a_single_product_of_many_rows_has_its_weights_by_rows():
    params = [array(16, 8)]
    _, after = changed(three, params, array(512, 16))
    assert made(after, params) == [(8, 16)]
    _, after = changed(three, params, array(511, 16))
    assert made(after, params) == []


def test_weights_that_lie_so_are_not_copied():
    params = [array(8, 16)]
    before, after = changed(lambda p, x: x @ p[0].T, params, array(512, 16))
    assert after is before and made(after, params) == []


def test_another_algorithm_keeps_the_order():
    def exact(params, x):
        return jnp.dot(x, params[0], precision="highest")

    params = [array(16, 8)]
    before, after = changed(exact, params, array(512, 16))
    assert after is before


def unlike(params, x):
    return x @ params[0], jnp.dot(x, params[1], precision="highest")


def of_another_input(params, x):
    return x @ params[0], (x + 1) @ params[1]


def of_no_parameter(params, x):
    return x @ params[0], x @ (params[1] * x[0, 0])


def twice(params, x):
    return x @ params[0], x @ params[0]


def batched(params, x):
    w = jnp.stack([params[0], params[1]])
    return jnp.einsum("btc,bcd->btd", jnp.stack([x, x]), w)


def on_the_left(params, x):
    return params[0].T @ x.T, params[1].T @ x.T


@pytest.mark.parametrize("function", [unlike, of_another_input, of_no_parameter, twice, batched, on_the_left])
def test_other_products_stay(function):
    before, after = changed(function, [array(16, 8), array(16, 8)], array(4, 16))
    assert after is before


def test_large_products_stay(monkeypatch):
    monkeypatch.setattr(products, "_MERGED_BYTES", 4 * (4 * 16 + 16 * 8 + 4 * 8) - 1)
    before, after = changed(three, [array(16, 8), array(16, 8)], array(4, 16))
    assert after is before


def test_a_share_of_the_memory_is_not_exceeded(monkeypatch, caplog):
    params = [array(16, 8), array(16, 8)]
    monkeypatch.setattr(native, "memory_bytes", lambda _: 8 * 4 * 2 * 16 * 8 - 1)
    with caplog.at_level(logging.INFO, "zenith_jax"):
        before, after = changed(three, params, array(4, 16))
    assert after is before and "weights stay as they lie" in caplog.text
    monkeypatch.setattr(native, "memory_bytes", lambda _: 8 * 4 * 2 * 16 * 8)
    assert changed(three, params, array(4, 16))[1] is not before


def test_weights_that_layers_share_count_once(monkeypatch):
    def layers(params, x):
        for _ in range(4):
            x = sum(x @ w for w in params)
        return x

    params = [array(16, 16) / 4 for _ in range(3)]
    monkeypatch.setattr(native, "memory_bytes", lambda _: 8 * 4 * 3 * 16 * 16)
    before, after = changed(layers, params, array(4, 16))
    assert (len(dots(before)), len(dots(after))) == (12, 4)


def test_weights_that_are_widened_stay_narrow():
    params = [jnp.asarray(RNG.integers(-9, 9, (128, 64)), jnp.int8) for _ in range(3)]  # more than 4 KB widened
    before, after = changed(lambda p, x: [x @ (w.astype(jnp.float32) * 0.5) for w in p], params, array(600, 128))
    assert after is before and made(after, params) == []


def test_a_transpose_that_is_multiplied_from_the_left_is_not_copied():
    params = [array(64, 32)]
    before, after = changed(lambda p, x: p[0].T @ x, params, array(64, 600))
    assert after is before and made(after, params) == []


def test_a_cpu_reads_them_otherwise():
    before, after = changed(three, [array(16, 8), array(16, 8)], array(4, 16), platform="cpu")
    assert after is before


def test_results_that_are_read_before_the_last_product():
    def chained(params, x):
        first = x @ params[0]
        return first, x @ params[1] + first, (x @ params[2]) * first.sum()

    params = [array(16, 8) for _ in range(3)]
    _, after = changed(chained, params, array(4, 16))
    assert len(dots(after)) == 1


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="JAX has no NVIDIA GPU")
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_projections_of_one_input_are_one_product_on_a_gpu(mode):
    def projected(params, x):
        return [x @ w for w in params]

    params, x = [array(256, n) / 16 for n in (256, 128)], array(600, 256)
    model = zenith.compile((projected, params), x, mode=mode)
    assert [v.shape for v in model.folded.values()] == [(384, 256)]
    for result, w in zip(model(x), params, strict=True):
        want = np.float64(x) @ np.float64(w)
        np.testing.assert_allclose(result, want, atol=4e-3)  # TensorFloat-32: 2^-11 of each of 256 terms of size 1/16
