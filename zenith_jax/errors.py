"""Exceptions that users meet, and refusals, which are data and not exceptions."""

from __future__ import annotations

import dataclasses
from typing import Any


class ZenithError(Exception):
    """Base class of every exception that Zenith raises on purpose."""


class ShapeError(ZenithError, ValueError):
    """An array has the wrong rank or size. The text names op, invariant, what came, and what to do."""


class DTypeError(ZenithError, TypeError):
    """An array has a dtype that the op does not compute in."""


class NativeError(ZenithError, RuntimeError):
    """A native module is missing or cannot be used here. The text holds the command that fixes it."""


class RegistrationError(ZenithError, ValueError):
    """A function given to `zenith.register` cannot be a pattern, or what is to replace it does not fit it."""


class VerificationError(ZenithError, AssertionError):
    """`zenith.verify` found a fused result further from float64 than rounding explains."""


class FrontendError(ZenithError, TypeError):
    """An object that is no model, or example inputs that do not fit it. The text says what to give instead."""


class MissingExtraError(ZenithError, ImportError):
    """An optional package is not installed. The text holds the command that installs it."""


class InputError(ZenithError, TypeError):
    """A call of a compiled model with other inputs than it was compiled for."""


class SavedModelError(ZenithError, ValueError):
    """A file that is no saved model, is damaged, or was saved for another version or platform."""


class ServingError(ZenithError, ValueError):
    """A model cannot be served as asked, or there is no server here. The text says what to change."""


@dataclasses.dataclass(frozen=True)
class Refusal:
    """Why a fusion does not apply. Becomes text only when shown: `str(refusal)`.

    reason: a format string over `values`. advice: the one thing that the user could change, or "".
    depth: how far the match came; the report shows the furthest-reaching refusal of a site.
    """

    reason: str
    values: dict[str, Any] = dataclasses.field(default_factory=dict)
    advice: str = ""
    depth: int = 0

    def __str__(self) -> str:
        text = self.reason.format(**self.values)
        return f"{text}; {self.advice}" if self.advice else text


def refuse(reason: str, *, advice: str = "", depth: int = 0, **values: Any) -> Refusal:
    """`Refusal` with its values as keywords: refuse("head size {d} is not 8-aligned", d=d)."""
    return Refusal(reason, values, advice, depth)
