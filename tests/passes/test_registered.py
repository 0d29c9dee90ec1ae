"""zenith.register: what is found, what is refused and why, and what takes its place under transformations.

The replacement of most tests is the reference times a factor that no rounding explains, so that a test sees whether it
ran. Values are compared with the reference itself in numpy's float64.
"""

from __future__ import annotations

import functools as ft

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import zenith_jax as zenith
from zenith_jax.errors import RegistrationError

MARK = 1.0 + 2.0**-6  # what a marked replacement multiplies by


def squash(x, scale, *, eps):
    """No op of Zenith's."""
    energy = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    return jnp.tanh(x) * scale / jnp.sqrt(energy + eps)


def marked(x, scale, *, eps):
    return MARK * squash(x, scale, eps=eps)


def register_squash(replacement=marked, **options):
    return zenith.register(squash, replacement, "*b d, d", attributes={"eps": 1e-6}, **options)


@pytest.fixture
def x():
    return jnp.asarray(np.random.default_rng(20260201).normal(size=(2, 5, 8)), jnp.float32)


@pytest.fixture
def scale():
    return jnp.asarray(np.random.default_rng(20260202).normal(size=(8,)), jnp.float32) + 2


def is_marked(function, *args):
    """Whether the replacement runs in `function`: its result is MARK times the plain one."""
    fused, plain = jax.jit(zenith.fuse(function))(*args), function(*args)
    ratio = np.asarray(fused, np.float64) / np.asarray(plain, np.float64)
    if np.allclose(ratio, MARK, rtol=1e-5):
        return True
    np.testing.assert_allclose(ratio, 1, rtol=1e-5)
    return False


SPELLINGS = {
    "as the reference": lambda x, s: squash(x, s, eps=1e-3),
    "operands swapped": lambda x, s: s * jnp.tanh(x) / jnp.sqrt(1e-3 + jnp.sum(x * x, axis=-1, keepdims=True)),
    "rsqrt": lambda x, s: jnp.tanh(x) * s * lax.rsqrt(jnp.sum(x**2, axis=-1)[..., None] + 1e-3),
    "scale reshaped": lambda x, s: (
        jnp.tanh(x) * s.reshape(1, 1, -1) / jnp.sqrt(jnp.sum(x**2, -1, keepdims=True) + 1e-3)
    ),
    "other layout": lambda x, s: jnp.moveaxis(
        jnp.tanh(x.T) * s[:, None, None] / jnp.sqrt(jnp.sum(x.T * x.T, 0) + 1e-3), 0, -1
    ).swapaxes(0, 1),
    "inside jit": lambda x, s: jax.jit(ft.partial(squash, eps=1e-3))(x, s),
    "vmapped": lambda x, s: jax.vmap(lambda x: squash(x, s, eps=1e-3))(x),
    "one row": lambda x, s: squash(x[0, 0], s, eps=1e-3),
    "a batch of one": lambda x, s: squash(x[:1, :1], s, eps=1e-3),
}


@pytest.mark.parametrize("function", SPELLINGS.values(), ids=SPELLINGS)
def test_it_is_found_however_it_is_written(function, x, scale):
    with register_squash():
        assert is_marked(function, x, scale)
        report = zenith.explain(function)(x, scale)
    assert report.counts() == {"squash": 1}, report
    assert "eps=0.001" in report.fused[0].detail


NEIGHBOURS = {
    "mean for sum": lambda x, s: jnp.tanh(x) * s / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-3),
    "another axis": lambda x, s: jnp.tanh(x) * s / jnp.sqrt(jnp.sum(x**2, 1, keepdims=True) + 1e-3),
    "all axes": lambda x, s: jnp.tanh(x) * s / jnp.sqrt(jnp.sum(x**2) + 1e-3),
    "cube for square": lambda x, s: jnp.tanh(x) * s / jnp.sqrt(jnp.sum(x**3, -1, keepdims=True) + 99.0),
    "no root": lambda x, s: jnp.tanh(x) * s / (jnp.sum(x**2, -1, keepdims=True) + 1e-3),
    "two values": lambda x, s: jnp.tanh(x + 1) * s / jnp.sqrt(jnp.sum(x**2, -1, keepdims=True) + 1e-3),
    "sin for tanh": lambda x, s: jnp.sin(x) * s / jnp.sqrt(jnp.sum(x**2, -1, keepdims=True) + 1e-3),
    "scale of the rows": lambda x, s: jnp.tanh(x) * s[:5, None] / jnp.sqrt(jnp.sum(x**2, -1, keepdims=True) + 1e-3),
    "energy returned": lambda x, s: (lambda e: jnp.tanh(x) * s / jnp.sqrt(e + 1e-3) + e)(
        jnp.sum(x**2, -1, keepdims=True)
    ),
    "transposed square": lambda x, s: (
        lambda y: jnp.tanh(y) * s / jnp.sqrt(jnp.sum(y.swapaxes(0, 1) ** 2, -1, keepdims=True) + 1e-3)
    )(x[:, :2]),
}


@pytest.mark.parametrize("function", NEIGHBOURS.values(), ids=NEIGHBOURS)
def test_its_neighbours_stay_as_they_are(function, x, scale):
    with register_squash():
        assert not is_marked(function, x, scale)
        assert "squash" not in zenith.explain(function)(x, scale).counts()


@pytest.mark.parametrize(
    "name, reason",
    [
        ("energy returned", "an inner value (float32[2,5,1]) is used elsewhere"),
        ("cube for square", "the reference has"),
        ("another axis", "axis"),
    ],
)
def test_a_near_miss_says_why(name, reason, x, scale):
    with register_squash():
        report = zenith.explain(NEIGHBOURS[name])(x, scale)
    reasons = [s.reason for s in report.refused if s.op == "squash"]
    assert len(reasons) == 1 and reason in reasons[0], report


def test_a_literal_that_is_no_attribute_must_be_equal(x):
    def reference(x):
        return jnp.tanh(x * 0.79788) * 0.5

    with zenith.register(reference, lambda x: MARK * reference(x), "*b"):
        assert is_marked(reference, x)
        assert not is_marked(lambda x: jnp.tanh(x * 0.79789) * 0.5, x)
        report = zenith.explain(lambda x: jnp.tanh(x * 0.79789) * 0.5)(x)
    assert "0.7978" in report.refused[0].reason


def test_an_attribute_of_two_values_at_once_is_refused(x):
    def reference(x, *, c):
        return jnp.sin(x + c) * c

    with zenith.register(reference, lambda x, *, c: MARK * reference(x, c=c), "*b", attributes={"c": 2.0}):
        assert is_marked(lambda x: jnp.sin(x + 3.0) * 3.0, x)
        assert not is_marked(lambda x: jnp.sin(x + 3.0) * 4.0, x)


def test_dtypes_of_the_computation_count(scale):
    """The reference computes in the dtype that it is given; a program that widens first is the reference of the wide
    value, and one that narrows its result is no site of the narrow one."""
    x = jnp.linspace(-2, 2, 16, dtype=jnp.bfloat16).reshape(2, 8)
    narrow = scale.astype(jnp.bfloat16)
    with register_squash():
        report = zenith.explain(ft.partial(squash, eps=1e-3))(x, narrow)
        assert "bfloat16[2,8]" in report.fused[0].detail
        wide = zenith.explain(lambda x, s: squash(x.astype(jnp.float32), s, eps=1e-3))(x, scale)
        assert "float32[2,8]" in wide.fused[0].detail

        def mixed(x, s):  # the sum alone is wide, as jnp.sum never does by itself
            energy = jnp.sum(x.astype(jnp.float32) ** 2, -1, keepdims=True).astype(x.dtype)
            return jnp.tanh(x) * s / jnp.sqrt(energy + jnp.bfloat16(1e-3))

        assert "squash" not in zenith.explain(mixed)(x, narrow).counts()


def two_results(x):
    top = jnp.max(x, axis=-1, keepdims=True)
    return jnp.sinh(x - top + 2), jnp.sum(jnp.sinh(x - top + 2), axis=-1)


def test_several_results(x):
    with zenith.register(two_results, lambda x: tuple(MARK * y for y in two_results(x)), "*b d"):
        # The sum needs the first result; the first does not need the sum, which is dead, and not found then.
        assert is_marked(lambda x: two_results(x)[1] * 1.5, x)
        assert not is_marked(lambda x: two_results(x)[0] * 1.5, x)
        both = jax.jit(zenith.fuse(lambda x: (lambda a, b: a * b[..., None])(*two_results(x))))(x)
        plain = (lambda a, b: a * b[..., None])(*two_results(x))
    np.testing.assert_allclose(both, MARK**2 * plain, rtol=1e-5)


def rotated(x, cos, sin):
    """Dimensions matter: slices and a concatenation."""
    first, second = jnp.split(x, 2, axis=-1)
    return x * cos + jnp.concatenate([-second, first], axis=-1) * sin


def test_primitives_that_name_dimensions(x):
    angles = jnp.linspace(0, 1, 5)[:, None] * jnp.ones(8)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    with zenith.register(rotated, lambda *a: MARK * rotated(*a), "*b t d, t d, t d"):
        assert is_marked(rotated, x, cos, sin)

        def other_half(x, cos, sin):
            first, second = jnp.split(x, 2, axis=-1)
            return x * cos + jnp.concatenate([second, -first], axis=-1) * sin

        assert not is_marked(other_half, x, cos, sin)


def gated(x, w, v):
    return jax.nn.silu(x @ w) * (x @ v)


def test_products_and_functions_of_jax_with_their_own_rule(x):
    w, v = (jnp.asarray(np.random.default_rng(i).normal(size=(8, 12)), jnp.float32) for i in (1, 2))
    with zenith.register(gated, lambda *a: MARK * gated(*a), "*b d, d f, d f"):
        assert is_marked(gated, x, w, v)
        assert is_marked(lambda x, w, v: jnp.einsum("btd,fd->btf", x, v.T) * jax.nn.silu(x @ w), x, w, v)
        assert not is_marked(lambda x, w, v: jax.nn.elu(x @ w) * (x @ v), x, w, v)
        assert not is_marked(lambda x, w, v: jax.nn.silu(x @ w) * ((2 * x) @ v), x, w, v)


def test_it_goes_before_the_ops_of_zenith_and_they_take_what_it_declines(x):
    with zenith.configured(use_cost=False):
        refusing = zenith.register(
            jax.nn.softmax, lambda x: MARK * jax.nn.softmax(x), "*b d", supports=lambda x: f"no rows of {x.shape[-1]}"
        )
        with refusing:
            report = zenith.explain(jax.nn.softmax)(x)
            assert [(s.op, s.reason) for s in report.sites] == [("softmax", "no rows of 8"), ("softmax", "")]
        with zenith.register(jax.nn.softmax, lambda x: MARK * jax.nn.softmax(x), "*b d", name="mine"):
            assert zenith.explain(jax.nn.softmax)(x).counts() == {"mine": 1}
            assert is_marked(jax.nn.softmax, x)
        assert zenith.explain(jax.nn.softmax)(x).counts() == {"softmax": 1}


def test_platforms_and_bad_replacements_are_refusals(x, scale):
    function = ft.partial(squash, eps=1e-3)
    with register_squash(platforms=("cuda",)):
        assert "registered for cuda" in zenith.explain(function)(x, scale).refused[0].reason
    with register_squash(lambda x, s, *, eps: s):
        assert "the replacement returns float32[8], the reference float32[2, 5, 8]" in str(
            zenith.explain(function)(x, scale)
        )

    def broken(x, s, *, eps):
        raise NotImplementedError("not today")

    with register_squash(broken):
        assert "NotImplementedError: not today" in str(zenith.explain(function)(x, scale))
        assert not is_marked(function, x, scale)


# --- transformations --------------------------------------------------------------------------------------------------


def plain_loss(x, s):
    return jnp.sum(jnp.sin(squash(x, s, eps=1e-3)))


def same_value(x, s, *, eps):
    """The reference's value by another way, so that derivatives of both kinds can be compared with the reference's."""
    return squash(x, s, eps=eps) + 0 * lax.stop_gradient(s)


@pytest.mark.parametrize(
    "transformed",
    [
        lambda f: jax.value_and_grad(f, (0, 1)),
        lambda f: jax.jacfwd(f, 1),
        lambda f: jax.hessian(f, 1),
        lambda f: lambda x, s: jax.vmap(jax.grad(f), (0, None))(x, s),
        lambda f: jax.grad(jax.checkpoint(f)),
        lambda f: jax.grad(lambda x, s: lax.scan(lambda c, _: (f(x, s) + c, None), 0.0, length=2)[0]),
    ],
    ids=["grad", "jacfwd", "hessian", "vmap of grad", "remat", "scan"],
)
@pytest.mark.parametrize("inside", [True, False])
def test_the_derivative_of_the_reference(transformed, inside, x, scale):
    with register_squash(same_value):
        fused = zenith.jit(transformed(plain_loss)) if inside else jax.jit(transformed(zenith.fuse(plain_loss)))
        found = fused(x, scale)
    expected = transformed(plain_loss)(x, scale)
    jax.tree.map(ft.partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-5), found, expected)


def test_a_replacement_with_its_own_rule_keeps_it(x):
    def reference(x):
        return jnp.tanh(x) + jnp.cos(x)

    @jax.custom_vjp
    def own(x):
        return reference(x)

    own.defvjp(lambda x: (reference(x), x), lambda x, g: (g * 7,))
    with zenith.register(reference, own, "*b"):
        gradient = zenith.jit(jax.grad(lambda x: reference(x).sum()))(x)
    np.testing.assert_array_equal(gradient, np.full(x.shape, 7.0))


@pytest.mark.parametrize("vmap, marks", [("replacement", True), ("batch", True), ("reference", False)])
def test_vmap_outside(vmap, marks, x, scale):
    with register_squash(vmap=vmap):
        mapped = jax.vmap(zenith.fuse(ft.partial(squash, eps=1e-3)), (0, None))(x, scale)
    np.testing.assert_allclose(mapped, squash(x, scale, eps=1e-3) * (MARK if marks else 1), rtol=1e-5)


def test_the_traced_program_is_not_changed(x, scale):
    jaxpr = jax.make_jaxpr(plain_loss)(x, scale)
    before = str(jaxpr)
    with register_squash():
        jax.jit(zenith.fuse(jax.jit(plain_loss)))(x, scale)
        zenith.fuse(lambda *a: jax.core.eval_jaxpr(getattr(jaxpr, "jaxpr", jaxpr), jaxpr.consts, *a))(x, scale)
    assert str(jaxpr) == before


def test_verify_compares_with_the_reference(x, scale):
    with register_squash(same_value):
        verification = zenith.verify(ft.partial(squash, eps=1e-3))(x, scale).check()
    assert len(verification.sites) == 1
    with register_squash():
        wrong = zenith.verify(ft.partial(squash, eps=1e-3))(x, scale)
    assert wrong.sites[0].fused == pytest.approx(MARK - 1, rel=1e-3)


# --- what cannot be registered ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "reference, arguments, options, message",
    [
        (lambda x: lax.scan(lambda c, v: (c, v + 1), 0, x)[1], "b", {}, "primitive scan is in no table"),
        (lambda x: x.T, "a b", {}, "computes nothing"),
        (lambda x: (jnp.sin(x), x), "a b", {}, "returns an argument"),
        (lambda x, y: jnp.sin(x), "a, b", {}, r"does not use its arguments \[1\]"),
        (lambda x, *, c: jnp.sin(x * (c * 2)), "a", {"attributes": {"c": 1.0}}, "attribute c is no literal"),
        (jnp.sin, "*b ?", {}, "arguments must look like"),
        (jnp.sin, [object()], {}, "a signature or example arrays"),
        (jnp.sin, "*b", {"vmap": "sometimes"}, "vmap one of"),
        (jnp.sin, [jnp.ones(3)], {"vmap": "batch"}, "needs a signature"),
        (jnp.sin, "*b", {"dtypes": ["float32", "int32"]}, "1 arguments, but 2 dtypes"),
        (jnp.sin, "*b", {"attributes": {"c": "text"}}, "Python floats or ints"),
    ],
)
def test_what_cannot_be_compared_is_an_error(reference, arguments, options, message):
    with pytest.raises(RegistrationError, match=message):
        zenith.register(reference, reference, arguments, **options)
    assert not zenith.passes.registered.active()


def test_a_users_own_rule_inside_a_reference_is_an_error():
    @jax.custom_jvp
    def own(x):
        return jnp.sin(x)

    own.defjvp(lambda p, t: (own(*p), 2 * t[0]))
    with pytest.raises(RegistrationError, match="cannot be compared"):
        zenith.register(own, jnp.sin, "*b")


def test_examples_fix_the_rank(x):
    with zenith.register(jnp.sinh, lambda x: MARK * jnp.sinh(x), [jnp.ones((3, 4))]):
        assert is_marked(jnp.sinh, x[0])
        assert not is_marked(jnp.sinh, x)
