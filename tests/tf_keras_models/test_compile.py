"""zenith.tensorflow.compile: TensorFlow's answers, from Keras models, functions and SavedModels."""

import gc
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow")
pytest.importorskip("tf2onnx")
import keras

if keras.backend.backend() != "tensorflow":
    pytest.skip(f"Keras computes in {keras.backend.backend()} here", allow_module_level=True)

import zenith_jax as zenith
from zenith_jax.errors import FrontendError, InputError

pytestmark = pytest.mark.filterwarnings("ignore")  # TensorFlow's and tf2onnx's own
CLOSE = dict(rtol=1e-4, atol=1e-5)  # a few dozen float32 roundings of values of size 1


def same(actual, expected):
    tf.nest.assert_same_structure(actual, expected)
    for a, b in zip(tf.nest.flatten(actual), tf.nest.flatten(expected), strict=True):
        assert isinstance(a, tf.Tensor) and a.dtype == b.dtype
        np.testing.assert_allclose(a.numpy(), b.numpy(), **CLOSE)


@pytest.fixture(scope="module")
def cnn():
    keras.utils.set_random_seed(0)
    model = keras.Sequential([
        keras.Input((28, 28, 1)), keras.layers.Conv2D(8, 3, activation="relu"), keras.layers.BatchNormalization(),
        keras.layers.MaxPooling2D(), keras.layers.Dropout(0.5), keras.layers.Flatten(),
        keras.layers.Dense(10, activation="softmax"),
    ])  # fmt: skip
    model(np.random.default_rng(0).normal(size=(8, 28, 28, 1)).astype("float32"), training=True)
    return model


def images(batch):
    return tf.random.normal((batch, 28, 28, 1))


def test_mnist_cnn_with_any_batch(cnn):
    before = gc.get_threshold(), gc.get_freeze_count()
    fast = zenith.tensorflow.compile(cnn)
    for batch in (1, 3, 8):
        x = images(batch)
        same(fast(x), cnn(x, training=False))
    same(fast(images(2).numpy() * 0), cnn(images(2) * 0, training=False))
    assert (gc.get_threshold(), gc.get_freeze_count()) == before  # as it was before tf2onnx ran


def test_transformer_with_two_inputs_and_a_dict_of_outputs():
    keras.utils.set_random_seed(0)
    tokens, segments = (
        keras.Input((None,), dtype="int32", name="tokens"),
        keras.Input((None,), dtype="int64", name="segments"),
    )
    x = keras.layers.Embedding(50, 32)(tokens) + keras.layers.Embedding(2, 32)(segments)
    x = keras.layers.LayerNormalization()(x + keras.layers.MultiHeadAttention(4, 8)(x, x))
    y = keras.layers.Dense(32)(keras.layers.Dense(64, activation="gelu")(x))  # for which tf2onnx leaves an Erfc
    x = keras.layers.LayerNormalization()(x + y)
    logits = keras.layers.Dense(3)(keras.layers.GlobalAveragePooling1D()(x))
    model = keras.Model([tokens, segments], {"logits": logits, "hidden": x})
    fast = zenith.tensorflow.compile(model)
    for shape in ((2, 7), (3, 5)):
        a = tf.random.uniform(shape, 0, 50, tf.int32)
        b = tf.random.uniform(shape, 0, 2, tf.int64)
        expected = model([a, b], training=False)
        same(fast(a, b), expected)
        same(fast([a, b]), expected)
    with zenith.configured(use_cost=False):
        counts = fast.report.counts()
    assert counts.get("gelu_erf") == 1, fast.report
    assert counts.get("add_layer_norm") == 2, fast.report


def test_functions_modules_and_concrete_functions():
    class Scale(tf.Module):
        def __init__(self):
            self.factor = tf.Variable([2.0, 3.0])

        @tf.function(input_signature=[tf.TensorSpec((None, 2), tf.float32)])
        def __call__(self, x):
            return x * self.factor, {"sum": tf.reduce_sum(x)}

    module, x = Scale(), tf.random.normal((4, 2))
    for model in (module, module.__call__, module.__call__.get_concrete_function()):
        same(zenith.tensorflow.compile(model)(x), module(x))
    nested = tf.function(lambda x: {"y": (tf.exp(x), [x + 1]), "a": {"b": x * 2}})
    same(zenith.tensorflow.compile(nested, signature=[tf.TensorSpec((None, 2), tf.float32)])(x), nested(x))
    plain = tf.function(lambda x: tf.nn.relu(x) + 1)
    same(zenith.tensorflow.compile(plain, signature=[tf.TensorSpec((None,), tf.float32)])(x[0]), plain(x[0]))


def test_saved_models_and_keras_files(cnn, tmp_path):
    x = images(2)
    cnn.save(tmp_path / "model.keras")
    same(zenith.tensorflow.compile(tmp_path / "model.keras")(x), cnn(x, training=False))
    cnn.export(tmp_path / "exported", verbose=False)
    (output,) = tf.nest.flatten(zenith.tensorflow.compile(tmp_path / "exported")(x))
    same(output, cnn(x, training=False))


def test_compiled_saved_and_loaded_without_tensorflow(cnn, tmp_path):
    x = images(2)
    model = zenith.compile(cnn, x)
    same(model(x), cnn(x, training=False))
    loaded = zenith.load(model.save(tmp_path / "cnn.zenith"))
    (result,) = loaded(x.numpy())
    np.testing.assert_allclose(result, cnn(x, training=False).numpy(), **CLOSE)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_inputs_are_read_where_they_lie_and_results_outlive_them(mode):
    """Arrays are kept by the memory of tensors, which TensorFlow gives to other tensors."""
    double = tf.function(lambda x: {"twice": x * 2, "sum": tf.reduce_sum(x)})
    x = tf.random.normal((4, 32))
    signature = [tf.TensorSpec((None, 32), tf.float32)]
    functions = zenith.compile(double, x, mode=mode), zenith.tensorflow.compile(double, signature=signature)
    for fast in functions:
        kept = []
        for i in range(20):
            x = tf.random.normal((4, 32)) + i
            kept.append((fast(x), double(x)))
        wrong = tf.zeros((4, 32), tf.int32)  # of the same sizes
        for _ in range(2):
            with pytest.raises(InputError):
                fast(wrong)
        for actual, expected in kept:
            same(actual, expected)


def test_what_is_no_tensor_is_refused_as_an_input():
    x = tf.ones((4, 32))
    fast = zenith.compile(tf.function(lambda x: x * 2), x)
    for wrong in (None, "x", [1.0]):
        with pytest.raises(InputError, match="with 0 JAX or NumPy arrays"):
            fast(wrong)
    same(fast(x), x * 2)


def test_a_model_that_returns_its_input_gives_memory_of_its_own():
    both = tf.function(lambda x, y: (x, tf.identity(y), x + y))
    spec = tf.TensorSpec((None, 32), tf.float32)
    fast = zenith.tensorflow.compile(both, signature=[spec, spec])
    kept = []
    for i in range(20):
        rows = 4 + i % 2
        x, y = tf.random.normal((rows, 32)) + i, tf.random.normal((rows, 32))
        kept.append((fast(x, y), (x.numpy(), y.numpy(), x.numpy() + y.numpy())))
        same(zenith.compile(both, x, y)(x, y) if i < 2 else fast(x, y), both(x, y))
        del x, y
    for actual, expected in kept:
        for a, b in zip(actual, expected, strict=True):
            np.testing.assert_allclose(a.numpy(), b, **CLOSE)


def test_a_call_like_an_earlier_one_makes_no_array(cnn):
    x = images(4)
    model = zenith.compile(cnn, x)
    model(x)
    adapt = model.interface.adapt
    assert adapt((x,))[0] is adapt((x,))[0]
    assert adapt((x[:2],))[0].shape == (2, 28, 28, 1)  # at the same address, if TensorFlow slices in place


def test_wrong_models_and_inputs(cnn, tmp_path):
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for name in ("model.keras", "saved_model.pb"):
        (damaged / name).write_bytes(b"no model")
    with pytest.raises(FrontendError, match=r"takes a Keras model.*got int"):
        zenith.tensorflow.compile(3)
    with pytest.raises(FrontendError, match="neither the folder of a SavedModel"):
        zenith.tensorflow.compile(tmp_path)
    with pytest.raises(FrontendError, match="give signature="):
        zenith.tensorflow.compile(tf.function(lambda x: x))
    for path, message in (
        (tmp_path / "none.keras", "there is no file"),
        (damaged / "model.keras", "Keras cannot read"),
        (damaged, "TensorFlow cannot read"),
    ):
        with pytest.raises(FrontendError, match=message):
            zenith.tensorflow.compile(path)
    with pytest.raises(FrontendError, match=r"give an example of each, got 0"):
        zenith.compile(cnn)
    fast = zenith.tensorflow.compile(cnn)
    with pytest.raises(InputError, match="got 2 inputs"):
        fast(images(1), images(1))
    with pytest.raises(InputError, match=r"shape \(None, 28, 28, 1\), got \(1, 14, 28, 1\)"):
        fast(images(1)[:, :14])
    with pytest.raises(InputError, match=r"is float32, got int32: tf.cast"):
        fast(tf.zeros((1, 28, 28, 1), tf.int32))
