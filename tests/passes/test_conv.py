"""Convolutions of images with what the kernel computes along with them; and what is no such thing."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from jax import lax
from numerics import assert_error_ratio, in_float64

import zenith_jax as zenith
from zenith_jax import native
from zenith_jax.errors import ShapeError

C, M = 3, 5
NUMBERS = ("NHWC", "HWIO", "NHWC")


def normal(rng, *shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


def conv(x, w, *, strides=(1, 1), padding="SAME", dimension_numbers=NUMBERS, **options):
    return lax.conv_general_dilated(x, w, strides, padding, dimension_numbers=dimension_numbers, **options)


def arguments(rng):
    """An image, a filter, a bias, a residual, and mean and variance."""
    vectors = [normal(rng, M) for _ in range(3)]
    return [normal(rng, 2, 4, 6, C), normal(rng, 3, 2, C, M), vectors[0], normal(rng, 2, 4, 6, M), *vectors[1:]]


def batch_normed(y, b, m, v):
    return (y - m) * lax.rsqrt(jnp.square(v) + 1e-3) * b + m


def channels_first(x, w, b, r, m, v):
    y = lax.conv_general_dilated(x.transpose(0, 3, 1, 2), w.transpose(3, 2, 0, 1), (1, 1), "SAME")
    y = batch_normed(y, *(a[:, None, None] for a in (b, m, v)))
    return jax.nn.relu(r.transpose(0, 3, 1, 2) + y)


def pooled(y, window, strides=None, padding="VALID", **options):
    """The maximum of windows along all dimensions of y."""
    strides = window if strides is None else strides
    return lax.reduce_window(y, -jnp.inf, lax.max, window, strides, padding, **options)


def pooled_channels_first(x, w, b, r, m, v):
    y = lax.conv_general_dilated(x.transpose(0, 3, 1, 2), w.transpose(3, 2, 0, 1), (1, 1), "SAME")
    return pooled(jnp.maximum(y + b[:, None, None], 0), (1, 1, 2, 3))


SITES = {
    "alone": (lambda x, w, b, r, m, v: conv(x, w), ""),
    "bias": (lambda x, w, b, r, m, v: conv(x, w) + b, "bias"),
    "bias, relu": (lambda x, w, b, r, m, v: jax.nn.relu(conv(x, w) + b), "bias, relu"),
    "maximum": (lambda x, w, b, r, m, v: jnp.maximum(0.0, b + conv(x, w)), "bias, maximum"),
    "residual": (lambda x, w, b, r, m, v: jax.nn.relu(r + (conv(x, w) - b)), "bias, residual, relu"),
    "batch norm": (lambda x, w, b, r, m, v: jax.nn.relu(batch_normed(conv(x, w), b, m, v)), "batch norm, relu"),
    "negated": (lambda x, w, b, r, m, v: b - conv(x, w), "batch norm"),
    "channels first": (channels_first, "batch norm, residual, relu"),
    "strides and dilation": (
        lambda x, w, b, r, m, v: conv(x, w, strides=(2, 3), padding=((2, 0), (1, 4)), rhs_dilation=(1, 2)) + b,
        "bias",
    ),
    "cropped": (lambda x, w, b, r, m, v: conv(x, w, padding=((-1, 0), (1, -2))), ""),
    "one pixel": (lambda x, w, b, r, m, v: conv(x[:, :3, :2], w, padding="VALID") * 2.0, "batch norm"),
    "a product": (lambda x, w, b, r, m, v: jax.nn.relu(conv(x, w[:1, :1]) + b + r), "bias, residual, relu"),
    "max pool": (
        lambda x, w, b, r, m, v: linen.max_pool(jax.nn.relu(conv(x, w) + b), (2, 2), (2, 2)),
        "bias, relu, max pool",
    ),
    "max pool alone": (lambda x, w, b, r, m, v: nnx.max_pool(conv(x, w), (1, 2), (1, 2)), "max pool"),
    "max pool with a row left": (
        lambda x, w, b, r, m, v: linen.max_pool(batch_normed(conv(x, w), b, m, v), (3, 5), (3, 5)),
        "batch norm, max pool",
    ),
    "max pool channels first": (pooled_channels_first, "bias, maximum, max pool"),
}


@pytest.mark.parametrize("name", SITES)
def test_site(check_fused, rng, name):
    function, detail = SITES[name]
    # The gradients of a scale and of maximum take the convolution itself, which is computed again.
    again = name in ("maximum", "batch norm", "channels first") or "max pool" in name
    report = check_fused(
        function, *arguments(rng), counts={"conv": 1}, gradient_counts={"conv": 1 + again}, floor_ulps=64
    )
    assert report.fused[0].detail == detail


def test_a_sum_of_two_convolutions_is_one_with_the_other_as_residual(check_fused, rng):
    function = lambda x, w, b, r, m, v: jax.nn.relu(conv(x, w) + b + conv(x, w[:1, :1]))  # noqa: E731
    report = check_fused(function, *arguments(rng), counts={"conv": 2}, floor_ulps=64)
    assert sorted(s.detail for s in report.fused) == ["", "bias, residual, relu"]


def test_libraries(rng):
    x = normal(rng, 2, 4, 4, C)
    module = nnx.Conv(C, M, (3, 3), rngs=nnx.Rngs(0))
    equinox = eqx.nn.Conv2d(C, M, 3, stride=2, padding=1, key=jax.random.key(0))

    class Linen(linen.Module):
        @linen.compact
        def __call__(self, x):
            return linen.relu(linen.BatchNorm(use_running_average=True)(linen.Conv(M, (3, 3))(x)))

    variables = Linen().init(jax.random.key(0), x)
    for function, detail in (
        (lambda x: nnx.relu(module(x)), "bias, relu"),
        (lambda x: Linen().apply(variables, x), "batch norm, relu"),
        (lambda x: jax.nn.relu(jax.vmap(equinox)(x.transpose(0, 3, 1, 2))), "bias, relu"),
    ):
        (site,) = zenith.explain(function)(x).fused
        assert (site.op, site.detail) == ("conv", detail)
        assert jnp.allclose(zenith.jit(function)(x), function(x), rtol=1e-5, atol=1e-5)


LESS = {  # what stands behind the convolution and is not computed with it
    "used twice": (lambda x, w, b, r: (lambda y: y + jax.nn.relu(y))(conv(x, w)), ""),
    "returned": (lambda x, w, b, r: (lambda y: (y, jax.nn.relu(y)))(conv(x, w) + b), "bias"),
    "another maximum": (lambda x, w, b, r: jnp.maximum(conv(x, w) + b, 1), "bias"),
    "a minimum": (lambda x, w, b, r: jnp.minimum(conv(x, w), 0), ""),
    "silu": (lambda x, w, b, r: jnp.sin(conv(x, w) + b), "bias"),
    "a residual after relu": (lambda x, w, b, r: jax.nn.relu(conv(x, w)) + r, "relu"),
    "a repeated residual": (lambda x, w, b, r: jax.nn.relu(conv(x, w) + r[:1]), ""),
    "a difference": (lambda x, w, b, r: r - conv(x, w), ""),
    "a vector along another axis": (lambda x, w, b, r: conv(x, w)[:, :, :M] + b[:, None], ""),
    "an inverse": (lambda x, w, b, r: b / conv(x, w), ""),
    "of itself": (lambda x, w, b, r: (lambda y: y + y)(conv(x, w)), ""),
    "overlapping windows": (lambda x, w, b, r: pooled(conv(x, w) + b, (1, 2, 2, 1), (1, 1, 2, 1)), "bias"),
    "windows apart": (lambda x, w, b, r: pooled(conv(x, w) + b, (1, 2, 2, 1), (1, 2, 3, 1)), "bias"),
    "padded windows": (
        lambda x, w, b, r: pooled(conv(x, w) + b, (1, 2, 2, 1), None, ((0, 0), (0, 0), (1, 1), (0, 0))),
        "bias",
    ),
    "windows with a pixel more": (
        lambda x, w, b, r: pooled(conv(x, w) + b, (1, 3, 1, 1), None, ((0, 0), (0, 2), (0, 0), (0, 0))),
        "bias",
    ),
    "dilated windows": (
        lambda x, w, b, r: pooled(conv(x, w) + b, (1, 2, 2, 1), window_dilation=(1, 2, 1, 1)),
        "bias",
    ),
    "spread windows": (lambda x, w, b, r: pooled(conv(x, w) + b, (1, 2, 2, 1), base_dilation=(1, 1, 2, 1)), "bias"),
    "windows of channels": (lambda x, w, b, r: pooled(conv(x, w) + b, (1, 2, 2, 5)), "bias"),
    "windows of images": (lambda x, w, b, r: pooled(conv(x, w) + b, (2, 2, 2, 1)), "bias"),
    "a minimum of windows": (
        lambda x, w, b, r: -linen.max_pool(-(conv(x, w) + b), (2, 2), (2, 2)),
        "bias",
    ),
    "another minimum of windows": (
        lambda x, w, b, r: lax.reduce_window(conv(x, w), jnp.inf, lax.min, (1, 2, 2, 1), (1, 2, 2, 1), "VALID"),
        "",
    ),
    "a mean of windows": (lambda x, w, b, r: linen.avg_pool(conv(x, w) + b, (2, 2), (2, 2)), "bias"),
    "a residual before windows": (lambda x, w, b, r: pooled(conv(x, w) + r, (1, 2, 2, 1)), "residual"),
    "a residual after windows": (lambda x, w, b, r: pooled(conv(x, w), (1, 2, 2, 1)) + r[:, :2, :3], "max pool"),
    "used beside windows": (lambda x, w, b, r: (lambda y: (y, pooled(y, (1, 2, 2, 1))))(conv(x, w) + b), "bias"),
    "another shape": (lambda x, w, b, r: jax.nn.relu((conv(x, w) + b).reshape(8, 6, M)), "bias"),
}


@pytest.mark.parametrize("name", LESS)
def test_less(rng, name):
    function, detail = LESS[name]
    args = arguments(rng)[:4]
    (site,) = zenith.explain(function)(*args).fused
    assert (site.op, site.detail) == ("conv", detail)
    assert_error_ratio(zenith.fuse(function)(*args), function(*args), in_float64(function)(*args), floor_ulps=64)


MISSES = {
    "groups": (lambda x, w: jax.nn.relu(conv(x, w[:, :, :1, :3], feature_group_count=3)), None),
    "transposed": (lambda x, w: jax.nn.relu(conv(x, w, padding=((1, 1), (0, 1)), lhs_dilation=(2, 1))), "spread out"),
    "transposed, without relu": (lambda x, w: conv(x, w, padding=((1, 1), (0, 1)), lhs_dilation=(2, 1)), None),
    "one dimension": (
        lambda x, w: jax.nn.relu(conv(x[0], w[0], strides=(1,), dimension_numbers=("NWC", "WIO", "NWC"))),
        "not for 1 spatial",
    ),
    "bfloat16": (lambda x, w: jax.nn.relu(conv(*(a.astype(jnp.bfloat16) for a in (x, w)))), "for float32, not for"),
    "two dtypes": (
        lambda x, w: jax.nn.relu(conv(*(a.astype(jnp.bfloat16) for a in (x, w)), preferred_element_type=jnp.float32)),
        "different dtypes",
    ),
    "as of gradients": (lambda x, w: jax.nn.relu(conv(x, w, dimension_numbers=("NHWC", "WHIO", "NHWC"))), "numbered"),
    "groups of the batch": (
        lambda x, w: jax.nn.relu(conv(x, w[..., :4], batch_group_count=2)),
        "groups of the batch",
    ),
    "empty": (lambda x, w: jax.nn.relu(conv(x[:0], w)), "empty"),
    "an empty filter": (lambda x, w: jax.nn.relu(conv(x[..., :0], w[:, :, :0])), "empty"),
    "a product": (lambda x, w: x @ w[0, 0], None),
}


@pytest.mark.parametrize("name", MISSES)
def test_is_none(rng, name):
    function, reason = MISSES[name]
    report = zenith.explain(function)(*arguments(rng)[:2])
    assert "conv" not in report.counts(), str(report)
    reasons = [s.reason for s in report.refused if s.op == "conv"]
    assert (reason is None and not reasons) or (len(reasons) == 1 and reason in reasons[0])


# --- which of them are faster by the kernel ---------------------------------------------------------------------------


X, W = jnp.ones((1, 32, 32, 64)), jnp.ones((3, 3, 64, 64))


def layer(x, w):
    return jax.nn.relu(conv(x, w))


def by_rule(function, *args):
    with zenith.configured(use_cost=True, platform="cpu"):
        return [(s.fused, s.reason) for s in zenith.explain(function)(*args).sites if s.op == "conv"]


def test_the_rule_takes_it_where_it_was_measured(monkeypatch):
    monkeypatch.setattr(native, "instruction_set", lambda: "avx512")
    assert by_rule(layer, X, W) == [(True, "")]
    ((fused, reason),) = by_rule(layer, X[:, :4, :4, :8], W[:, :, :8, :8])
    assert not fused and "XLA's convolution is as fast" in reason
    means = lambda x, w: linen.avg_pool(layer(x, w), (2, 2), (2, 2))  # noqa: E731
    overlapping = lambda x, w: linen.max_pool(layer(x, w), (3, 3), (2, 2))  # noqa: E731
    images = jnp.ones((64, 32, 32, 64))
    assert by_rule(layer, images, W) == by_rule(overlapping, images, W) == by_rule(means, X, W) == [(True, "")]
    ((fused, reason),) = by_rule(means, images, W)
    assert not fused and "the windows behind it" in reason
    of = lambda n: lambda x, w: linen.max_pool(layer(x, w), (n, n), (n, n))  # noqa: E731
    assert by_rule(of(2), images, W) == [(True, "")] and by_rule(of(8), X, W)[0][0]  # without the windows
    ((fused, reason),) = by_rule(of(8), images, W)
    assert not fused and "a maximum of 64 pixels" in reason
    (found, *_) = by_rule(jax.grad(lambda x, w: layer(x, w).sum()), X, W)
    assert not found[0] and "gradient" in found[1]
    monkeypatch.setattr(native, "instruction_set", lambda: "avx2")
    ((fused, reason),) = by_rule(layer, X, W)
    assert not fused and "AVX-512" in reason


def test_on_a_gpu_it_is_cudnns():
    with zenith.configured(platform="cuda"):
        (site,) = zenith.explain(layer)(X, W).refused
    assert site.op == "conv" and "cuDNN" in site.reason


# ---- What transforms a program after it was rewritten ----------------------------------------------------------------


def _convolved(x, w):
    return lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _x_and_w(rng, c=16, size=16):
    return (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((1, size, size, c), (3, 3, c, c)))


def test_forward_mode_through_a_residual(rng):
    x, w = _x_and_w(rng)
    block = lambda x, w: jax.nn.relu(_convolved(x, w) + x)  # noqa: E731
    tangents = jnp.stack([x, -2 * x, w.sum() + x])
    along = lambda f: jax.vmap(lambda t: jax.jvp(lambda x: f(x, w), (x,), (t,))[1])(tangents)  # noqa: E731
    close = dict(rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(along(zenith.jit(block)), along(block), **close)
    over_primals = jax.vmap(lambda x: jax.jvp(zenith.jit(block), (x, w), (x, w))[1])(tangents)
    np.testing.assert_allclose(over_primals, jax.vmap(lambda x: jax.jvp(block, (x, w), (x, w))[1])(tangents), **close)


@pytest.mark.parametrize("operand", [0, 1])
def test_the_transpose_of_a_linear_program(rng, operand):
    args = list(_x_and_w(rng, size=32))
    y = _convolved(*args)

    def of(function):
        one = lambda a: function(*(a if i == operand else b for i, b in enumerate(args)))  # noqa: E731
        return jax.linear_transpose(one, args[operand])(y)[0]

    np.testing.assert_allclose(of(zenith.jit(_convolved)), of(_convolved), rtol=1e-3, atol=1e-2)


def test_a_result_in_large_pages(rng):
    x, w = normal(rng, 1, 300, 300, 1), normal(rng, 3, 3, 1, 32)  # 11.5 MB, from 4 MiB on they are asked for
    np.testing.assert_allclose(zenith.jit(_convolved)(x, w), _convolved(x, w), rtol=1e-4, atol=1e-4)


def test_infinite_scales_without_a_shift(rng):
    x, w = _x_and_w(rng)
    s = jnp.ones(16).at[1].set(jnp.inf).at[2].set(0)
    for scaled in (lambda x, w, s: _convolved(x, w) * s, lambda x, w, s: _convolved(x, w) / s):
        np.testing.assert_allclose(zenith.jit(scaled)(x, w, s), scaled(x, w, s), rtol=1e-4, atol=1e-4)


def test_what_is_not_finite_stands_where_it_stands_unfused(rng):
    x, w = _x_and_w(rng)
    b = jnp.zeros(16).at[1].set(jnp.inf).at[2].set(-jnp.inf).at[3].set(jnp.nan)
    x = x.at[0, 3, 4, 5].set(jnp.nan).at[0, 9, 9, 1].set(jnp.inf).at[0, 12, 2, 1].set(-jnp.inf)
    for activation in (jax.nn.relu, lambda y: y):
        inside = lambda x, w, b, f=activation: f(_convolved(x, w) + b)  # noqa: E731
        function = lambda x, w, b, f=inside: linen.max_pool(f(x, w, b), (2, 2), (2, 2))  # noqa: E731
        assert zenith.explain(function)(x, w, b).fused[0].detail.endswith("max pool")
        # XLA's windows on a CPU drop a NaN beside a number; StableHLO's maximum, NumPy's and torch's keep it.
        expected = np.asarray(inside(x, w, b)).reshape(1, 8, 2, 8, 2, 16).max((2, 4))
        assert np.isnan(expected).any() and np.isinf(expected).any()
        np.testing.assert_allclose(zenith.jit(function)(x, w, b), expected, rtol=1e-4, atol=1e-4)


def test_symbolic_batches_are_left_to_xla(rng, caplog):
    (batch,) = jax.export.symbolic_shape("batch")
    shapes = ((batch, 16, 16, 16), (3, 3, 16, 16))
    structs = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]
    function = lambda x, w: jax.nn.relu(_convolved(x, w))  # noqa: E731
    exported = jax.export.export(zenith.jit(function))(*structs)
    assert "please report" not in caplog.text
    x, w = _x_and_w(rng)
    np.testing.assert_allclose(exported.call(x, w), function(x, w), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("w", "options", "message"),
    [
        ((3, 3, 0, 8), {}, "w must have a height"),
        ((3, 3, 4, 8), dict(strides=(1,)), "strides must have one entry for each"),
        ((3, 3, 4, 8), dict(padding="SAME"), "padding must have one entry for each"),
        ((3, 3, 4, 8), dict(dilation=(1, 0)), "must be positive"),
        ((3, 3, 4, 8), dict(pool=(2, 0)), "pool must be the height and width of a window"),
        ((3, 3, 4, 8), dict(pool=(2, 2), residual=jnp.zeros((1, 3, 3, 8))), "a residual has no place"),
    ],
)
def test_wrong_arguments_of_the_op(w, options, message):
    with pytest.raises(ShapeError, match=message):
        zenith.ops.conv(jnp.zeros((1, 8, 8, w[2])), jnp.zeros(w), **options)
