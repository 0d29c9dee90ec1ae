"""GPT-2 in Flax nnx, as anybody would write it: the model of train_gpt2_nnx.py and of benchmarks/h100.

Axes: b sequences, t tokens, d features. Radford et al. 2019, "Language Models are Unsupervised Multitask Learners";
biases, pre-layernorm and the tied output embedding as there, gelu with erf.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx


@dataclasses.dataclass(frozen=True)
class Config:
    vocabulary: int = 50304  # 50257 rounded up to a multiple of 128, as training codes do
    length: int = 1024
    layers: int = 12
    heads: int = 12
    features: int = 768
    dtype: Any = jnp.bfloat16  # of parameters and arithmetic


SMALL = Config()  # 124 million parameters
TINY = Config(vocabulary=256, length=128, layers=2, heads=4, features=128, dtype=jnp.float32)


class Block(nnx.Module):
    def __init__(self, config: Config, rngs: nnx.Rngs):
        d = config.features
        dtypes: dict[str, Any] = dict(dtype=config.dtype, param_dtype=config.dtype)
        self.attention_norm = nnx.LayerNorm(d, epsilon=1e-5, **dtypes, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(config.heads, d, decode=False, **dtypes, rngs=rngs)
        self.norm = nnx.LayerNorm(d, epsilon=1e-5, **dtypes, rngs=rngs)
        self.up = nnx.Linear(d, 4 * d, **dtypes, rngs=rngs)
        self.down = nnx.Linear(4 * d, d, **dtypes, rngs=rngs)

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        x = x + self.attention(self.attention_norm(x), mask=mask)
        return x + self.down(jax.nn.gelu(self.up(self.norm(x)), approximate=False))


class GPT2(nnx.Module):
    """token ids (b, t) -> logits of the next token (b, t, vocabulary)."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        dtypes: dict[str, Any] = dict(dtype=config.dtype, param_dtype=config.dtype)
        small = nnx.initializers.normal(0.02)
        self.tokens = nnx.Embed(config.vocabulary, config.features, embedding_init=small, **dtypes, rngs=rngs)
        self.positions = nnx.Embed(config.length, config.features, embedding_init=small, **dtypes, rngs=rngs)
        self.blocks = nnx.List([Block(config, rngs) for _ in range(config.layers)])
        self.norm = nnx.LayerNorm(config.features, epsilon=1e-5, **dtypes, rngs=rngs)

    def __call__(self, ids: jax.Array) -> jax.Array:
        x = self.tokens(ids) + self.positions(jnp.arange(ids.shape[1]))
        mask = nnx.make_causal_mask(ids)
        for block in self.blocks:
            x = block(x, mask)
        return self.tokens.attend(self.norm(x))


def next_token_loss(model: GPT2, ids: jax.Array) -> jax.Array:
    """Mean cross-entropy of each token given those before it, in float32."""
    logits = model(ids[:, :-1]).astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]).mean()
