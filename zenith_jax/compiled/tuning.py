"""`mode="max-autotune"`: each different site measured, Zenith's kernel and XLA's code, and the times kept on disk.

One JSON file an entry, under its key's hash, written whole or not at all: processes that tune at once at worst measure
twice. An entry is read only if it says the very key that is asked for: device, versions, op, shapes, dtypes. `zenith
cache` lists and clears them.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import logging
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jaxlib

from zenith_jax import device, native
from zenith_jax.api import explain
from zenith_jax.config import configured
from zenith_jax.files import replacing
from zenith_jax.passes.choose import Choices
from zenith_jax.report import Site
from zenith_jax.version import __version__

logger = logging.getLogger("zenith_jax")


@dataclasses.dataclass(frozen=True)
class Entry:
    """What was measured for one site on one device: microseconds of Zenith's kernel and of XLA's code."""

    key: Mapping[str, Any]
    fused_us: float
    xla_us: float
    date: str
    file: str = ""

    def __str__(self) -> str:
        winner = "zenith" if self.fused_us < self.xla_us else "XLA"
        return f"{winner:6}  {self.fused_us:9.3g}  {self.xla_us:9.3g}  {self.key['site']}"


def folder() -> pathlib.Path:
    """Where entries are: $ZENITH_CACHE_DIR, else zenith-jax in $XDG_CACHE_HOME or ~/.cache."""
    given = os.environ.get("ZENITH_CACHE_DIR")
    root = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(given) if given else pathlib.Path(root) / "zenith-jax"


def entries() -> Iterator[Entry]:
    """All entries that can be read; the others are skipped."""
    for path in sorted(folder().glob("*.json")):
        found = _read(path)
        if found is not None:
            yield found


def clear() -> int:
    """Removes all entries, unreadable ones and remains of killed processes too; how many there were."""
    paths = [*folder().glob("*.json"), *folder().glob(".*.part")]
    for path in paths:
        path.unlink(missing_ok=True)
    return len(paths)


def tuned(function: Callable[..., Any], *args: Any) -> Choices:
    """The faster of both for every site that `function` has for such arguments, from the disk or measured now."""
    with configured(use_cost=False):
        sites = explain(function)(*args).fused
    distinct = {site.key: site for site in sites if site.measure is not None and not site.differentiated}
    found = {key: _read(_path(_key(key)), _key(key)) for key in distinct}
    times = {key: (entry.fused_us, entry.xla_us) for key, entry in found.items() if entry is not None}
    times.update(_measured([site for key, site in distinct.items() if key not in times]))
    return Choices(times)


def _measured(sites: Sequence[Site]) -> dict[str, tuple[float, float]]:
    if not sites:
        return {}
    from rich.console import Console
    from rich.progress import Progress

    times = {}
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("measuring", total=len(sites))
        for site in sites:
            progress.update(task, description=f"measuring {site.op}")
            fused_us, xla_us = times[site.key] = measured_us(site)
            _write(Entry(_key(site.key), fused_us, xla_us, datetime.datetime.now().isoformat(timespec="seconds")))
            progress.advance(task)
    return times


def measured_us(site: Site) -> tuple[float, float]:
    """Zenith's kernel and XLA's code, each compiled alone."""
    assert site.measure is not None
    return site.measure()


def _key(site: str) -> dict[str, Any]:
    first = native.default_device()
    on_cpu = first.platform == "cpu"
    return dict(
        site=site,
        device=f"{device.processor()}, {_cores()} cores" if on_cpu else first.device_kind,
        zenith=__version__,
        kernels=native.KERNEL_VERSION,
        jaxlib=jaxlib.__version__,
        flags=os.environ.get("XLA_FLAGS", ""),
    )


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _path(key: Mapping[str, Any]) -> pathlib.Path:
    return folder() / (hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32] + ".json")


def _read(path: pathlib.Path, key: Mapping[str, Any] | None = None) -> Entry | None:
    """The entry, if the file is one, and of this key where one is given."""
    try:
        content = json.loads(path.read_bytes())
        entry = Entry(
            dict(content["key"]), float(content["fused_us"]), float(content["xla_us"]), content["date"], path.name
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
    is_sound = entry.fused_us > 0 and entry.xla_us > 0 and "site" in entry.key
    return entry if is_sound and (key is None or entry.key == key) else None


def _write(entry: Entry) -> None:
    """To disk; where that cannot be, a warning: the measurement counts for this process."""
    content = {k: v for k, v in dataclasses.asdict(entry).items() if k != "file"}
    try:
        folder().mkdir(parents=True, exist_ok=True)
        with replacing(_path(entry.key)) as file:
            file.write(json.dumps(content, indent=1).encode())
    except OSError as error:
        logger.warning(
            "a measurement cannot be kept in %s (%s), the next process measures again: free space there, or set "
            "ZENITH_CACHE_DIR", folder(), error,
        )  # fmt: skip
