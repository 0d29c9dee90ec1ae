"""Parsed -> Parsed, before anything is traced: what an ONNX file says in many nodes, in fewer and better ones.

Each pass is a pure function that can be run, printed and tested alone:

    >>> print(PASSES["batch_norm"](parsed))

`load` runs those of PASSES in this order, or the ones that its argument `passes` names.

No pass chooses a layout. XLA does, and convolutions took the same time with channels first and last. Three bottleneck
blocks of ResNet-50, batch 2, NCHW and NHWC, in ms: 256/64 channels of 56 x 56, 49.0 and 48.7; 1024/256 of 14 x 14, 39.8
and 39.9; three of MobileNetV2, 144 channels of 56 x 56, 76.6 and 76.5. What does count is how the weights lie: with
those of 1024/256 as HWIO in memory it is 35.2, but then they would not be the file's parameters any more. (Two cores
with AVX2, jax 0.10.2, 2026-11.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from zenith_jax.frontends.onnx.parsed import Parsed
from zenith_jax.frontends.onnx.passes import batch_norm, constants, identities, quantized, transposes, unread

PASSES: Mapping[str, Callable[[Parsed], Parsed]] = {
    "transposes": transposes.composed,
    "identities": identities.without_identities,
    "integers": quantized.in_integers,  # before dequantised weights are folded
    "constants": constants.folded,
    "batch_norm": batch_norm.into_products,  # finds weights only where no Identity is in between
    "unread": unread.without_unread,  # what the others have left over
}
