"""A linear layer and the cross entropy of its logits, as one: found, with right values and gradients, without the
array of logits; and what only looks like it."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import zenith_jax as zenith

B, T, D, V = 3, 5, 8, 37


def inputs(rng, dtype=jnp.float32):
    x = jnp.asarray(rng.normal(size=(B, T, D)), dtype)
    w = jnp.asarray(rng.normal(size=(D, V)), dtype)
    return x, w, jnp.asarray(rng.integers(V, size=(B, T)), jnp.int32)


def losses(logits, y):
    return optax.softmax_cross_entropy_with_integer_labels(logits, y)


def hot(y):
    return jax.nn.one_hot(y, V)


def weighted(x, w, y):
    keep = (y % 3 != 0).astype(jnp.float32)
    return (losses(x @ w, y) * keep).sum() / keep.sum()


def ignoring(x, w, y):
    keep = y % 4 != 0
    return jnp.where(keep, losses(x @ w, jnp.where(keep, y, 0)), 0).sum() / keep.sum()


def with_z_loss(x, w, y):
    logits = x @ w
    lse = jax.nn.logsumexp(logits, axis=-1)
    return jnp.mean(lse - (hot(y) * logits).sum(-1) + 1e-2 * lse**2 + 1e-3 * jnp.square(lse - 1))


def per_sequence(x, w, y):
    """A mean over each sequence, weighted again."""
    return jnp.sum(losses(x @ w, y).mean(-1) * jnp.arange(1.0, B + 1)) * 0.5


def shifted(x, w, y):
    """Each position predicts the next one."""
    return losses((x @ w)[:, :-1], y[:, 1:]).mean()


def flattened(x, w, y):
    return losses((x @ w).reshape(-1, V), y.reshape(-1)).mean()


def without_axis(x, w, y):
    return losses((x[:, :, None] @ w)[:, :, 0].transpose(1, 0, 2), y.T).mean()


# The losses are summed in the program: the gradient is made in the forward pass.
SUMMED = {
    "mean": lambda x, w, y: losses(x @ w, y).mean(),
    "weighted": weighted,
    "ignored labels": ignoring,
    "z-loss": with_z_loss,
    "smoothed": lambda x, w, y: optax.softmax_cross_entropy(x @ w, optax.smooth_labels(hot(y), 0.1)).sum(),
    "per sequence": per_sequence,
    "shifted": shifted,
    "flattened": flattened,
    "tied embedding": lambda x, w, y: losses(x @ w.T.copy().T, y).mean(),
    "einsum": lambda x, w, y: losses(jnp.einsum("btd,dv->btv", x, w), y).mean(),
    "einsum of a table": lambda x, w, y: losses(jnp.einsum("vd,btd->btv", w.T, x), y).mean(),
    "classes first": lambda x, w, y: losses(jnp.einsum("dv,btd->vbt", w, x).transpose(1, 2, 0), y).mean(),
    "a unit axis": without_axis,
    "dot with weights": lambda x, w, y: jnp.vdot(losses(x @ w, y), jnp.cos(1.0 * y)),
    "log_softmax": lambda x, w, y: -jnp.take_along_axis(jax.nn.log_softmax(x @ w), y[..., None], -1).mean(),
}


def together(functions):
    """All of them, each with other weights, as one program: one compilation."""
    return lambda x, w, y: [f(x, w + i / 8, y) for i, f in enumerate(functions)]


def details(function, *args):
    return [(s.op, s.detail) for s in zenith.explain(function)(*args).fused]


def test_summed_losses(rng, check_fused):
    args = inputs(rng)
    for name, function in SUMMED.items():
        expected = [("linear_cross_entropy", f"{D} features, rows of {V}, summed")]
        assert details(function, *args) == expected, name
    run = ["weighted", "z-loss", "smoothed", "per sequence", "shifted", "einsum of a table", "classes first"]
    functions = [SUMMED[name] for name in run]
    check_fused(together(functions), *args, counts={"linear_cross_entropy": len(run)}, floor_ulps=32)


def accuracy_beside(x, w, y):
    logits = x @ w
    return losses(logits, y).mean(), (logits.argmax(-1) == y).mean()


def two_sums(x, w, y):
    loss = losses(x @ w, y)
    return loss.mean() + loss[0].sum()


def cap(logits):
    return 3 * jnp.tanh(logits / 3)


# Found with the layer, but no single number is affine in the rows' values: the losses are what is computed.
EACH = {
    "per token": lambda x, w, y: losses(x @ w, y),
    "a sum of squares": lambda x, w, y: (losses(x @ w, y) ** 2).sum(),
    "square of the mean is after it": lambda x, w, y: losses(x @ w, y).mean(0) ** 2,
    "focal": lambda x, w, y: ((1 - jnp.exp(-(e := losses(x @ w, y)))) * e).mean(),
    "the largest": lambda x, w, y: losses(x @ w, y).max(),
    "weights from the loss": lambda x, w, y: jnp.where((e := losses(x @ w, y)) > 1, e, 0).sum(),
    "a mean and each": lambda x, w, y: ((e := losses(x @ w, y)).mean(), e),
    "product of two rows": lambda x, w, y: ((e := losses(x @ w, y))[0] * e[1]).sum(),
    "product of lse of two rows": lambda x, w, y: (
        (lse := jax.nn.logsumexp(z := x @ w, -1))[0] * lse[1] + (hot(y) * z).sum(-1)[0]
    ).sum(),
}
# The layer stays apart, and cross entropy is found alone. A text: what the report says.
ALONE = {
    "accuracy of the logits": (accuracy_beside, "its logits (float32[3,5,37]) are used elsewhere too"),
    "logits returned": (lambda x, w, y: (losses(x @ w, y).mean(), x @ w), "are used elsewhere too"),
    "logits computed again": (
        lambda x, w, y: (jax.nn.logsumexp(x @ w, -1) ** 2 + losses(x @ w, y)).sum(),
        "are used elsewhere too",
    ),
    "a cap": (lambda x, w, y: losses(cap(x @ w), y).mean(), ""),
    "a bias of the position": (lambda x, w, y: losses(x @ w + jnp.cos(jnp.arange(T))[:, None], y).mean(), ""),
    "a bias of class and sequence": (lambda x, w, y: losses(x @ w + jnp.cos(x[:, :1] @ w), y).mean(), ""),
    "two biases": (lambda x, w, y: losses(x @ w + w[0] + w[1], y).mean(), ""),
    "classes left out": (lambda x, w, y: losses((x @ w)[..., : V - 1], jnp.minimum(y, V - 2)).mean(), ""),
    "every other position": (lambda x, w, y: losses((x @ w)[:, ::2], y[:, ::2]).mean(), ""),
    "weights of each sequence": (
        lambda x, w, y: losses(jnp.einsum("btd,bdv->btv", x, w * jnp.arange(1.0, 4)[:, None, None]), y).mean(),
        "",
    ),
    "classes and tokens mixed": (lambda x, w, y: losses((x[:, :, :1] @ w[:1]).reshape(B, V, T).mT, y).mean(), ""),
}


def test_losses_that_are_not_summed(rng, check_fused):
    args = inputs(rng)
    for name, function in EACH.items():
        assert details(function, *args) == [("linear_cross_entropy", f"{D} features, rows of {V}, each")], name
    functions = [EACH[name] for name in ("focal", "the largest", "product of lse of two rows")]
    check_fused(together(functions), *args, counts={"linear_cross_entropy": 3}, floor_ulps=32)


def test_the_layer_stays_apart(rng, check_fused):
    args = inputs(rng)
    for name, (function, reason) in ALONE.items():
        ((op, detail),) = details(function, *args)
        assert op == "cross_entropy" and reason in detail, name
    functions = [ALONE[name][0] for name in ("a bias of the position", "logits computed again")]
    check_fused(together(functions), *args, counts={"cross_entropy": 2}, floor_ulps=32)


def test_biases_and_casts(rng, check_fused):
    """bfloat16 layers of float32 parameters, as Flax writes them; weights and their gradient stay float32."""
    x, w, y = inputs(rng)
    bias = jnp.asarray(rng.normal(size=V), jnp.float32)

    def function(x, w, bias, y, dtype=jnp.bfloat16):
        logits = x.astype(dtype) @ w.astype(dtype) + bias.astype(dtype)
        return losses(logits[:, 1:].reshape(-1, V).astype(jnp.float32), y[:, 1:].reshape(-1)).mean()

    check_fused(
        function, x, w, bias, y, counts={"linear_cross_entropy": 1}, floor_dtype=jnp.bfloat16,
        oracle=lambda *a: function(*a, dtype=jnp.float32),
    )  # fmt: skip
    jaxpr = str(jax.make_jaxpr(zenith.fuse(jax.grad(function, 1)))(x, w, bias, y))
    assert f"f32[{D},{V}]" in jaxpr
    assert f"bf16[{B},{T},{V}]" not in jaxpr


def test_gradients_wait_for_cotangents_only_where_they_must(rng):
    """Each row's losses, differentiated, cost a fourth product: by the cost rule they are left apart then."""
    x, w, y = inputs(rng)
    x, w, y = jnp.tile(x, (1, 60, 1)), jnp.tile(w, (1, 160)), jnp.tile(y, (1, 60))
    with zenith.configured(use_cost=True):
        for name, function, gradient_op in (
            ("summed", SUMMED["mean"], "linear_cross_entropy"),
            ("each", EACH["a sum of squares"], "cross_entropy"),
        ):
            assert zenith.explain(function)(x, w, y).counts() == {"linear_cross_entropy": 1}, name
            report = zenith.explain(jax.grad(function))(x, w, y)
            assert report.counts() == {gradient_op: 1}, name
    assert "no linear_cross_entropy: " in report.fused[0].detail


@pytest.mark.parametrize(
    "decorated", [lambda f: zenith.jit(jax.grad(f, (0, 1))), lambda f: jax.jit(jax.grad(zenith.jit(f), (0, 1)))]
)
def test_three_products_and_no_logits(rng, decorated):
    """Value and gradients of a chunk come from one array of its logits; of all logits there is none."""
    x, w, y = inputs(rng)
    x, y = jnp.tile(x, (200, 1, 1)), jnp.tile(y, (200, 1))  # 3000 tokens: 8 chunks of 75 x 5
    text = decorated(SUMMED["mean"]).lower(x, w, y).as_text()
    assert len(re.findall(r"stablehlo.dot_general", text)) == 3
    assert f"x{V}xf32" in text
    assert not re.search(rf"tensor<(600x5|3000)x{V}x", text)


def test_one_token(rng, check_fused):
    x, w, y = inputs(rng)
    check_fused(lambda x, w, y: losses(x @ w, y), x[0, :1], w, y[0, :1], counts={"linear_cross_entropy": 1})


def test_a_user_of_the_tail_is_not_taken_in(rng, check_fused):
    """The tail ends where something else begins: a nonlinear function of the mean, and the mean itself."""

    def function(x, w, y):
        mean = losses(x @ w, y).mean()
        return jnp.exp(mean), mean

    check_fused(function, *inputs(rng), counts={"linear_cross_entropy": 1})


def test_labels_that_are_no_class(rng):
    x, w, y = inputs(rng)
    y = y.at[0].set(jnp.array([-1, V, -V, 2 * V, -100]))

    def function(x, w, y):
        return jnp.sum(jnp.where(y == -100, 0, losses(x @ w, y))[1:])

    assert zenith.explain(function)(x, w, y).counts() == {"linear_cross_entropy": 1}
    for f in (function, jax.grad(function, (0, 1))):
        for fused, plain in zip(*map(jax.tree.leaves, (zenith.jit(f)(x, w, y), jax.jit(f)(x, w, y))), strict=True):
            np.testing.assert_allclose(fused, plain, rtol=1e-5, atol=1e-5)


def test_classes_are_whole_on_each_device(rng):
    x, w, y = inputs(rng)
    mesh = jax.make_mesh((2,), ("y",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    sharded = jax.ShapeDtypeStruct((D, 38), w.dtype, sharding=NamedSharding(mesh, P(None, "y")))
    (site,) = zenith.explain(SUMMED["mean"])(x, sharded, y).sites
    assert site.whole == "float32[.,38]"
    assert site.gathered.startswith("dimension 1 of float32[8,38] is sharded over 'y'")
