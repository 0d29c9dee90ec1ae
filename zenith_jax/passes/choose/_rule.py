"""What a rule is, and what those of both platforms share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from zenith_jax.errors import Refusal, refuse

# (the match's case, whether it is differentiated) -> why it is left to XLA, or None
Rule = Callable[[dict[str, Any], bool], Refusal | None]


def each_loss(case: dict[str, Any], differentiated: bool) -> Refusal | None:
    """Of a linear layer with its cross entropy, on any platform."""
    if differentiated and not case["summed"]:
        return refuse(
            "the gradient of each loss would cost a fourth product",
            advice="sum the losses, weighted or not, in the function that is differentiated",
        )
    return None
