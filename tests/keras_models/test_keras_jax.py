"""zenith.compile of Keras models that compute in JAX: Keras' answers, from every kind of model.

Keras computes in one framework in each process: with TensorFlow installed, KERAS_BACKEND=jax runs these tests.
"""

import importlib.util
import os

os.environ.setdefault("KERAS_BACKEND", "jax" if importlib.util.find_spec("tensorflow") is None else "tensorflow")

import jax.numpy as jnp
import numpy as np
import pytest

keras = pytest.importorskip("keras")
if keras.backend.backend() != "jax":
    pytest.skip(f"Keras computes in {keras.backend.backend()} here", allow_module_level=True)

import zenith_jax as zenith
from zenith_jax.errors import FrontendError, MissingExtraError

# h5py asks arrays for a copy in NumPy's old way.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
CLOSE = dict(rtol=1e-4, atol=1e-5)  # a few dozen float32 roundings of values of size 1
RNG = np.random.default_rng(0)


def images(n):
    return jnp.asarray(RNG.normal(size=(n, 28, 28, 1)), jnp.float32)


@pytest.fixture(scope="module")
def cnn():
    keras.utils.set_random_seed(0)
    model = keras.Sequential([
        keras.Input((28, 28, 1)), keras.layers.Conv2D(8, 3, activation="relu"), keras.layers.BatchNormalization(),
        keras.layers.MaxPooling2D(), keras.layers.Dropout(0.5), keras.layers.Flatten(),
        keras.layers.Dense(10, activation="softmax"),
    ])  # fmt: skip
    for variable in model.non_trainable_variables:  # statistics that do something
        if "moving" in variable.path:
            variable.assign(RNG.uniform(0.5, 1.5, variable.shape))
    return model


@pytest.fixture(scope="module")
def encoder():
    keras.utils.set_random_seed(0)
    tokens = keras.Input((16,), dtype="int32", name="tokens")
    segments = keras.Input((16,), dtype="int32", name="segments")
    x = keras.layers.Embedding(50, 32)(tokens) + keras.layers.Embedding(2, 32)(segments)
    x = keras.layers.LayerNormalization()(x + keras.layers.MultiHeadAttention(4, 8)(x, x))
    y = keras.layers.Dense(32)(keras.layers.Dense(64, activation="gelu")(x))
    x = keras.layers.LayerNormalization()(x + y)
    logits = keras.layers.Dense(3)(keras.layers.GlobalAveragePooling1D()(x))
    return keras.Model([tokens, segments], {"logits": logits, "hidden": x})


def inputs_of_encoder(n):
    return jnp.asarray(RNG.integers(0, 50, (n, 16)), jnp.int32), jnp.asarray(RNG.integers(0, 2, (n, 16)), jnp.int32)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_it_answers_as_in_inference(cnn, mode):
    x = images(4)
    model = zenith.compile(cnn, x, mode=mode)
    np.testing.assert_allclose(model(x), cnn(x, training=False), **CLOSE)
    assert model.framework == "keras" and [i.name for i in model.inputs] == [i.name for i in cnn.inputs]


def test_it_outlives_the_training_of_the_model():
    own, x = keras.Sequential([keras.Input((8,)), keras.layers.Dense(3)]), jnp.ones((4, 8))
    model, before = zenith.compile(own, x), np.asarray(own(x))
    assert set(model.params) == {"trainable", "non_trainable"}
    own.compile(optimizer="sgd", loss="mse")
    own.fit(np.ones((8, 8)), np.ones((8, 3)), verbose=0)  # which donates the variables' arrays
    np.testing.assert_allclose(model(x), before, **CLOSE)


def test_names_go_with_the_inputs_of_a_dict(encoder):
    tokens, segments = inputs_of_encoder(2)
    wide = keras.Model({"b": keras.Input((2,), name="b"), "a": (a := keras.Input((5,), name="a"))}, a * 2)
    model = zenith.compile(wide, {"b": jnp.ones((3, 2)), "a": jnp.ones((3, 5))})
    assert [(i.name, i.shape) for i in model.inputs] == [("a", (3, 5)), ("b", (3, 2))]
    model = zenith.compile(encoder, {"tokens": tokens, "segments": segments})
    assert [i.name for i in model.inputs] == ["segments", "tokens"]
    expected = encoder([tokens, segments], training=False)["logits"]
    np.testing.assert_allclose(model({"tokens": tokens, "segments": segments})["logits"], expected, **CLOSE)


def test_what_it_does_not_take(cnn):
    with pytest.raises(FrontendError, match="in the dtypes of its layers"):
        zenith.compile(cnn, images(1), precision="bf16")
    with pytest.raises(FrontendError, match=r"a Keras model is a keras\.Model, got KerasTensor"):
        zenith.compile(keras.Input((2,)), jnp.ones((1, 2)))


def test_several_inputs_and_named_outputs(encoder):
    given = inputs_of_encoder(3)
    model = zenith.compile(encoder, *given)
    expected = encoder(list(given), training=False)
    result = model(*given)
    assert set(result) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(result[name], value, **CLOSE)
    packed = zenith.compile(encoder, list(given))  # as Keras takes them
    np.testing.assert_allclose(packed(list(given))["logits"], expected["logits"], **CLOSE)


def test_its_parts_are_fused(encoder):
    model = zenith.compile(encoder, *inputs_of_encoder(2))
    assert {"add_layer_norm", "gelu_erf"} <= {site.op for site in model.report.sites}
    x = keras.Input((128, 256))
    layer = keras.Model(x, keras.layers.MultiHeadAttention(4, 64, name="multi_head_attention")(x, x))
    sites = zenith.compile(layer, jnp.ones((4, 128, 256))).report.sites
    assert "attention" in {site.op for site in sites}
    assert all("multi_head_attention" in site.source for site in sites)


def test_the_batch_is_a_dimension_of_its_own(cnn):
    model = zenith.compile(cnn, dynamic={"batch": (1, 4)})
    x = images(3)
    np.testing.assert_allclose(model(x), cnn(x, training=False), **CLOSE)
    with pytest.raises(FrontendError, match="has no fixed shape"):
        zenith.compile(cnn)


def test_a_model_of_ones_own_class_is_built_by_the_examples():
    class Own(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense, self.norm = keras.layers.Dense(5), keras.layers.LayerNormalization()

        def call(self, x, scale):
            return self.norm(self.dense(x)) * scale, x

    own, x = Own(), jnp.ones((2, 3))
    with pytest.raises(FrontendError, match="has no weights yet"):
        zenith.compile(own)
    model = zenith.compile(own, x, 2.0 * jnp.ones(()))
    for a, b in zip(model(x, jnp.full((), 2.0)), own(x, jnp.full((), 2.0)), strict=True):
        np.testing.assert_allclose(a, b, **CLOSE)


def test_files(cnn, tmp_path):
    x = images(2)
    cnn.save(tmp_path / "cnn.keras")
    model = zenith.compile(tmp_path / "cnn.keras", x)
    np.testing.assert_allclose(model(x), cnn(x, training=False), **CLOSE)
    loaded = zenith.load(model.save(tmp_path / "cnn.zenith"))
    np.testing.assert_allclose(loaded(x), cnn(x, training=False), **CLOSE)
    (tmp_path / "damaged.keras").write_bytes(b"no model")
    for name, message in (("none.keras", "there is no file"), ("damaged.keras", "Keras cannot read")):
        with pytest.raises(FrontendError, match=message):
            zenith.compile(tmp_path / name, x)


def test_layers_of_one_name_keep_their_weights():
    keras.utils.set_random_seed(0)

    class Twice(keras.Model):
        def __init__(self):
            super().__init__()
            self.first, self.second = (keras.layers.Dense(4, name="same") for _ in range(2))

        def call(self, x):
            return self.second(keras.ops.tanh(self.first(x)))

    outer, given = Twice(), jnp.asarray(RNG.normal(size=(2, 4)), jnp.float32)
    outer(given)
    assert len({v.path for v in outer.variables}) < len(outer.variables)  # what makes it a test
    np.testing.assert_allclose(zenith.compile(outer, given)(given), outer(given), **CLOSE)


def test_a_model_that_changes_when_it_is_called_is_refused():
    class Counting(keras.layers.Layer):
        def build(self, _):
            self.calls = self.add_weight(shape=(), name="calls", trainable=False, initializer="zeros")

        def call(self, x):
            self.calls.assign(self.calls + 1)
            return x + self.calls

    model = keras.Sequential([keras.Input((3,)), Counting(name="counting")])
    with pytest.raises(FrontendError, match=r"changes .*calls when it is called"):
        zenith.compile(model, jnp.ones((1, 3)))


def test_without_keras_the_door_says_what_is_missing(monkeypatch, tmp_path):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "keras" else find(name, *a))
    with pytest.raises(MissingExtraError, match="a Keras model needs the package keras"):
        zenith.compile(tmp_path / "model.keras")


def test_the_door_of_tensorflow_names_the_right_one(cnn, monkeypatch):
    from zenith_jax.frontends import tensorflow

    monkeypatch.setitem(__import__("sys").modules, "tensorflow", object())
    with pytest.raises(FrontendError, match=r"Keras computes in jax here: zenith\.compile"):
        tensorflow._concrete(cnn, None)
