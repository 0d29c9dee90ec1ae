"""zenith.flax.wrap: an nnx or linen module trains as before, with its own interface, and its calls are fused."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import zenith_jax as zenith
from zenith_jax.errors import FrontendError
from zenith_jax.report import collecting

X = np.sin(np.arange(16 * 8, dtype=np.float32)).reshape(16, 8)
Y = np.arange(16) % 4


class Model(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(8, 16, rngs=rngs)
        self.batch_norm = nnx.BatchNorm(16, rngs=rngs)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)
        self.norm = nnx.LayerNorm(16, rngs=rngs)
        self.last = nnx.Linear(16, 4, rngs=rngs)

    def __call__(self, x, rngs=None):
        x = self.dropout(nnx.gelu(self.batch_norm(self.first(x))), rngs=rngs)
        return self.last(self.norm(x))

    def features(self, x):
        return self.norm(self.first(x))


def train(model, steps=4):
    """A usual nnx loop: losses, and the model's state afterwards."""
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        def loss(model):
            return optax.softmax_cross_entropy_with_integer_labels(model(X), Y).mean()

        value, gradients = nnx.value_and_grad(loss)(model)
        optimizer.update(model, gradients)
        return value

    model.train()
    losses = [float(step(model, optimizer)) for _ in range(steps)]
    model.eval()
    return losses, nnx.state(model), nnx.jit(lambda m, x: m(x))(model, X)


def test_an_nnx_loop_trains_as_without():
    plain = train(Model(nnx.Rngs(0)))
    with zenith.configured(use_cost=False), collecting() as sites:
        wrapped = train(zenith.flax.wrap(Model(nnx.Rngs(0))))
    assert {s.op for s in sites if s.fused} >= {"layer_norm", "gelu_tanh"}
    assert wrapped[0][-1] < wrapped[0][0]
    np.testing.assert_allclose(wrapped[0], plain[0], rtol=1e-4)
    assert jax.tree.structure(wrapped[1]) == jax.tree.structure(plain[1])
    for (path, a), (_, b) in zip(nnx.to_flat_state(wrapped[1]), nnx.to_flat_state(plain[1]), strict=True):
        a, b = (jax.random.key_data(v.get_value()) if "key" in path else v.get_value() for v in (a, b))
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5, err_msg=str(path))
    np.testing.assert_allclose(wrapped[2], plain[2], rtol=1e-3, atol=1e-4)


def test_the_wrapped_module_is_one_of_its_class_and_shares_its_variables():
    model = Model(nnx.Rngs(0))
    wrapped = zenith.flax.wrap(model)
    assert isinstance(wrapped, Model)
    assert type(wrapped) is type(zenith.flax.wrap(Model(nnx.Rngs(1))))
    assert wrapped.first.kernel is model.first.kernel
    assert type(model) is Model
    assert type(zenith.flax.wrap(wrapped)) is type(wrapped)


def test_random_streams_and_statistics_advance():
    wrapped = zenith.flax.wrap(Model(nnx.Rngs(0)))
    first, mean = wrapped(X), wrapped.batch_norm.mean.get_value()
    assert not np.allclose(first, wrapped(X)), "dropout used one mask twice"
    assert not np.allclose(mean, wrapped.batch_norm.mean.get_value())
    streams = nnx.Rngs(dropout=7)
    one, two = wrapped(X, rngs=streams), wrapped(X, rngs=streams)
    assert not np.allclose(one, two), "a random stream that is an argument did not advance"
    wrapped.eval()
    np.testing.assert_array_equal(wrapped(X), wrapped(X))


def test_other_methods_are_fused_when_named():
    wrapped = zenith.flax.wrap(Model(nnx.Rngs(0)), methods=("features",))
    with zenith.configured(use_cost=False), collecting() as sites:
        np.testing.assert_allclose(wrapped.features(X), Model(nnx.Rngs(0)).features(X), atol=1e-5)
    assert [s.op for s in sites if s.fused] == ["layer_norm"]
    with pytest.raises(FrontendError, match=r"Model has no methods \['nothing'\]"):
        zenith.flax.wrap(Model(nnx.Rngs(0)), methods=("nothing",))


class Cached(nnx.Module):
    def __init__(self):
        self.scale = nnx.Param(jnp.ones(()))

    def __call__(self, x):
        self.cache = nnx.Cache(x)
        return x * self.scale


def test_a_call_that_adds_variables_runs_as_written():
    wrapped = zenith.flax.wrap(Cached())
    np.testing.assert_array_equal(wrapped(X), X)
    np.testing.assert_array_equal(wrapped.cache[...], X)
    np.testing.assert_array_equal(wrapped(X + 1), X + 1)


def test_checkpoints_of_the_plain_module_load_into_the_wrapped_one(tmp_path):
    checkpoint = pytest.importorskip("orbax.checkpoint", reason="orbax is not installed")
    model, wrapped = Model(nnx.Rngs(0)), zenith.flax.wrap(Model(nnx.Rngs(1)))
    with checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "params", nnx.state(model, nnx.Param))
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "params", nnx.state(wrapped, nnx.Param))
    nnx.update(wrapped, restored)
    model.eval(), wrapped.eval()
    np.testing.assert_allclose(wrapped(X), model(X), atol=1e-5)


class Linen(linen.Module):
    @linen.compact
    def __call__(self, x, train: bool):
        x = linen.BatchNorm(use_running_average=not train)(linen.Dense(16)(x))
        x = linen.Dropout(0.2, deterministic=not train)(linen.gelu(x))
        return linen.Dense(4)(linen.LayerNorm()(x))


def linen_training(module, steps=3):
    variables = module.init(jax.random.key(0), X, train=False)

    @jax.jit
    def step(variables, key):
        def loss(params):
            logits, updates = module.apply(
                {**variables, "params": params}, X, train=True, mutable=["batch_stats"], rngs={"dropout": key}
            )
            return optax.softmax_cross_entropy_with_integer_labels(logits, Y).mean(), updates

        (value, updates), gradients = jax.value_and_grad(loss, has_aux=True)(variables["params"])
        params = jax.tree.map(lambda p, g: p - 0.1 * g, variables["params"], gradients)
        return value, {"params": params, **updates}

    losses = []
    for i in range(steps):
        value, variables = step(variables, jax.random.key(i))
        losses.append(float(value))
    return losses, variables, module.apply(variables, X, train=False)


def test_a_linen_loop_trains_as_without():
    plain = linen_training(Linen())
    with zenith.configured(use_cost=False), collecting() as sites:
        wrapped = linen_training(zenith.flax.wrap(Linen()))
    assert {s.op for s in sites if s.fused} >= {"layer_norm", "gelu_tanh"}
    np.testing.assert_allclose(wrapped[0], plain[0], rtol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), wrapped[1:], plain[1:])


def test_what_is_no_flax_module_is_refused():
    for what, message in ((jnp.tanh, "takes an nnx or linen module"), (Model, "give an instance of it")):
        with pytest.raises(FrontendError, match=message):
            zenith.flax.wrap(what)
