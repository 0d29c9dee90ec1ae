"""What a random program is made of: choices, drawn once and replayed at each trace; and the arrays that it asks for.

A builder (attention.py, rows.py, ...) is a function of a `Script` and of traced values. It asks the script for every
decision and for every parameter. The first run draws the decisions; each later one, in another trace, gets the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# One in so many decisions that could be wrong is.
WRONG_ONE_IN = 24


@dataclasses.dataclass(frozen=True)
class Want:
    """An array that a program asks for. kind: see `array`."""

    kind: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def array_dtype(self) -> Any:
        return jnp.dtype(bool if self.kind == "mask" else self.dtype.partition("<")[0])

    def zeros(self) -> Any:
        return jnp.zeros(self.shape, self.array_dtype)

    def array(self, rng: np.random.Generator) -> np.ndarray:
        """normal; scale, about 1; weight, a matrix that keeps magnitudes; mask, about 70 % True; label, below a bound
        that is written behind the dtype, "int32<5"; any_label, which may be the bound, or -1: no class; length, up to
        the bound; integer, of 4 bits."""
        _, _, bound = self.dtype.partition("<")
        dtype = self.array_dtype
        if self.kind == "mask":
            return rng.random(self.shape) < 0.7
        if self.kind == "label":
            return rng.integers(int(bound), size=self.shape).astype(dtype)
        if self.kind == "any_label":
            return rng.integers(-1, int(bound) + 1, size=self.shape).astype(dtype)
        if self.kind == "length":
            return rng.integers(1, int(bound) + 1, size=self.shape).astype(dtype)
        if self.kind == "integer":
            return rng.integers(-8, 8, size=self.shape).astype(dtype)
        x = rng.normal(size=self.shape)
        if self.kind == "scale":
            x = 1 + 0.3 * x
        if self.kind == "weight":
            x = x / np.sqrt(self.shape[-2])
        return x.astype(dtype)


@dataclasses.dataclass
class Record:
    """Decisions, and those of the parts."""

    choices: list[int] = dataclasses.field(default_factory=list)
    parts: list[Record] = dataclasses.field(default_factory=list)

    def frozen(self) -> tuple[Any, ...]:
        return tuple(self.choices), tuple(p.frozen() for p in self.parts)

    @classmethod
    def thawed(cls, frozen: tuple[Any, ...]) -> Record:
        return cls(list(frozen[0]), [cls.thawed(p) for p in frozen[1]])


class Script:
    """One run through a Record. draw(n): below n, for decisions that are not in it yet; None: the first option."""

    def __init__(
        self,
        record: Record,
        supply: Callable[[Want], Any],
        draw: Callable[[int], int] | None = None,
        told: list[str] | None = None,
        poisoned: bool = False,
    ):
        self.record, self.supply, self.draw = record, supply, draw
        self.told = told if told is not None else []
        self.poisoned = poisoned  # an argument holds a NaN or an infinity
        self._at = self._part = 0

    # --- decisions

    def below(self, n: int) -> int:
        if self._at == len(self.record.choices):
            self.record.choices.append(self.draw(n) if self.draw is not None else 0)
        value = self.record.choices[self._at] % n
        self._at += 1
        return value

    def pick(self, what: str, *options: Any) -> Any:
        """One of the options, the first where nothing is drawn. Callables and values, named by `str`."""
        i = self.below(len(options))
        if i:
            self.told.append(f"{what}={_name(options[i], i)}")
        return options[i]

    def spell(self, what: str, right: Sequence[Any], wrong: Sequence[Any]) -> Any:
        """One of the right options, seldom a wrong one: a near miss, which is another function."""
        if self.one_in(WRONG_ONE_IN):
            i = self.below(len(wrong))
            self.told.append(f"{what}=WRONG {_name(wrong[i], i)}")
            return wrong[i]
        return self.pick(what, *right)

    def one_in(self, n: int, what: str = "") -> bool:
        found = self.below(n) == n - 1
        if found and what:
            self.told.append(what)
        return found

    def shuffled(self, what: str, letters: str) -> str:
        rest, out = list(letters), ""
        while rest:
            out += rest.pop(self.below(len(rest)))
        if out != letters:
            self.told.append(f"{what}={out}")
        return out

    # --- arrays

    def array(self, kind: str, shape: Sequence[int], dtype: Any = "float32") -> Any:
        return self.supply(Want(kind, tuple(shape), dtype if isinstance(dtype, str) else jnp.dtype(dtype).name))

    # --- parts, for the bodies of control flow

    def part(self) -> Callable[[Callable, Callable[[Want], Any]], Script]:
        """A part's own decisions: call the result at each trace of the body, with where its arrays come from."""
        if self._part == len(self.record.parts):
            self.record.parts.append(Record())
        record = self.record.parts[self._part]
        self._part += 1
        return lambda supply: Script(record, supply, self.draw, self.told, self.poisoned)  # pyright: ignore

    def wanted(self, part: Callable, body: Callable, *args: Any) -> list[Want]:
        """What a body asks for: body(script, *args), traced."""
        wants: list[Want] = []

        def supply(want: Want) -> Any:
            wants.append(want)
            return want.zeros()

        jax.eval_shape(lambda *a: body(part(supply), *a), *args)
        return wants


def _name(option: Any, i: int) -> str:
    name = getattr(option, "__name__", None) or str(option)
    return f"#{i}" if "lambda" in name else name
