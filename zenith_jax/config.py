"""Configuration: one frozen `Config`, and the one table of environment variables.

Read `config()`; change it with `configure(...)` for the process or `with configured(...)` for a block.
Both act while a function is traced; a function that is compiled already does not change.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import threading
from collections.abc import Iterator
from typing import Any

# variable -> (field of Config, parser)
ENVIRONMENT = {
    "ZENITH_DISABLE": ("enabled", lambda text: text not in ("1", "true", "yes")),
    "ZENITH_PLATFORM": ("platform", lambda text: text or None),
    "ZENITH_COST": ("use_cost", lambda text: text not in ("0", "false", "no")),
    "ZENITH_LOG": ("log", lambda text: text),
    "ZENITH_TELEMETRY": ("telemetry", lambda text: int(text or 0)),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """enabled: False makes `zenith.jit` plain `jax.jit`.
    platform: "cpu" or "cuda", for which kernels are chosen while tracing; None is JAX's default backend.
    use_cost: False fuses wherever a kernel is right, also where XLA is known to be faster (tests, benchmarks).
    log: "", "info", "debug" or "json" (info, a JSON object a line): what stderr is told of each traced function.
    telemetry: every how many calls of a function that is decorated from now on one is timed; 0: none, no overhead.
    choices: a `passes.choose.Choices`, times measured for sites, which decide in place of the rules.
    """

    enabled: bool = True
    platform: str | None = None
    use_cost: bool = True
    log: str = ""
    telemetry: int = 0
    choices: Any = None

    @classmethod
    def from_environment(cls, environ: dict[str, str] | os._Environ = os.environ) -> Config:
        given = {field: parse(environ[name]) for name, (field, parse) in ENVIRONMENT.items() if name in environ}
        return cls(**given)


_process = Config.from_environment()
_local = threading.local()


class JsonFormatter(logging.Formatter):
    """A JSON object a line; `extra={"zenith": x}` adds the keys of x.as_dict() under "zenith"."""

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, Any] = dict(
            time=record.created, level=record.levelname.lower(), logger=record.name, message=record.getMessage()
        )
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        said = getattr(record, "zenith", None)
        if said is not None:
            fields["zenith"] = said.as_dict()
        return json.dumps(fields)


def set_up_logging(level: str) -> None:
    """Sends the logger `zenith_jax` to stderr, for people who asked by ZENITH_LOG=info, =debug or =json.

    An application that configures `logging` itself needs no ZENITH_LOG.
    """
    names = {"info": logging.INFO, "debug": logging.DEBUG, "json": logging.INFO}
    if level not in names:
        raise ValueError(f"ZENITH_LOG must be one of {sorted(names)}, got {level!r}")
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if level == "json" else logging.Formatter("zenith: %(message)s"))
    logger = logging.getLogger("zenith_jax")
    logger.addHandler(handler)
    logger.setLevel(names[level])


def config() -> Config:
    """The configuration in force in this thread."""
    return getattr(_local, "config", None) or _process


def configure(**changes: Any) -> Config:
    """Changes the configuration of the process and returns it."""
    global _process
    _process = dataclasses.replace(_process, **changes)
    return _process


@contextlib.contextmanager
def configured(**changes: Any) -> Iterator[Config]:
    """Changes the configuration of this thread for a `with` block."""
    before = getattr(_local, "config", None)
    _local.config = dataclasses.replace(config(), **changes)
    try:
        yield _local.config
    finally:
        _local.config = before


if _process.log:
    set_up_logging(_process.log)
