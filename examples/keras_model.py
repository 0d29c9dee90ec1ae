"""A Keras model in Zenith: tf.Tensor in, tf.Tensor out, any batch; and saved as a file that needs no TensorFlow.

pip install 'zenith-jax[tensorflow]'
"""

import os
import pathlib
import tempfile

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf

import zenith_jax as zenith

keras.utils.set_random_seed(0)
model = keras.Sequential(
    [
        keras.Input((28, 28, 1)),
        keras.layers.Conv2D(16, 3, activation="relu"),
        keras.layers.BatchNormalization(),
        keras.layers.MaxPooling2D(),
        keras.layers.Flatten(),
        keras.layers.Dense(64, activation="gelu"),
        keras.layers.Dense(10, activation="softmax"),
    ]
)

fast = zenith.tensorflow.compile(model)
for batch in (1, 64):
    images = tf.random.normal((batch, 28, 28, 1))
    difference = tf.reduce_max(tf.abs(fast(images) - model(images, training=False)))
    print(f"batch {batch}: largest difference {float(difference):.1e}")
print(fast.report)

with tempfile.TemporaryDirectory() as folder:
    path = zenith.compile(model, images).save(pathlib.Path(folder) / "mnist.zenith")
    loaded = zenith.load(path)
    print(f"saved and loaded, {path.stat().st_size / 1e3:.0f} kB: {np.shape(loaded(images.numpy()))}")
