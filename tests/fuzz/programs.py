"""Random programs: `programs()` is a hypothesis strategy of `Program`s, which can be printed, replayed and shrunk."""

from __future__ import annotations

import dataclasses
import functools as ft
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from fuzz.losses import cross_entropy
from fuzz.script import Record, Script, Want
from fuzz.surroundings import block
from hypothesis import strategies as st

MODES = ("grad inside", "grad outside", "value", "jvp")
POISON = (None, None, None, None, None, None, None, None, "nan", "inf", "-inf")


@dataclasses.dataclass(frozen=True)
class Program:
    """record: its decisions, see Record.frozen."""

    record: tuple[Any, ...]

    def _run(self, supply: Callable[[Want], Any], draw: Any = None, told: list[str] | None = None) -> Any:
        record = Record.thawed(self.record)
        return _build(Script(record, supply, draw, told)), record

    def __call__(self, *arrays: Any) -> list[Any]:
        """Results, on its arrays."""
        given = iter(arrays)
        return self._run(lambda want: next(given))[0][0]

    @ft.cached_property
    def _traced(self) -> tuple[list[str], list[Want], dict[str, Any]]:
        told: list[str] = []
        wants: list[Want] = []
        facts: dict[str, Any] = {}

        def supply(want: Want) -> Any:
            wants.append(want)
            return want.zeros()

        def run() -> Any:
            (results, found), _ = self._run(supply, told=told)
            facts.update(found)
            return results

        jax.eval_shape(run)
        return told, wants, facts

    @property
    def mode(self) -> str:
        return self._traced[2]["mode"]

    @property
    def poison(self) -> str | None:
        return self._traced[2]["poison"]

    def arrays(self) -> list[np.ndarray]:
        """Its arguments, the same at each call."""
        wants, poison = self._traced[1], self.poison
        rng = np.random.default_rng(len(wants))
        arrays = [np.asarray(w.array(rng)) for w in wants]  # a bfloat16 of shape () would be a scalar
        if poison is not None:
            floats = [a for a in arrays if jnp.issubdtype(a.dtype, jnp.floating) and a.size]
            victim = floats[rng.integers(len(floats))]
            victim[tuple(rng.integers(n) for n in victim.shape)] = float(poison)
        return arrays

    def __str__(self) -> str:
        return (
            f"{self.mode}{f' with {self.poison}' if self.poison else ''}: {', '.join(dict.fromkeys(self._traced[0]))}"
        )


def drawn(draw: Callable[[int], int]) -> Program:
    """A program of decisions by `draw(n)`, below n."""
    record = Record()

    def run() -> Any:
        return _build(Script(record, Want.zeros, draw))[0]

    jax.eval_shape(run)
    return Program(record.frozen())


@st.composite
def programs(draw: Any) -> Program:
    return drawn(lambda n: draw(st.integers(0, n - 1)))


def _build(script: Script) -> tuple[list[Any], dict[str, Any]]:
    facts = dict(mode=script.pick("mode", *MODES), poison=script.pick("poison", *POISON))
    script.poisoned = facts["poison"] is not None
    dtype = script.pick("dtype", jnp.float32, jnp.float32, jnp.float32, jnp.float32, jnp.bfloat16, jnp.float16)
    shape = script.pick("shape", (2, 3, 4), (3, 5), (2, 3, 7), (1, 4, 6), (2, 2, 3, 4), (2, 5, 8), (3, 1, 5), (4, 4))
    x = script.array("normal", shape, dtype)
    results: list[Any] = []
    for _ in range(script.pick("blocks", 1, 2, 2, 3)):
        before = x
        x, taps = block(script, x, depth=2)
        if taps and script.one_in(8):
            i = script.below(len(taps))
            script.told.append(f"inner value {i} returned")
            results.append(taps[i])
        if script.one_in(10, "input returned"):
            results.append(before)
    if script.one_in(4, "loss"):
        results += cross_entropy(script, x)
    return [*results, x], facts
