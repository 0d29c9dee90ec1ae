"""ResNet-50 in every framework with one set of weights, batch norms as they are after training: for doors.py.

Deep Residual Learning, arXiv:1512.03385, with the stride in the 3x3 convolution, as torchvision has it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from door_models import Model, dense, keras_loaded, loaded, torch_loaded
from flax import linen, nnx

EPSILON = 1e-5


def resnet(*, stages: tuple[int, ...] = (3, 4, 6, 3), width: int = 64, size: int = 224) -> Model:
    """ResNet-50 by default. Convolutions are without bias, each followed by a batch norm in inference mode."""
    rng = np.random.default_rng(0)

    def blocks() -> Iterator[tuple[str, int, int, int]]:
        """(name, channels in, inner channels, stride) of each bottleneck."""
        channels = width
        for stage, count in enumerate(stages):
            for i in range(count):
                inner = width * 2**stage
                yield f"stage{stage}_{i}", channels, inner, 2 if stage and not i else 1
                channels = 4 * inner

    shapes = {"stem": (7, 7, 3, width)}
    for name, channels, inner, _ in blocks():
        shapes[f"{name}_1"] = (1, 1, channels, inner)
        shapes[f"{name}_2"] = (3, 3, inner, inner)
        shapes[f"{name}_3"] = (1, 1, inner, 4 * inner)
        if channels != 4 * inner:
            shapes[f"{name}_down"] = (1, 1, channels, 4 * inner)
    last = 4 * width * 2 ** (len(stages) - 1)
    convs = {name: {"kernel": dense(rng, *shape)["kernel"]} for name, shape in shapes.items()}
    norms = {
        # Small in the last of a block: sums over blocks stay near one.
        f"{name}_norm": {
            "scale": np.float32(rng.uniform(0.5, 1, shape[-1]) * (0.3 if name.endswith("_3") else 1)),
            "bias": np.float32(rng.normal(size=shape[-1]) * 0.1),
        }
        for name, shape in shapes.items()
    }
    statistics = {
        f"{name}_norm": {
            "mean": np.float32(rng.normal(size=shape[-1]) * 0.1),
            "var": np.float32(rng.uniform(0.5, 1.5, shape[-1])),
        }
        for name, shape in shapes.items()
    }
    params = {**convs, **norms, "classify": dense(rng, last, 1000)}

    def forward(conv: Callable[[str, Any, int], Any], classify: Callable[[Any], Any], x: Any) -> Any:
        """The network, whatever library its parts are of. conv(name, x, stride): a convolution and its norm."""
        x = jax.nn.relu(conv("stem", x, 2))
        x = linen.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        for name, channels, inner, stride in blocks():
            y = jax.nn.relu(conv(f"{name}_1", x, 1))
            y = conv(f"{name}_3", jax.nn.relu(conv(f"{name}_2", y, stride)), 1)
            x = jax.nn.relu(y + (x if channels == 4 * inner else conv(f"{name}_down", x, stride)))
        return classify(x.mean((1, 2)))

    def function(variables: Any, x: Any) -> Any:
        params, stats = variables["params"], variables["batch_stats"]

        def conv(name: str, x: Any, stride: int) -> Any:
            kernel, norm, s = params[name]["kernel"], params[f"{name}_norm"], stats[f"{name}_norm"]
            pad = kernel.shape[0] // 2
            y = jax.lax.conv_general_dilated(
                x, kernel, (stride, stride), ((pad, pad), (pad, pad)), dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            return (y - s["mean"]) * (jax.lax.rsqrt(s["var"] + EPSILON) * norm["scale"]) + norm["bias"]

        head = params["classify"]
        return forward(conv, lambda x: x @ head["kernel"] + head["bias"], x)

    strides = {"stem": 2} | {f"{n}_{part}": s for n, _, _, s in blocks() for part in ("2", "down")}

    class Nnx(nnx.Module):
        def __init__(self) -> None:
            rngs = nnx.Rngs(0)
            for name, (h, w, channels, features) in shapes.items():
                stride, pad = strides.get(name, 1), h // 2
                setattr(
                    self, name, nnx.Conv(channels, features, (h, w), stride, padding=pad, use_bias=False, rngs=rngs)
                )
                setattr(self, f"{name}_norm", nnx.BatchNorm(features, epsilon=EPSILON, rngs=rngs))
            self.classify = nnx.Linear(last, 1000, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            def conv(name: str, x: Any, stride: int) -> Any:
                return getattr(self, f"{name}_norm")(getattr(self, name)(x))

            return forward(conv, self.classify, x)

    class Linen(linen.Module):
        @linen.compact
        def __call__(self, x: Any) -> Any:
            def conv(name: str, x: Any, stride: int) -> Any:
                h, w, _, features = shapes[name]
                x = linen.Conv(features, (h, w), stride, padding=h // 2, use_bias=False, name=name)(x)
                return linen.BatchNorm(use_running_average=True, epsilon=EPSILON, name=f"{name}_norm")(x)

            return forward(conv, linen.Dense(1000, name="classify"), x)

    def nnx_module() -> nnx.Module:
        merged = {n: {**p, **statistics.get(n, {})} for n, p in params.items()}
        module = loaded(Nnx(), merged)
        module.eval()
        return module

    def torch_module() -> Any:
        import torch
        from torch import nn

        class Torch(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                for name, (h, _, channels, features) in shapes.items():
                    conv = nn.Conv2d(channels, features, h, strides.get(name, 1), padding=h // 2, bias=False)
                    setattr(self, name, conv)
                    setattr(self, f"{name}_norm", nn.BatchNorm2d(features, eps=EPSILON))
                self.classify = nn.Linear(last, 1000)

            def conv(self, name: str, x: Any) -> Any:
                return getattr(self, f"{name}_norm")(getattr(self, name)(x))

            def forward(self, x: Any) -> Any:
                x = nn.functional.max_pool2d(torch.relu(self.conv("stem", x.permute(0, 3, 1, 2))), 3, 2, 1)
                for name, channels, inner, _ in blocks():
                    y = torch.relu(self.conv(f"{name}_2", torch.relu(self.conv(f"{name}_1", x))))
                    y = self.conv(f"{name}_3", y)
                    x = torch.relu(y + (x if channels == 4 * inner else self.conv(f"{name}_down", x)))
                return self.classify(x.mean((2, 3)))

        module = torch_loaded(Torch(), params)
        for name, s in statistics.items():
            norm = getattr(module, name)
            norm.running_mean.copy_(torch.from_numpy(s["mean"]))
            norm.running_var.copy_(torch.from_numpy(s["var"]))
        return module

    def keras_model() -> Any:
        import keras

        def conv(name: str, x: Any, stride: int) -> Any:
            h, _, _, features = shapes[name]
            x = keras.layers.ZeroPadding2D(h // 2)(x) if h > 1 else x
            x = keras.layers.Conv2D(features, h, stride, use_bias=False, name=name)(x)
            return keras.layers.BatchNormalization(epsilon=EPSILON, name=f"{name}_norm")(x)

        inputs = keras.Input((size, size, 3))
        x = keras.layers.ZeroPadding2D(1)(keras.layers.ReLU()(conv("stem", inputs, 2)))  # nothing is below zero
        x = keras.layers.MaxPooling2D(3, 2)(x)
        for name, channels, inner, stride in blocks():
            y = keras.layers.ReLU()(conv(f"{name}_1", x, 1))
            y = conv(f"{name}_3", keras.layers.ReLU()(conv(f"{name}_2", y, stride)), 1)
            x = keras.layers.ReLU()(y + (x if channels == 4 * inner else conv(f"{name}_down", x, stride)))
        x = keras.layers.Dense(1000, name="classify")(keras.layers.GlobalAveragePooling2D()(x))
        merged = {n: {**p, **statistics.get(n, {})} for n, p in params.items()}
        return keras_loaded(keras.Model(inputs, x), merged)

    variables = {"params": params, "batch_stats": statistics}
    return Model(variables, (size, size, 3), function, nnx_module, Linen, torch_module, keras_model, is_variables=True)
