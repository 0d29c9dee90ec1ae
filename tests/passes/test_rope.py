"""Rotary position embeddings as people write them, in value and gradient; and what is almost one.

x is (B, T, H, D), cos and sin (T, D / 2). The oracle is a product of complex numbers in NumPy's float64.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zenith_jax as zenith

B, T, H, D = 2, 5, 3, 8


@pytest.fixture
def arguments(rng):
    angle = rng.normal(size=(T, D // 2))
    return [jnp.asarray(a, jnp.float32) for a in (rng.normal(size=(B, T, H, D)), np.cos(angle), np.sin(angle))]


def oracle(x, cos, sin, *, interleaved=False, features=D):
    """cos and sin as they broadcast against the pairs of x."""
    x, cos, sin = (np.asarray(a).astype(np.float64) for a in (x, cos, sin))
    part = x[..., :features]
    pairs = part.reshape(*x.shape[:-1], -1, 2) if interleaved else part.reshape(*x.shape[:-1], 2, -1).swapaxes(-1, -2)
    turned = (pairs[..., 0] + 1j * pairs[..., 1]) * (cos + 1j * sin)
    pairs = np.stack([turned.real, turned.imag], axis=-1)
    part = (pairs if interleaved else pairs.swapaxes(-1, -2)).reshape(part.shape)
    return np.concatenate([part, x[..., features:]], axis=-1)


# --- what is found ----------------------------------------------------------------------------------------------------


def split(x, cos, sin):
    first, second = jnp.split(x, 2, axis=-1)
    cos, sin = cos[:, None], sin[:, None]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def rotate_half(x, cos, sin):
    """As Llama's."""
    cos, sin = (jnp.concatenate([a, a], axis=-1)[:, None] for a in (cos, sin))
    return x * cos + jnp.concatenate([-x[..., D // 2 :], x[..., : D // 2]], axis=-1) * sin


def with_tiled_tables(x, cos, sin):
    """As Equinox's."""
    cos, sin = (jnp.tile(a, (1, 2))[:, None] for a in (cos, sin))
    return jnp.concatenate([-x[..., D // 2 :], x[..., : D // 2]], axis=-1) * sin + x * cos


def rolled(x, cos, sin):
    cos, sin = jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([-sin, sin], axis=-1)
    return x * cos[:, None] + jnp.roll(x, D // 2, axis=-1) * sin[:, None]


def halves_of_a_reshape(x, cos, sin):
    x = x.reshape(B, T, H, 2, D // 2)
    signed = jnp.stack([-sin, sin], axis=-2)[:, None]
    return (x * cos[:, None, None] + x[..., ::-1, :] * signed).reshape(B, T, H, D)


def strided(x, cos, sin):
    first, second = x[..., ::2], x[..., 1::2]
    cos, sin = cos[:, None], sin[:, None]
    return jnp.stack([first * cos - second * sin, second * cos + first * sin], axis=-1).reshape(x.shape)


def rotate_every_two(x, cos, sin):
    """As GPT-J's."""
    cos, sin = (jnp.repeat(a, 2, axis=-1)[:, None] for a in (cos, sin))
    return x * cos + jnp.stack([-x[..., 1::2], x[..., ::2]], axis=-1).reshape(x.shape) * sin


def reshaped(x, cos, sin):
    pairs = x.reshape(B, T, H, D // 2, 2)
    cos, sin = cos[:, None], sin[:, None]
    first = pairs[..., 0] * cos - pairs[..., 1] * sin
    return jnp.stack([first, pairs[..., 1] * cos + pairs[..., 0] * sin], axis=-1).reshape(x.shape)


def as_complex_numbers(x, cos, sin):
    """As the first Llama's."""
    pairs = x.reshape(B, T, H, D // 2, 2)
    turned = jax.lax.complex(pairs[..., 0], pairs[..., 1]) * jax.lax.complex(cos, sin)[:, None]
    return jnp.stack([jnp.real(turned), jnp.imag(turned)], axis=-1).reshape(x.shape)


def heads_before_positions(x, cos, sin):
    first, second = jnp.split(jnp.swapaxes(x, 1, 2), 2, axis=-1)
    y = jnp.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1)
    return jnp.swapaxes(y, 1, 2)


def three_parts(x, cos, sin):
    first, second, rest = x[..., :2], x[..., 2:4], x[..., 4:]
    cos, sin = cos[:, None, :2], sin[:, None, :2]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)


def last_features(x, cos, sin):
    """As DeepSeek's: the part without positions stands first."""
    before, turned = jnp.split(x, [4], axis=-1)
    first, second = turned[..., ::2], turned[..., 1::2]
    cos, sin = cos[:, None, :2], sin[:, None, :2]
    turned = jnp.stack([first * cos - second * sin, second * cos + first * sin], axis=-1).reshape(B, T, H, 4)
    return jnp.concatenate([before, turned], axis=-1)


def first_features(x, cos, sin):
    """As GPT-NeoX's."""
    cos, sin = (jnp.concatenate([a[:, :2], a[:, :2]], axis=-1)[:, None] for a in (cos, sin))
    turned, rest = x[..., :4], x[..., 4:]
    turned = turned * cos + jnp.concatenate([-turned[..., 2:], turned[..., :2]], axis=-1) * sin
    return jnp.concatenate([turned, rest], axis=-1)


def one_table_for_all_heads_of_each_example(x, cos, sin):
    cos, sin = (jnp.stack([a, 2 * a])[:, :, None] for a in (cos, sin))
    return (
        jnp.concatenate([x[..., :4] * cos - x[..., 4:] * sin, x[..., 4:] * cos + x[..., :4] * sin], axis=-1)
        / jnp.asarray([1.0, 2.0])[:, None, None, None]
    )


def rotation_back_of_the_negative_angle(x, cos, sin):
    first, second = x[..., : D // 2], x[..., D // 2 :]
    cos, sin = cos[:, None], -sin[:, None]
    return jnp.concatenate([first * cos + second * sin, second * cos - first * sin], axis=-1)


def under_vmap(x, cos, sin):
    """Each head of each example by itself, as in Equinox."""

    def head(x):
        return x * jnp.tile(cos, 2) + jnp.concatenate([-x[:, D // 2 :], x[:, : D // 2]], axis=-1) * jnp.tile(sin, 2)

    return jax.vmap(jax.vmap(head, 1, 1))(x)


HALVES = (
    split,
    rotate_half,
    with_tiled_tables,
    rolled,
    halves_of_a_reshape,
    heads_before_positions,
    one_table_for_all_heads_of_each_example,
    rotation_back_of_the_negative_angle,
    under_vmap,
)
INTERLEAVED = (strided, rotate_every_two, reshaped, as_complex_numbers)
PARTIAL = {first_features: "halves, 4 of 8 features", three_parts: "halves, 4 of 8 features"}


@pytest.mark.parametrize("function", [*HALVES, *INTERLEAVED], ids=lambda f: f.__name__)
def test_spelling(check_fused, arguments, function):
    report = check_fused(function, *arguments, counts={"rope": 1})
    interleaved = function in INTERLEAVED
    assert report.fused[0].detail == ("interleaved" if interleaved else "halves")
    x, cos, sin = arguments
    expected = oracle(x, cos[:, None], sin[:, None], interleaved=interleaved)
    np.testing.assert_allclose(jax.jit(zenith.fuse(function))(*arguments), expected, atol=2e-6)


@pytest.mark.parametrize("function", PARTIAL, ids=lambda f: f.__name__)
def test_first_features_only(check_fused, arguments, function):
    report = check_fused(function, *arguments, counts={"rope": 1})
    assert report.fused[0].detail == PARTIAL[function]
    x, cos, sin = arguments
    expected = oracle(x, cos[:, None, :2], sin[:, None, :2], features=4)
    np.testing.assert_allclose(jax.jit(zenith.fuse(function))(*arguments), expected, atol=2e-6)
    primitives = [e.primitive.name for e in jax.make_jaxpr(zenith.fuse(function))(*arguments).eqns]
    assert "concatenate" not in primitives, "the features behind are copied by the kernel"


def test_other_features_behind_are_no_part_of_it(check_fused, arguments):
    def function(x, cos, sin):
        turned = split(x[..., :4], cos[:, :2], sin[:, :2])
        return jnp.concatenate([turned, x[..., 4:] * 2], axis=-1)

    assert check_fused(function, *arguments, counts={"rope": 1}).fused[0].detail == "halves"


def test_last_features_only(check_fused, arguments):
    check_fused(last_features, *arguments, counts={"rope": 1})


def test_coefficients_for_each_feature_need_not_be_pairs(check_fused, rng, arguments):
    """A table as wide as x holds any numbers: nothing says that its halves are equal."""
    x = arguments[0]
    cos, sin = (jnp.asarray(rng.normal(size=(T, 1, D)), jnp.float32) for _ in range(2))

    def halves(x, cos, sin):
        return x * cos + jnp.concatenate([-x[..., D // 2 :], x[..., : D // 2]], axis=-1) * sin

    def pairs(x, cos, sin):
        return x * cos + jnp.stack([-x[..., 1::2], x[..., ::2]], axis=-1).reshape(x.shape) * sin

    def one_wide(x, cos, sin):
        return halves(x, cos, jnp.tile(sin[..., :4], 2))

    for function in (halves, pairs, one_wide):
        check_fused(function, x, cos, sin, counts={"rope": 1})


def test_angles_made_inside_and_complex_tables(check_fused, arguments):
    x = arguments[0]

    def frequencies():
        return jnp.arange(T)[:, None] * 1e4 ** (-jnp.arange(0, D, 2) / D)

    def computed(x):
        angle = frequencies()
        return rotate_half(x, jnp.cos(angle), jnp.sin(angle))

    def angles_put_together(x):
        angle = jnp.concatenate([frequencies()] * 2, axis=-1)
        turned = jnp.concatenate([-x[..., D // 2 :], x[..., : D // 2]], axis=-1)
        return x * jnp.cos(angle)[:, None] + turned * jnp.sin(angle)[:, None]

    def cis(x):
        pairs = x.reshape(B, T, H, D // 2, 2)
        turned = jax.lax.complex(pairs[..., 0], pairs[..., 1]) * jnp.exp(1j * frequencies())[:, None]
        return jnp.stack([jnp.real(turned), jnp.imag(turned)], axis=-1).reshape(x.shape)

    for function in (computed, angles_put_together, cis):
        check_fused(function, x, counts={"rope": 1})


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_dtypes_round_once(check_fused, arguments, dtype):
    x, cos, sin = arguments
    x = x.astype(dtype)

    def in_float32(x, cos, sin):
        return split(x.astype(jnp.float32), cos, sin).astype(x.dtype)

    def in_its_own(x, cos, sin):
        return rotate_half(x, cos.astype(x.dtype), sin.astype(x.dtype))

    for function, own in ((in_float32, False), (in_its_own, True)):
        check_fused(function, x, cos, sin, counts={"rope": 1}, floor_dtype=dtype)
        coefficients = [(a.astype(dtype) if own else a)[:, None] for a in (cos, sin)]
        expected = jnp.asarray(oracle(x, *coefficients).astype(np.float32)).astype(dtype)
        found = jax.jit(zenith.fuse(function))(x, cos, sin)
        off = np.asarray(found != expected).mean()
        assert found.dtype == dtype and off < 0.02, "not the nearest of its dtype"


def test_x_is_read_in_its_own_layout(arguments):
    """The transpose before a rotation moves behind it, where attention reads through it."""
    x, cos, sin = arguments

    def function(x, cos, sin):
        q = jnp.swapaxes(x, 1, 2)
        first, second = jnp.split(q, 2, axis=-1)
        return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)

    jaxpr = jax.make_jaxpr(zenith.fuse(function))(x, cos, sin)
    (call,) = (e for e in jaxpr.eqns if e.primitive.name == "zenith_call")
    assert call.invars[0].aval.shape == (B, T, H, D)


def test_inside_control_flow_and_before_attention(check_fused, arguments):
    x, cos, sin = arguments

    def layer(x, cos, sin):
        q, k = split(x, cos, sin), split(x * 0.5, cos, sin)
        return x + jax.nn.dot_product_attention(q, k, x, is_causal=True)

    def scanned(x, cos, sin):
        step = jax.checkpoint(lambda x, _: (layer(x, cos, sin), None))
        return jax.lax.scan(step, x, None, length=2)[0]

    check_fused(scanned, x, cos, sin, counts={"rope": 2, "attention": 1}, floor_ulps=64)


def test_normalised_queries(check_fused, arguments):
    x, cos, sin = arguments

    def function(x, cos, sin):
        return split(x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6), cos, sin)

    check_fused(function, x, cos, sin, counts={"rms_norm": 1, "rope": 1}, floor_ulps=32)


def test_gradient_keeps_neither_x_nor_the_result(arguments):
    _, pullback = jax.vjp(zenith.fuse(lambda x: split(x, *arguments[1:])), arguments[0])
    assert all(a.size < arguments[0].size for a in jax.tree.leaves(pullback))


# --- what is not ------------------------------------------------------------------------------------------------------


def _joined(first, second):
    return jnp.concatenate([first, second], axis=-1)


def _half(f):
    """f(x0, x1, cos, sin) -> (y0, y1) of halves."""

    def function(x, cos, sin):
        return _joined(*f(x[..., : D // 2], x[..., D // 2 :], cos[:, None], sin[:, None]))

    return function


MISSES = {
    "both are sums": ("signs are not", _half(lambda a, b, c, s: (a * c + b * s, b * c + a * s))),
    "both are differences": ("signs are not", _half(lambda a, b, c, s: (a * c - b * s, b * c - a * s))),
    "the first is negative": ("signs are not", _half(lambda a, b, c, s: (b * s - a * c, b * c + a * s))),
    "cos and sin exchanged in one": (
        "different coefficients",
        _half(lambda a, b, c, s: (a * c - b * s, b * s + a * c)),
    ),
    "another coefficient in the second": (
        "different coefficients",
        _half(lambda a, b, c, s: (a * c - b * s, b * jnp.cos(c) + a * s)),
    ),
    "coefficients of other positions": (
        "different coefficients",
        _half(lambda a, b, c, s: (a * c - b * s, b * c[::-1] + a * s)),
    ),
    "halves exchanged": ("signs are not", _half(lambda a, b, c, s: (b * c + a * s, a * c - b * s))),
    "the same half twice": ("different coefficients", _half(lambda a, b, c, s: (a * c - b * s, a * c + b * s))),
    "of two arrays": (None, _half(lambda a, b, c, s: (a * c - (b + 1) * s, (b + 1) * c + a * s))),
    "a sum of three": (None, _half(lambda a, b, c, s: (a * c - b * s + a, b * c + a * s))),
    "scaled in one half": ("signs are not", _half(lambda a, b, c, s: (a * c - b * s, (b * c + a * s) * 2))),
    "overlapping slices": (
        None,
        lambda x, c, s: _joined(
            x[..., :4] * c[:, None] - x[..., 3:7] * s[:, None], x[..., 3:7] * c[:, None] + x[..., :4] * s[:, None]
        ),
    ),
    "every third": (
        None,
        lambda x, c, s: _joined(
            x[..., ::3] * c[:, None, :3] - x[..., 1:8:3] * s[:, None, :3],
            x[..., 1:8:3] * c[:, None, :3] + x[..., ::3] * s[:, None, :3],
        ),
    ),
    "neighbours put together as halves": (
        None,
        lambda x, c, s: _joined(
            x[..., ::2] * c[:, None] - x[..., 1::2] * s[:, None], x[..., 1::2] * c[:, None] + x[..., ::2] * s[:, None]
        ),
    ),
    "another axis": (None, lambda x, c, s: _another_axis(x, c, s)),
}


def _another_axis(x, cos, sin):
    """Pairs of heads."""
    first, second = x[:, :, :1], x[:, :, 1:2]
    cos, sin = (jnp.repeat(a, 2, -1)[:, None] for a in (cos, sin))
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=2)


@pytest.mark.parametrize("name", MISSES)
def test_no_rotation(check_refused, arguments, name):
    reason, function = MISSES[name]
    check_refused(function, *arguments, op="rope", reason=reason)


def test_a_product_that_is_used_elsewhere(check_refused, arguments):
    def function(x, cos, sin):
        turned = jnp.concatenate([-x[..., D // 2 :], x[..., : D // 2]], axis=-1) * jnp.tile(sin, 2)[:, None]
        return x * jnp.tile(cos, 2)[:, None] + turned, turned

    check_refused(function, *arguments, op="rope", reason=None)


def test_wrong_slices_of_a_rotated_half(check_refused, arguments):
    def function(x, cos, sin):
        cos, sin = (jnp.tile(a, 2)[:, None] for a in (cos, sin))
        return x * cos + jnp.concatenate([-x[..., D // 2 - 1 : D - 1], x[..., : D // 2]], axis=-1) * sin

    check_refused(function, *arguments, op="rope", reason=None)


# --- where it is worth it ---------------------------------------------------------------------------------------------


def test_the_report_says_why_a_rotation_stays_with_xla():
    x, table = jnp.zeros((1, 1, 8, 64)), jnp.zeros((1, 32))
    with zenith.configured(use_cost=True):
        (site,) = zenith.explain(split)(x, table, table).sites
        assert site.op == "rope" and "XLA is as fast for 512 elements" in site.reason
