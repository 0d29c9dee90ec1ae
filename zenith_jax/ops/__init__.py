"""The ops: plain differentiable JAX functions, each on a kernel of ours. One file an op."""

from zenith_jax.ops import _lower as _lower  # registers the lowerings
from zenith_jax.ops.activation import gelu, silu
from zenith_jax.ops.attention import attention
from zenith_jax.ops.conv import conv
from zenith_jax.ops.cross_entropy import cross_entropy
from zenith_jax.ops.gated import gated_activation, gated_activation_of_halves
from zenith_jax.ops.gated_linear import gated_linear
from zenith_jax.ops.group_norm import group_norm
from zenith_jax.ops.linear import linear
from zenith_jax.ops.linear_cross_entropy import linear_cross_entropy
from zenith_jax.ops.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from zenith_jax.ops.paged_attention import paged_attention
from zenith_jax.ops.quantized_linear import quantized_linear
from zenith_jax.ops.rope import rope
from zenith_jax.ops.softmax import softmax

__all__ = [
    "add_layer_norm",
    "add_rms_norm",
    "attention",
    "conv",
    "cross_entropy",
    "gated_activation",
    "gated_activation_of_halves",
    "gated_linear",
    "gelu",
    "group_norm",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "paged_attention",
    "quantized_linear",
    "rms_norm",
    "rope",
    "silu",
    "softmax",
]
