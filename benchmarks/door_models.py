"""One model written in every framework, with one set of weights: for doors.py.

The weights are a tree of NumPy arrays, {"layer": {"kernel": ..., "bias": ...}}, as linen has them; each framework's
form takes it: `function(params, x)`, an nnx and a linen module, a torch module.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx


@dataclasses.dataclass(frozen=True)
class Model:
    """input_shape: of one example. torch, keras: make a module, and a model, whose inputs are laid out as JAX's."""

    params: dict[str, Any]
    input_shape: tuple[int, ...]
    function: Callable[[Any, Any], Any]
    nnx: Callable[[], nnx.Module]
    linen: Callable[[], linen.Module]
    torch: Callable[[], Any]
    keras: Callable[[], Any]
    is_variables: bool = False  # params are linen's variables as a whole, statistics of batch norms included


def dense(rng: np.random.Generator, *shape: int) -> dict[str, np.ndarray]:
    """Kernel and bias of a linear layer (in, out) or a convolution (height, width, in, out)."""
    scale = np.sqrt(2 / np.prod(shape[:-1]))
    return {"kernel": np.float32(rng.normal(size=shape) * scale), "bias": np.float32(rng.normal(size=shape[-1:]) * 0.1)}


def loaded(module: nnx.Module, params: dict[str, Any]) -> nnx.Module:
    nnx.update(module, nnx.State(jax.tree.map(jnp.asarray, params)))
    return module


# --- the convolutional network of MNIST tutorials ---------------------------------------------------------------------


def mnist_cnn() -> Model:
    rng = np.random.default_rng(0)
    params = {
        "conv1": dense(rng, 3, 3, 1, 32),
        "conv2": dense(rng, 3, 3, 32, 64),
        "fc1": dense(rng, 7 * 7 * 64, 128),
        "fc2": dense(rng, 128, 10),
    }

    def convolved(p: Any, x: Any) -> Any:
        y = jax.lax.conv_general_dilated(x, p["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return linen.max_pool(jax.nn.relu(y + p["bias"]), (2, 2), (2, 2))

    def function(params: Any, x: Any) -> Any:
        x = convolved(params["conv2"], convolved(params["conv1"], x)).reshape(x.shape[0], -1)
        x = jax.nn.relu(x @ params["fc1"]["kernel"] + params["fc1"]["bias"])
        return x @ params["fc2"]["kernel"] + params["fc2"]["bias"]

    class Nnx(nnx.Module):
        def __init__(self) -> None:
            rngs = nnx.Rngs(0)
            self.conv1, self.conv2 = nnx.Conv(1, 32, (3, 3), rngs=rngs), nnx.Conv(32, 64, (3, 3), rngs=rngs)
            self.fc1, self.fc2 = nnx.Linear(7 * 7 * 64, 128, rngs=rngs), nnx.Linear(128, 10, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            for conv in (self.conv1, self.conv2):
                x = nnx.max_pool(nnx.relu(conv(x)), (2, 2), (2, 2))
            return self.fc2(nnx.relu(self.fc1(x.reshape(x.shape[0], -1))))

    class Linen(linen.Module):
        @linen.compact
        def __call__(self, x: Any) -> Any:
            for name, channels in (("conv1", 32), ("conv2", 64)):
                x = linen.max_pool(linen.relu(linen.Conv(channels, (3, 3), name=name)(x)), (2, 2), (2, 2))
            x = linen.relu(linen.Dense(128, name="fc1")(x.reshape(x.shape[0], -1)))
            return linen.Dense(10, name="fc2")(x)

    def torch_module() -> Any:
        import torch
        from torch import nn

        class Torch(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.conv1, self.conv2 = nn.Conv2d(1, 32, 3, padding=1), nn.Conv2d(32, 64, 3, padding=1)
                self.fc1, self.fc2 = nn.Linear(7 * 7 * 64, 128), nn.Linear(128, 10)

            def forward(self, x: Any) -> Any:
                x = x.permute(0, 3, 1, 2)
                for conv in (self.conv1, self.conv2):
                    x = nn.functional.max_pool2d(torch.relu(conv(x)), 2)
                x = x.permute(0, 2, 3, 1).reshape(x.shape[0], -1)
                return self.fc2(torch.relu(self.fc1(x)))

        return torch_loaded(Torch(), params)

    def keras_model() -> Any:
        import keras

        x = inputs = keras.Input((28, 28, 1))
        for name, channels in (("conv1", 32), ("conv2", 64)):
            x = keras.layers.Conv2D(channels, 3, padding="same", activation="relu", name=name)(x)
            x = keras.layers.MaxPooling2D()(x)
        x = keras.layers.Dense(128, activation="relu", name="fc1")(keras.layers.Flatten()(x))
        return keras_loaded(keras.Model(inputs, keras.layers.Dense(10, name="fc2")(x)), params)

    return Model(params, (28, 28, 1), function, lambda: loaded(Nnx(), params), Linen, torch_module, keras_model)


# --- an encoder as BERT's ---------------------------------------------------------------------------------------------


def encoder(*, layers: int = 12, width: int = 768, heads: int = 12, length: int = 128) -> Model:
    """BERT-base's layers by default, post-norm, with exact gelu; its input are embeddings."""
    rng = np.random.default_rng(0)

    def norm() -> dict[str, np.ndarray]:
        return {"scale": np.float32(1 + 0.1 * rng.normal(size=width)), "bias": np.float32(0.1 * rng.normal(size=width))}

    names = ("query", "key", "value", "out")
    params = {
        f"layer_{i}": {
            **{name: dense(rng, width, width) for name in names},
            "norm1": norm(),
            "up": dense(rng, width, 4 * width),
            "down": dense(rng, 4 * width, width),
            "norm2": norm(),
        }
        for i in range(layers)
    }

    def split(x: Any) -> Any:
        return x.reshape(*x.shape[:-1], heads, width // heads)

    def block(layer: Callable[[str], Callable[[Any], Any]], x: Any) -> Any:
        """One layer, whatever library its parts are of."""
        q, k, v = (split(layer(name)(x)) for name in names[:3])
        x = layer("norm1")(x + layer("out")(jax.nn.dot_product_attention(q, k, v).reshape(x.shape)))
        return layer("norm2")(x + layer("down")(jax.nn.gelu(layer("up")(x), approximate=False)))

    def part(p: Any) -> Callable[[Any], Any]:
        def normed(x: Any) -> Any:
            mean = x.mean(-1, keepdims=True)
            variance = jnp.square(x - mean).mean(-1, keepdims=True)
            return (x - mean) * jax.lax.rsqrt(variance + 1e-6) * p["scale"] + p["bias"]

        return normed if "scale" in p else lambda x: x @ p["kernel"] + p["bias"]

    def function(params: Any, x: Any) -> Any:
        for i in range(layers):
            x = block(lambda name, p=params[f"layer_{i}"]: part(p[name]), x)
        return x

    class NnxLayer(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            for name in names:
                setattr(self, name, nnx.Linear(width, width, rngs=rngs))
            self.norm1, self.norm2 = nnx.LayerNorm(width, rngs=rngs), nnx.LayerNorm(width, rngs=rngs)
            self.up, self.down = nnx.Linear(width, 4 * width, rngs=rngs), nnx.Linear(4 * width, width, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            return block(lambda name: getattr(self, name), x)

    class Nnx(nnx.Module):
        def __init__(self) -> None:
            rngs = nnx.Rngs(0)
            for i in range(layers):
                setattr(self, f"layer_{i}", NnxLayer(rngs))

        def __call__(self, x: Any) -> Any:
            for i in range(layers):
                x = getattr(self, f"layer_{i}")(x)
            return x

    class LinenLayer(linen.Module):
        @linen.compact
        def __call__(self, x: Any) -> Any:
            sizes = {"up": 4 * width}
            make = {"norm1": linen.LayerNorm, "norm2": linen.LayerNorm}
            return block(lambda n: make[n](name=n) if n in make else linen.Dense(sizes.get(n, width), name=n), x)

    class Linen(linen.Module):
        @linen.compact
        def __call__(self, x: Any) -> Any:
            for i in range(layers):
                x = LinenLayer(name=f"layer_{i}")(x)
            return x

    def torch_module() -> Any:
        from torch import nn

        class Layer(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                for name in names:
                    setattr(self, name, nn.Linear(width, width))
                self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
                self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

            def forward(self, x: Any) -> Any:
                q, k, v = (split(getattr(self, name)(x)).transpose(1, 2) for name in names[:3])
                attended = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
                x = self.norm1(x + self.out(attended))
                return self.norm2(x + self.down(nn.functional.gelu(self.up(x))))

        module = nn.Sequential(*(Layer() for _ in range(layers)))
        for i in range(layers):
            torch_loaded(module[i], params[f"layer_{i}"])
        return module.eval()

    def keras_model() -> Any:
        import keras

        def layer(i: int) -> Callable[[str], Any]:
            def part(name: str) -> Any:
                if "norm" in name:
                    return keras.layers.LayerNormalization(epsilon=1e-6, name=f"layer_{i}-{name}")
                return keras.layers.Dense(4 * width if name == "up" else width, name=f"layer_{i}-{name}")

            return part

        x = inputs = keras.Input((length, width))
        for i in range(layers):
            part = layer(i)
            q, k, v = (keras.layers.Reshape((length, heads, width // heads))(part(n)(x)) for n in names[:3])
            logits = keras.ops.einsum("bthd,bshd->bhts", q, k) / float(np.sqrt(width // heads))
            attended = keras.ops.einsum("bhts,bshd->bthd", keras.ops.softmax(logits), v)
            x = part("norm1")(x + part("out")(keras.layers.Reshape((length, width))(attended)))
            x = part("norm2")(x + part("down")(keras.ops.gelu(part("up")(x), approximate=False)))
        flat = {f"layer_{i}-{n}": p for i in range(layers) for n, p in params[f"layer_{i}"].items()}
        return keras_loaded(keras.Model(inputs, x), flat)

    return Model(params, (length, width), function, lambda: loaded(Nnx(), params), Linen, torch_module, keras_model)


def torch_loaded(module: Any, params: dict[str, Any]) -> Any:
    """The torch module with the weights: kernels transposed to torch's order."""
    import torch

    orders = {2: (1, 0), 4: (3, 2, 0, 1)}
    with torch.no_grad():
        for name, p in params.items():
            part = getattr(module, name)
            weight = p["kernel"].transpose(orders[p["kernel"].ndim]) if "kernel" in p else p["scale"]
            part.weight.copy_(torch.from_numpy(np.ascontiguousarray(weight)))
            if "bias" in p:
                part.bias.copy_(torch.from_numpy(p["bias"]))
    return module.eval()


def keras_loaded(model: Any, params: dict[str, Any]) -> Any:
    """The Keras model with the weights, of layers by name: they are laid out as linen's."""
    for name, p in params.items():
        model.get_layer(name).set_weights([p[k] for k in ("kernel", "scale", "bias", "mean", "var") if k in p])
    return model
