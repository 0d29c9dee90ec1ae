"""Matchers: one file a pattern. Each looks at one equation of a graph and returns a Match, a Refusal, or None.

None: this is nothing like the pattern. Refusal: it began to look like it; the reason goes into the report.
`MATCHERS` lists them in the order in which they claim equations: attention before the softmax inside it, and over pages
before over their gathered copy; a linear layer, gated or not, and a norm before their activation, a convolution with
the batch norm after it, and batch norm before the layer that it is folded into. The scale and bias of integer weights
are no batch norm.
"""

from zenith_jax.passes.match import (
    activation,
    attention,
    batch_norm,
    conv,
    cross_entropy,
    gated_linear,
    group_norm,
    grouped_conv,
    linear,
    norm,
    paged_attention,
    quantized_linear,
    rope,
    softmax,
)
from zenith_jax.passes.match._match import Match

MATCHERS = (
    paged_attention.match,
    attention.match,
    cross_entropy.match,
    group_norm.match,
    norm.match,
    quantized_linear.match,
    rope.match,
    conv.match,
    batch_norm.match,
    gated_linear.match,
    linear.match,
    activation.match,
    softmax.match,
    grouped_conv.match,
)

__all__ = ["MATCHERS", "Match"]
