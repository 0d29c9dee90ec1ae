"""What was fused, what was not, and why: the record of one rewriting, as text or as a table."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

logger = logging.getLogger("zenith_jax")


@dataclasses.dataclass(frozen=True)
class Site:
    """One place in the user's program. reason: why it was not fused, "" where it was."""

    op: str
    fused: bool
    source: str
    detail: str = ""
    reason: str = ""
    where: str = ""  # "", or the control flow around it: "scan", "remat/scan"
    differentiated: bool = False


@dataclasses.dataclass(frozen=True)
class Report:
    """All sites of one traced function, in the order of the program."""

    sites: tuple[Site, ...]
    platform: str

    @property
    def fused(self) -> list[Site]:
        return [s for s in self.sites if s.fused]

    @property
    def refused(self) -> list[Site]:
        return [s for s in self.sites if not s.fused]

    def counts(self) -> dict[str, int]:
        """{op: number of fused sites}."""
        return dict(Counter(s.op for s in self.fused))

    def _rows(self) -> list[tuple[str, ...]]:
        grouped = Counter(self.sites)
        return [
            (
                str(n) if n > 1 else "",
                "fused" if s.fused else "XLA",
                s.op,
                s.detail,
                "/".join(p for p in (s.where, "grad" if s.differentiated else "") if p),
                s.source,
                s.reason,
            )
            for s, n in grouped.items()
        ]

    def __str__(self) -> str:
        head = f"zenith on {self.platform}: {len(self.fused)} sites fused, {len(self.refused)} left to XLA"
        lines = [
            "  "
            + "  ".join(part for part in (f"{n}x" if n else "", status, op, detail, where, source) if part)
            + (f"\n      because {reason}" if reason else "")
            for n, status, op, detail, where, source, reason in self._rows()
        ]
        return "\n".join([head, *lines])

    def __rich__(self) -> Any:
        from rich.table import Table

        table = Table(title=str(self).split("\n", 1)[0])
        for column in ("n", "by", "op", "shape", "in", "source", "reason"):
            table.add_column(column, overflow="fold")
        for row in self._rows():
            table.add_row(*row, style="green" if row[1] == "fused" else None)
        return table


_local = threading.local()


@contextlib.contextmanager
def collecting() -> Iterator[list[Site]]:
    """Sites rewritten in this thread during the block, also by traces of nested functions."""
    before = getattr(_local, "sites", None)
    _local.sites = []
    try:
        yield _local.sites
    finally:
        if before is not None:
            before.extend(_local.sites)
        _local.sites = before


def log_sites(function: Any, sites: Sequence[Site], platform: str) -> None:
    """Tells the logger `zenith_jax`, once for each trace, what became of the sites of `function`."""
    if not sites or not logger.isEnabledFor(logging.INFO):
        return
    name = getattr(function, "__qualname__", repr(function))
    fused = sum(s.fused for s in sites)
    logger.info("%s on %s: %d sites fused, %d left to XLA", name, platform, fused, len(sites) - fused)
    for site, n in Counter(sites).items():
        if not site.fused:
            logger.info("%s: %dx %s at %s is left to XLA because %s", name, n, site.op, site.source, site.reason)
        else:
            logger.debug("%s: %dx %s at %s is fused", name, n, site.op, site.source)


def record(site: Site) -> None:
    if getattr(_local, "sites", None) is not None:
        _local.sites.append(site)
