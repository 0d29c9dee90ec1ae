"""Parsed -> Parsed, before anything is traced: what an ONNX file says in many nodes, in fewer and better ones.

Each pass is a pure function that can be run, printed and tested alone:

    >>> print(PASSES["batch_norm"](parsed))

`load` runs those of PASSES in this order, or the ones that its argument `passes` names.

No pass chooses a layout: passes/layout.py does for any program on a CPU, channels first or last, and what it makes of
weights is made once where they are known. They stay the file's parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from zenith_jax.frontends.onnx.parsed import Parsed
from zenith_jax.frontends.onnx.passes import (
    batch_norm,
    constants,
    identities,
    instance_norm,
    quantized,
    transposes,
    unread,
)

PASSES: Mapping[str, Callable[[Parsed], Parsed]] = {
    "transposes": transposes.composed,
    "identities": identities.without_identities,
    "integers": quantized.in_integers,  # before dequantised weights are folded
    "constants": constants.folded,
    "batch_norm": batch_norm.into_products,  # finds weights only where no Identity is in between
    "instance_norm": instance_norm.without_unit_parameters,
    "unread": unread.without_unread,  # what the others have left over
}
