"""Where a kernel of ours beats XLA: measured rules, per platform.

A matched site that a rule refuses stays XLA's, with the rule's reason in the report. Figures: docs/performance.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from zenith_jax.errors import Refusal, refuse
from zenith_jax.passes.match import Match

KERNEL_DTYPES = ("float32", "float16", "bfloat16")


def _cpu_attention(case: dict[str, Any], differentiated: bool) -> Refusal | None:
    del differentiated
    if case["t"] * case["s"] < 64 * 64:
        return refuse("XLA is as fast for {t} x {s} logits on the CPU", t=case["t"], s=case["s"])
    return None


def _cpu_activation(case: dict[str, Any], differentiated: bool) -> Refusal | None:
    del differentiated
    if case["size"] < 4096:
        return refuse("XLA is as fast for {n} elements on the CPU", n=case["size"])
    return None


def _small_rows(case: dict[str, Any], differentiated: bool) -> Refusal | None:
    del differentiated
    if case["size"] < 16384:
        return refuse("XLA is as fast for {n} elements on the CPU", n=case["size"])
    return None


def _cuda_activation(case: dict[str, Any], differentiated: bool) -> Refusal | None:
    del case, differentiated
    return refuse("on a GPU XLA computes elementwise functions inside the loops around them, without a pass of memory")


RULES: dict[tuple[str, str], Callable[[dict[str, Any], bool], Refusal | None]] = {
    ("cpu", "attention"): _cpu_attention,
    ("cpu", "gelu_erf"): _cpu_activation,
    ("cpu", "gelu_tanh"): _cpu_activation,
    ("cpu", "silu"): _cpu_activation,
    ("cpu", "softmax"): _small_rows,
    ("cpu", "layer_norm"): _small_rows,
    ("cpu", "rms_norm"): _small_rows,
    ("cpu", "add_layer_norm"): _small_rows,
    ("cpu", "add_rms_norm"): _small_rows,
    ("cuda", "gelu_erf"): _cuda_activation,
    ("cuda", "gelu_tanh"): _cuda_activation,
    ("cuda", "silu"): _cuda_activation,
}


def declined(match: Match, platform: str, *, differentiated: bool, use_cost: bool) -> Refusal | None:
    """Why the match is left to XLA on this platform, or None."""
    case = dict(match.case)
    if platform not in ("cpu", "cuda"):
        return refuse("there are no kernels for {platform}", platform=platform)
    if np.dtype(case["dtype"]).name not in KERNEL_DTYPES:
        return refuse(
            "there is no kernel for {dtype}", dtype=case["dtype"], advice="float32, float16 and bfloat16 have one"
        )
    if any(n == 0 for v in match.leaves for n in v.aval.shape):
        return refuse("an operand is empty")
    if platform == "cuda" and match.op == "attention" and max(case["d"], case["e"]) > 256:
        return refuse("the head size {d} is over 256", d=max(case["d"], case["e"]))
    rule = RULES.get((platform, match.op))
    return rule(case, differentiated) if rule is not None and use_cost else None
