"""The record of one compilation: frozen, and JSON of a fixed schema."""

from __future__ import annotations

import dataclasses
from typing import Any

from zenith_jax.report import Site

SCHEMA = 1  # of Record.as_dict(): raised when a key is renamed, removed or changes its meaning; new keys may appear

REWRITTEN, COMPILED = "rewritten", "compiled"
PHASES = ("trace", "rewrite", "lower", "compile")


@dataclasses.dataclass(frozen=True)
class Record:
    """One function that was traced and rewritten, and what compiling it took.

    stage: "rewritten" until XLA has compiled the program, then "compiled"; a function that is only explained, or that
    another library compiles, stays at the first.
    function: that was rewritten. program: that was compiled, as JAX names it: the function, or what called it.
    time: of the rewriting's start, in seconds since 1970.
    sites: fused and refused, nested differentiation included, as in `zenith.explain`.
    seconds: by phase. trace: JAX's trace of the program, rewriting included; rewrite: Zenith's part of it;
    lower: to StableHLO; compile: XLA, or the look-up in the persistent cache. What did not happen is absent.
    passes: seconds of Zenith's part by pass.
    cache: "hit" or "miss" of the persistent compilation cache; "" where it is not in use.
    error: why rewriting failed, so that the function runs as it was written; "" normally.
    """

    id: int
    stage: str
    function: str
    program: str
    platform: str
    time: float
    sites: tuple[Site, ...]
    seconds: dict[str, float]
    passes: dict[str, float]
    cache: str = ""
    error: str = ""

    @property
    def fused(self) -> int:
        return sum(s.fused for s in self.sites)

    @property
    def refused(self) -> int:
        return len(self.sites) - self.fused

    @property
    def flops(self) -> int:
        """Of the fused sites, as they were written."""
        return sum(s.flops for s in self.sites if s.fused)

    @property
    def bytes_saved(self) -> int:
        """By the fused sites: of inner values that no longer reach memory, an upper bound."""
        return sum(s.bytes_saved for s in self.sites if s.fused)

    def as_dict(self) -> dict[str, Any]:
        """For JSON, by SCHEMA."""
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "sites"}
        sums = dict(fused=self.fused, refused=self.refused, flops=self.flops, bytes_saved=self.bytes_saved)
        return dict(schema=SCHEMA, **plain, **sums, sites=[s.as_dict() for s in self.sites])

    def __str__(self) -> str:
        times = ", ".join(f"{phase} {self.seconds[phase]:.3f} s" for phase in PHASES if phase in self.seconds)
        cached = f" (cache {self.cache})" if self.cache else ""
        return f"{self.function} on {self.platform}: {self.fused} fused, {self.refused} left to XLA; {times}{cached}"
