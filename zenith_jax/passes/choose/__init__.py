"""Where a kernel of ours beats XLA: measured rules, per platform (`cpu.py`, `cuda.py`).

A matched site that a rule refuses stays XLA's, with the rule's reason in the report. Figures: docs/performance.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from zenith_jax.errors import Refusal, refuse
from zenith_jax.ops._op import check_kernel_dtype
from zenith_jax.ops.attention_kernels import unsupported as attention_unsupported
from zenith_jax.ops.conv import unsupported as conv_unsupported
from zenith_jax.ops.gated_linear import unsupported as gated_linear_unsupported
from zenith_jax.ops.group_norm import unsupported as group_norm_unsupported
from zenith_jax.ops.linear import unsupported as linear_unsupported
from zenith_jax.ops.paged_attention import unsupported as paged_attention_unsupported
from zenith_jax.ops.quantized_linear import unsupported as quantized_linear_unsupported
from zenith_jax.passes.choose import cpu, cuda
from zenith_jax.passes.match import Match

RULES = {"cpu": cpu.RULES, "cuda": cuda.RULES}


def _of(case: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: case[name] for name in names}


# What a platform's kernels do not take, whether they would be faster or not: (platform, case) -> why.
UNSUPPORTED: dict[str, Callable[[str, dict[str, Any]], Refusal | None]] = {
    "attention": lambda p, c: attention_unsupported(p, head_size=max(c["d"], c["e"])),
    "paged_attention": lambda p, c: paged_attention_unsupported(
        p, **_of(c, "dtype", "sequences", "groups", "t", "page_size", "d", "e")
    ),
    "group_norm": lambda p, c: group_norm_unsupported(p, **_of(c, "dtype", "channels_last", "width", "groups")),
    "linear": lambda p, c: linear_unsupported(p, w_dtype=c["dtype"], **_of(c, "dtype", "k", "n")),
    "gated_linear": lambda p, c: gated_linear_unsupported(p, w_dtype=c["dtype"], **_of(c, "dtype", "k", "n")),
    "conv": lambda p, c: conv_unsupported(p, c["dtype"]),
    "quantized_linear": lambda p, c: quantized_linear_unsupported(p, **c),
}


@dataclasses.dataclass(frozen=True, eq=False)  # by identity: JAX's caches hold it
class Choices:
    """Times measured for sites, by `Site.key`: microseconds of Zenith's kernel and of XLA's code."""

    times: Mapping[str, tuple[float, float]]

    def declined(self, key: str) -> Refusal | None:
        fused_us, xla_us = self.times.get(key, (0.0, 1.0))
        if fused_us < xla_us:
            return None
        return refuse("XLA was faster here, {xla:.3g} us against {fused:.3g}", xla=xla_us, fused=fused_us)


def declined(match: Match, platform: str, *, differentiated: bool, use_cost: bool) -> Refusal | None:
    """Why the match is left to XLA on this platform, or None."""
    if match.declined is not None:
        return match.declined(platform)
    case = dict(match.case)
    if platform not in ("cpu", "cuda"):
        return refuse("there are no kernels for {platform}", platform=platform)
    unsupported = check_kernel_dtype(match.op, case["dtype"])
    if unsupported is not None:
        return unsupported
    if any(n == 0 for v in match.leaves for n in v.aval.shape):
        return refuse("an operand is empty")
    if match.op in UNSUPPORTED:
        unsupported = UNSUPPORTED[match.op](platform, case)
        if unsupported is not None:
            return unsupported
    rule = RULES[platform].get(match.op)
    if use_cost and any(not isinstance(n, int) for v in match.leaves for n in v.aval.shape):
        return refuse("a dimension is symbolic, and what is faster depends on it")
    return rule(case, differentiated) if rule is not None and use_cost else None
