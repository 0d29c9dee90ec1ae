"""What is measured: functions as people write them, with the sizes of real models.

Axes: b batch, t s query/key length, h heads, d features. Work is what the function needs at least: floating-point
operations of the matrix products, or bytes of its arrays, each read or written once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

Arguments = tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Case:
    """function(*arguments), and its gradient in all arguments where `gradient` is set.

    make: () -> (function, arguments), arrays of `dtype` in them.
    work, gradient_work: number of `unit`s; a gradient includes the part of the forward pass that it needs.
    """

    name: str
    sizes: str
    dtype: str
    make: Callable[[], tuple[Callable[..., Any], Arguments]]
    unit: Literal["flop", "byte"]
    work: float
    gradient_work: float
    gradient: bool = False

    @property
    def label(self) -> str:
        return " ".join((self.name, self.sizes, self.dtype, *(("gradient",) if self.gradient else ())))

    def program(self) -> tuple[Callable[..., Any], Arguments]:
        """What is compiled and timed, and its arguments."""
        function, arguments = self.make()
        if not self.gradient:
            return function, arguments
        cotangent = jax.tree.map(lambda y: _array(y.shape, y.dtype, seed=99), jax.eval_shape(function, *arguments))
        return lambda cotangent, *primals: jax.vjp(function, *primals)[1](cotangent), (cotangent, *arguments)


def cases(platform: str) -> list[Case]:
    """The list for "cpu" or "cuda"."""
    return CPU if platform == "cpu" else CUDA


# --- functions --------------------------------------------------------------------------------------------------------


def dot_product_attention(q: Any, k: Any, v: Any) -> Any:
    return jax.nn.dot_product_attention(q, k, v)


def causal_attention(q: Any, k: Any, v: Any) -> Any:
    return jax.nn.dot_product_attention(q, k, v, is_causal=True)


def einsum_attention(q: Any, k: Any, v: Any) -> Any:
    logits = jnp.einsum("bthd,bshd->bhts", q, k) / np.sqrt(q.shape[-1]).astype(q.dtype)
    return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(logits, axis=-1), v)


def gelu_erf(x: Any) -> Any:
    return jax.nn.gelu(x, approximate=False)


def gelu_tanh(x: Any) -> Any:
    return jax.nn.gelu(x, approximate=True)


def swiglu(gate: Any, value: Any) -> Any:
    return jax.nn.silu(gate) * value


def geglu_of_halves(x: Any) -> Any:
    gate, value = jnp.split(x, 2, axis=-1)
    return jax.nn.gelu(gate, approximate=False) * value


def layer_norm(x: Any, scale: Any, bias: Any) -> Any:
    wide = x.astype(jnp.float32)
    centred = wide - wide.mean(axis=-1, keepdims=True)
    variance = jnp.square(centred).mean(axis=-1, keepdims=True)
    return (centred * jax.lax.rsqrt(variance + 1e-5) * scale + bias).astype(x.dtype)


def rms_norm(x: Any, scale: Any) -> Any:
    wide = x.astype(jnp.float32)
    mean_square = jnp.square(wide).mean(axis=-1, keepdims=True)
    return (wide * jax.lax.rsqrt(mean_square + 1e-6) * scale).astype(x.dtype)


def group_norm_silu(x: Any, scale: Any, bias: Any) -> Any:
    """32 groups of the channels of an image (b, h, w, c), as Flax writes them."""
    grouped = x.astype(jnp.float32).reshape(*x.shape[:-1], 32, -1)
    mean, square = grouped.mean((1, 2, 4)), jnp.square(grouped).mean((1, 2, 4))
    variance = jnp.maximum(0.0, square - jnp.square(mean))
    mean, variance = (jnp.repeat(v, x.shape[-1] // 32, axis=-1)[:, None, None] for v in (mean, variance))
    return jax.nn.silu(((x - mean) * (jax.lax.rsqrt(variance + 1e-6) * scale) + bias).astype(x.dtype))


def add_layer_norm(x: Any, residual: Any, scale: Any, bias: Any) -> Any:
    total = x + residual
    return layer_norm(total, scale, bias), total


# --- cases ------------------------------------------------------------------------------------------------------------


def _array(shape: tuple[int, ...], dtype: Any, seed: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32), dtype)


def _arrays(shapes: tuple[tuple[int, ...], ...], dtype: Any) -> Arguments:
    return tuple(_array(shape, dtype, seed) for seed, shape in enumerate(shapes))


def attention_case(function: Callable, b: int, h: int, s: int, d: int, dtype: str = "float32") -> Case:
    """Self-attention of b x h heads. Its backward pass has five matrix products, the forward pass two."""
    flops = 4.0 * b * h * s * s * d * (0.5 if function is causal_attention else 1)
    shapes = ((b, s, h, d),) * 3
    return Case(
        function.__name__,
        f"b{b} h{h} s{s} d{d}",
        dtype,
        lambda: (function, _arrays(shapes, dtype)),
        "flop",
        flops,
        3.5 * flops,
    )


def rows_case(
    name: str, function: Callable, rows: int, d: int, dtype: str = "float32", *, arrays: int = 1, parameters: int = 0
) -> Case:
    """`arrays` arrays of (rows, d) in and as many out; `parameters` arrays of (d,)."""
    shapes = ((rows, d),) * arrays + ((d,),) * parameters
    size = float(rows * d * jnp.dtype(dtype).itemsize)
    # The gradient reads the arguments and the cotangents, and writes one array: those of a sum are equal.
    return Case(
        name,
        f"{rows}x{d}",
        dtype,
        lambda: (function, _arrays(shapes, dtype)),
        "byte",
        2 * arrays * size,
        (2 * arrays + 1) * size,
    )


def gated_case(function: Callable, rows: int, d: int, dtype: str = "float32") -> Case:
    """Gate and value of (rows, d), apart or as halves of one array. The gradient reads three arrays and writes two."""
    shapes = ((rows, d),) * 2 if function is swiglu else ((rows, 2 * d),)
    size = float(rows * d * jnp.dtype(dtype).itemsize)
    make = lambda: (function, _arrays(shapes, dtype))  # noqa: E731
    return Case(function.__name__, f"{rows}x{d}", dtype, make, "byte", 3 * size, 5 * size)


def image_case(function: Callable, b: int, size: int, c: int, dtype: str = "float32") -> Case:
    """An image in, with two arrays of its channels, and one out; the gradient reads two and writes one."""
    shapes = ((b, size, size, c), (c,), (c,))
    count = float(b * size * size * c * jnp.dtype(dtype).itemsize)
    make = lambda: (function, _arrays(shapes, dtype))  # noqa: E731
    return Case(function.__name__, f"{b}x{size}x{size}x{c}", dtype, make, "byte", 2 * count, 3 * count)


def encoder_layer_case(b: int, t: int, dtype: str = "float32") -> Case:
    """A layer of the demo's model, stock Flax nnx, with a padding mask."""
    from flax import nnx

    from zenith_jax.demo.minilm import Config, Layer

    config = Config()
    d = config.features

    def make() -> tuple[Callable, Arguments]:
        graph, state = nnx.split(Layer(config, jnp.dtype(dtype), nnx.Rngs(0)))
        mask = jnp.arange(t)[None] < jnp.arange(t, t - 8 * b, -8)[:, None]
        function = lambda state, x: nnx.merge(graph, state)(x, mask[:, None, None, :])  # noqa: E731
        return function, (state, _array((b, t, d), dtype, 0))

    flops = 2.0 * b * t * (4 * d * d + 2 * d * config.hidden) + 4.0 * b * t * t * d
    return Case("nnx encoder layer", f"b{b} t{t} d{d}", dtype, make, "flop", flops, 3 * flops)


def _with_gradients(*cases: Case) -> list[Case]:
    return [c for case in cases for c in (case, dataclasses.replace(case, gradient=True))]


CPU = [
    *_with_gradients(
        attention_case(dot_product_attention, 1, 12, 1024, 64),
        attention_case(causal_attention, 1, 12, 1024, 64),
    ),
    attention_case(einsum_attention, 1, 12, 1024, 64),
    attention_case(dot_product_attention, 1, 12, 128, 64),
    attention_case(dot_product_attention, 16, 12, 128, 32),
    attention_case(dot_product_attention, 1, 8, 4096, 64),
    *_with_gradients(
        rows_case("gelu_erf", gelu_erf, 4096, 1024),
        rows_case("gelu_tanh", gelu_tanh, 4096, 1024),
        rows_case("silu", jax.nn.silu, 4096, 1024),
        gated_case(swiglu, 512, 1024),
        gated_case(geglu_of_halves, 512, 1024),
        rows_case("layer_norm", layer_norm, 512, 768, parameters=2),
        rows_case("layer_norm", layer_norm, 4096, 1024, parameters=2),
        rows_case("rms_norm", rms_norm, 512, 768, parameters=1),
        rows_case("rms_norm", rms_norm, 4096, 1024, parameters=1),
        rows_case("add + layer_norm", add_layer_norm, 4096, 1024, arrays=2, parameters=2),
        image_case(group_norm_silu, 1, 64, 320),
        rows_case("softmax", jax.nn.softmax, 512, 768),
        rows_case("softmax", jax.nn.softmax, 4096, 1024),
        encoder_layer_case(8, 128),
    ),
]

CUDA = _with_gradients(
    attention_case(dot_product_attention, 32, 12, 512, 64, "bfloat16"),
    attention_case(causal_attention, 8, 12, 1024, 64, "bfloat16"),
    attention_case(causal_attention, 4, 16, 4096, 128, "bfloat16"),
    attention_case(dot_product_attention, 8, 12, 1024, 64, "float32"),
    rows_case("gelu_erf", gelu_erf, 16384, 3072, "bfloat16"),
    gated_case(swiglu, 16384, 3072, "bfloat16"),
    gated_case(geglu_of_halves, 16384, 3072, "bfloat16"),
    rows_case("layer_norm", layer_norm, 32768, 768, "bfloat16", parameters=2),
    rows_case("layer_norm", layer_norm, 8192, 16384, "bfloat16", parameters=2),
    rows_case("rms_norm", rms_norm, 8192, 4096, "bfloat16", parameters=1),
    rows_case("add + layer_norm", add_layer_norm, 32768, 768, "bfloat16", arrays=2, parameters=2),
    image_case(group_norm_silu, 8, 64, 320, "bfloat16"),
    rows_case("softmax", jax.nn.softmax, 32768, 1024, "bfloat16"),
    encoder_layer_case(32, 512, "bfloat16"),
)
