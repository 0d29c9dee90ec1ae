"""What this door raises, and how it says that torch runs something instead."""

from __future__ import annotations

import logging
import threading
import warnings

from zenith_jax.errors import ZenithError

logger = logging.getLogger("zenith_jax")
_said: set[str] = set()
_lock = threading.Lock()


class TorchError(ZenithError, RuntimeError):
    """A module, or a call of it, that does not run in JAX. The text is the reason and what to change."""


class FallbackWarning(UserWarning):
    """A module, or a part of it, runs in torch and not in Zenith."""


def warn_fallback(what: str, reason: str, stacklevel: int = 4) -> None:
    """Once for each text. stacklevel: of who called the module, seen from here."""
    text = f"{what} runs in torch: {reason}"
    with _lock:
        if text in _said:
            return
        _said.add(text)
    logger.info(text)
    warnings.warn(text, FallbackWarning, stacklevel=stacklevel)
