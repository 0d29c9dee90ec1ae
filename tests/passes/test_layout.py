"""On a CPU convolutions and windows are computed with channels last, in every numbering of dimensions."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from numerics import assert_error_ratio, in_float64

import zenith_jax as zenith

pytestmark = pytest.mark.usefixtures("without_conv")


def normal(rng, *shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


def primitives(function, *args):
    return [e.primitive.name for e in jax.make_jaxpr(zenith.fuse(function))(*args).eqns]


def check(function, *args, changed=True):
    """The value, and whether the program is another than the one that was written."""
    assert (primitives(function, *args) != [e.primitive.name for e in jax.make_jaxpr(function)(*args).eqns]) == changed
    plain = jax.jit(function)(*args)
    fused = jax.jit(zenith.fuse(function))(*args)
    assert (fused.shape, fused.dtype) == (plain.shape, plain.dtype)
    assert_error_ratio(fused, plain, in_float64(function)(*args), floor_ulps=64)


@pytest.mark.parametrize("kernel", [(3, 2), (1, 1)], ids=str)
@pytest.mark.parametrize("spec", ["NCHW OIHW NCHW", "NHWC HWIO NHWC", "NHWC OIHW NCHW", "CWNH WHOI HCWN"])
def test_every_layout(rng, spec, kernel):
    x_spec, w_spec, _ = numbers = tuple(spec.split())
    sizes, filters = dict(N=2, C=3, H=6, W=5), dict(O=4, I=3, H=kernel[0], W=kernel[1])
    x, w = normal(rng, *(sizes[c] for c in x_spec)), normal(rng, *(filters[c] for c in w_spec))
    padding = ((0, 1), (2, 0)) if kernel != (1, 1) else "VALID"
    function = lambda x, w: lax.conv_general_dilated(x, w, (2, 1), padding, dimension_numbers=numbers)  # noqa: E731
    is_unusual = spec.startswith("CWNH")
    check(function, x, w, changed=not is_unusual and (spec != "NHWC HWIO NHWC" or kernel == (1, 1)))


@pytest.mark.parametrize(
    "options",
    [
        dict(padding=((1, 1), (1, 1))),
        dict(padding=((2, 0), (0, 3)), window_strides=(2, 1)),
        dict(padding="VALID", rhs_dilation=(2, 1), window_strides=(1, 3), precision="highest"),
    ],
    ids=str,
)
def test_filters_of_many_terms_are_products_of_shifted_images(rng, options):
    x, w = normal(rng, 2, 512, 6, 5), normal(rng, 8, 512, 3, 3)
    function = lambda x, w: lax.conv_general_dilated(x, w, **{"window_strides": (1, 1), **options})  # noqa: E731
    assert "dot_general" in primitives(function, x, w)
    check(function, x, w)


def pooled(reducer, initial, **options):
    def function(x, w):
        y = lax.conv(x, w, (1, 1), "SAME")
        return lax.reduce_window(y, initial, reducer, (1, 1, 3, 2), (1, 1, 2, 1), **options)

    return function


@pytest.mark.parametrize(
    "function",
    [
        pooled(lax.max, -jnp.inf, padding="VALID"),
        pooled(lax.add, 0.0, padding=((0, 0), (0, 0), (1, 0), (0, 1)), window_dilation=(1, 1, 2, 1)),
        pooled(lax.min, jnp.inf, padding="SAME"),
    ],
)
def test_windows(rng, function):
    x, w = normal(rng, 2, 3, 8, 7), normal(rng, 4, 3, 3, 3)
    assert primitives(function, x, w).count("transpose") == 5, "three around the convolution, two around the windows"
    check(function, x, w)


@pytest.mark.parametrize(
    ("options", "x", "w"),
    [
        (dict(lhs_dilation=(2, 1)), (2, 4, 6, 6), (4, 4, 3, 3)),  # a transposed convolution
        (dict(batch_group_count=2), (4, 4, 6, 6), (4, 4, 3, 3)),  # a filter's gradient
        (dict(feature_group_count=2), (2, 64, 6, 6), (4, 32, 3, 3)),
    ],
    ids=str,
)
def test_other_convolutions_stay(rng, options, x, w):
    function = lambda x, w: lax.conv_general_dilated(x, w, (1, 1), [(1, 1)] * 2, **options)  # noqa: E731
    check(function, normal(rng, *x), normal(rng, *w), changed=False)


def test_other_dtypes_ranks_and_windows_without_convolutions_stay(rng):
    conv = lambda x, w: lax.conv(x, w, (1,) * (x.ndim - 2), "SAME")  # noqa: E731
    for x, w in (((2, 3, 8), (4, 3, 3)), ((2, 3, 4, 4, 4), (4, 3, 3, 3, 3))):
        assert "transpose" not in primitives(conv, normal(rng, *x), normal(rng, *w))
    narrow = [normal(rng, *s).astype(jnp.bfloat16) for s in ((2, 3, 8, 8), (4, 3, 3, 3))]
    assert "transpose" not in primitives(conv, *narrow)
    window = lambda x: lax.reduce_window(x, -jnp.inf, lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "VALID")  # noqa: E731
    assert "transpose" not in primitives(window, normal(rng, 2, 3, 8, 8))


def test_gradients_are_those_of_the_program_as_it_was_written(rng):
    x, w = normal(rng, 2, 3, 6, 5), normal(rng, 4, 3, 1, 1)
    loss = lambda w, x: jnp.sum(lax.conv(x, w, (1, 1), "VALID") ** 2)  # noqa: E731
    plain, exact = jax.grad(loss)(w, x), in_float64(jax.grad(loss))(w, x)
    for gradient in (jax.grad(zenith.jit(loss)), zenith.jit(jax.grad(loss))):
        assert_error_ratio(gradient(w, x), plain, exact, floor_ulps=64)
