"""What was fused, what was not, and why: the record of one rewriting, as text or as a table."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from zenith_jax import report_html
from zenith_jax.report_html import quantity

logger = logging.getLogger("zenith_jax")


@dataclasses.dataclass(frozen=True)
class Site:
    """One place in the user's program. reason: why it was not fused, and what to change; "" where it was.

    choice: what computes it and why. whole: operands with the sizes of the dimensions that no device may have a part
    of, dots for those that may be sharded. gathered: which of these are sharded, as far as that is known. flops: of the
    equations as written. bytes_saved: of inner values that no longer reach memory, an upper bound, since XLA keeps some
    in registers too. expected_us: what these bytes take at the speed of a copy. measured_us: (fused,
    unfused), each compiled alone, after `explain(f, measure=True)`.
    """

    op: str
    fused: bool
    source: str
    detail: str = ""
    reason: str = ""
    where: str = ""  # "", or the control flow around it: "scan", "remat/scan"
    differentiated: bool = False
    shapes: str = ""  # of the operands
    advice: str = ""
    choice: str = ""
    whole: str = ""
    gathered: str = ""
    flops: int = 0
    bytes_saved: int = 0
    expected_us: float = 0.0
    measured_us: tuple[float, float] | None = None
    # (), to be called outside of any trace, gives measured_us.
    measure: Callable[[], tuple[float, float]] | None = dataclasses.field(default=None, compare=False, repr=False)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "measure"}

    @property
    def key(self) -> str:
        """What its speed depends on: sites with equal keys are measured once."""
        return " ".join(p for p in (self.op, self.detail, self.shapes, "grad" if self.differentiated else "") if p)

    @property
    def gain(self) -> str:
        """The measured times as text, or what memory may save; "" where neither is known."""
        if self.measured_us is None:
            return f"up to {_duration(self.expected_us)} less" if self.fused and self.expected_us else ""
        fused, unfused = self.measured_us
        return f"{unfused / fused:.2f}x: {_duration(unfused)} -> {_duration(fused)}"


def _duration(us: float) -> str:
    return f"{us / 1e3:.3g} ms" if us >= 1e3 else f"{us:.3g} us"


@dataclasses.dataclass(frozen=True)
class Narrowed:
    """A float matrix among the parameters of a model compiled with precision="int8". reason: why it stays a float; ""
    where it has 8 bits. error: of all its numbers, root mean square, relative to theirs."""

    name: str
    shape: tuple[int, ...]
    error: float = 0.0
    reason: str = ""

    def __str__(self) -> str:
        became = f"stays a float, because {self.reason}" if self.reason else f"int8, error {100 * self.error:.2g} %"
        return f"{self.name}{list(self.shape)}  {became}"


@dataclasses.dataclass(frozen=True)
class Report:
    """All sites of one traced function, in the order of the program, and what precision="int8" made of its matrices."""

    sites: tuple[Site, ...]
    platform: str
    narrowed: tuple[Narrowed, ...] = ()

    @property
    def fused(self) -> list[Site]:
        return [s for s in self.sites if s.fused]

    @property
    def refused(self) -> list[Site]:
        return [s for s in self.sites if not s.fused]

    def counts(self) -> dict[str, int]:
        """{op: number of fused sites}."""
        return dict(Counter(s.op for s in self.fused))

    @property
    def narrowed_head(self) -> str:
        """How much has 8 bits, in a line; "" where nothing was to be narrowed."""
        if not self.narrowed:
            return ""
        whole, eight = (sum(math.prod(n.shape) for n in of) for of in (self.narrowed, self._int8()))
        return (
            f"{len(self._int8())} of {len(self.narrowed)} matrices are int8: {quantity(eight)} of {quantity(whole)} "
            "numbers"
        )

    def _int8(self) -> list[Narrowed]:
        return [n for n in self.narrowed if not n.reason]

    def _rows(self) -> list[tuple[str, ...]]:
        grouped = Counter(self.sites)
        return [
            (
                str(n) if n > 1 else "",
                "fused" if s.fused else "XLA",
                s.op,
                s.detail or s.shapes,
                "/".join(p for p in (s.where, "grad" if s.differentiated else "") if p),
                s.source,
                "; ".join(p for p in (s.choice or s.reason, s.advice) if p),
                s.gathered,
                quantity(s.flops),
                quantity(s.bytes_saved),
                s.gain,
            )
            for s, n in grouped.items()
        ]

    def __str__(self) -> str:
        head = f"zenith on {self.platform}: {len(self.fused)} sites fused, {len(self.refused)} left to XLA"
        lines = [
            "  "
            + "  ".join(part for part in (f"{n}x" if n else "", status, op, detail, where, source) if part)
            + f"\n      {'by' if status == 'fused' else 'because'} {reason}"
            + (f"\n      but {gathered}" if gathered else "")
            + (f"\n      {flops} flops, {saved} bytes less" if status == "fused" else "")
            + (f", {gain}" if gain else "")
            for n, status, op, detail, where, source, reason, gathered, flops, saved, gain in self._rows()
        ]
        narrowed = [self.narrowed_head, *(f"  {n}" for n in self.narrowed)] if self.narrowed else []
        return "\n".join([head, *lines, *narrowed])

    def __rich__(self) -> Any:
        from rich.table import Table

        left = [str(n) for n in self.narrowed if n.reason]
        table = Table(title=str(self).split("\n", 1)[0], caption="\n".join(filter(None, (self.narrowed_head, *left))))
        columns = ["n", "by", "op", "shape", "in", "source", "reason", "gathered", "flops", "bytes saved", "gain"]
        rows = self._rows()
        shown = [i for i, c in enumerate(columns) if c not in ("gathered", "gain") or any(row[i] for row in rows)]
        for i in shown:
            table.add_column(columns[i], overflow="fold", no_wrap=columns[i] in ("by", "op"))
        for row in rows:
            table.add_row(*(row[i] for i in shown), style="green" if row[1] == "fused" else None)
        return table

    def html(self) -> str:
        """A whole page that needs nothing else."""
        return report_html.page(self)

    def _repr_html_(self) -> str:
        return report_html.fragment(self)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dict(
            platform=self.platform,
            fused=len(self.fused),
            refused=len(self.refused),
            sites=[s.as_dict() for s in self.sites],
            narrowed=[dataclasses.asdict(n) for n in self.narrowed],
        )

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Report:
        """The report that `as_dict` wrote."""
        sites = [{**s, "measured_us": s["measured_us"] and tuple(s["measured_us"])} for s in content["sites"]]
        narrowed = [Narrowed(**{**n, "shape": tuple(n["shape"])}) for n in content.get("narrowed", ())]
        return cls(tuple(Site(**s) for s in sites), content["platform"], tuple(narrowed))

    def measured(self) -> Report:
        """The report with times: each different site that is fused is compiled and run, fused and unfused."""
        times: dict[Site, tuple[float, float]] = {}
        for site in self.sites:
            if site.measure is not None and site not in times:
                times[site] = site.measure()
        sites = [dataclasses.replace(s, measured_us=times.get(s), measure=None) for s in self.sites]
        return dataclasses.replace(self, sites=tuple(sites))


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
