"""A report as one HTML page that needs nothing else: no script, no font, no network; light and dark."""

from __future__ import annotations

import html
from collections import Counter
from typing import Any

STYLE = """
:root { color-scheme: light dark; --line: #8884; --good: #1a7f37; --left: #9a6700; --soft: #8881; }
@media (prefers-color-scheme: dark) { :root { --good: #4ac26b; --left: #d4a72c; } }
.zenith { font: 14px/1.45 system-ui, sans-serif; max-width: 1200px; margin: 2em auto; padding: 0 1em; }
.zenith h1 { font-size: 20px; margin: 0 0 .2em; }
.zenith table { border-collapse: collapse; width: 100%; margin-top: 1em; }
.zenith th { text-align: left; font-weight: 600; border-bottom: 2px solid var(--line); padding: 6px 10px; }
.zenith td { border-bottom: 1px solid var(--line); padding: 6px 10px; vertical-align: top; }
.zenith td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.zenith code { font: 12.5px/1.4 ui-monospace, monospace; overflow-wrap: anywhere; }
.zenith .mark { font-weight: 600; white-space: nowrap; }
.zenith .fused .mark { color: var(--good); } .zenith .left .mark { color: var(--left); }
.zenith .why { background: var(--soft); border-left: 3px solid var(--left); padding: 4px 8px; margin-top: 4px; }
.zenith p { margin: .3em 0; opacity: .8; }
"""


def page(report: Any) -> str:
    """A whole document."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>zenith: {len(report.fused)} of {len(report.sites)} sites fused</title></head>\n"
        f"<body>{fragment(report)}</body></html>\n"
    )


def fragment(report: Any) -> str:
    """The page's content with its style, for a notebook."""
    grouped = Counter(report.sites)
    measured = any(s.measured_us for s in report.sites)
    head = ["by", "op and shapes", "source", "chosen because", "flops", "bytes saved, at most", "gain"]
    rows = "\n".join(_row(site, n) for site, n in grouped.items())
    note = "Times are of each site compiled alone, on random operands." if measured else ""
    heads = "".join(f"<th>{c}</th>" for c in head)
    matrices = "".join(f"<br><code>{_e(n)}</code>" for n in report.narrowed)
    narrowed = f"<p>{_e(report.narrowed_head)}{matrices}</p>" if matrices else ""
    return (
        f'<style>{STYLE}</style>\n<div class="zenith"><h1>Zenith on {_e(report.platform)}</h1>'
        f"<p>{len(report.fused)} sites fused, {len(report.refused)} left to XLA. {note}</p>\n"
        f"<table><thead><tr>{heads}</tr></thead>\n<tbody>\n{rows}\n</tbody></table>{narrowed}</div>"
    )


def _row(site: Any, n: int) -> str:
    times = f" &times;{n}" if n > 1 else ""
    place = " in ".join(p for p in ("grad" if site.differentiated else "", site.where) if p)
    why = _e(site.choice) if site.fused else f'<div class="why">{_e(site.reason)}</div>'
    if site.whole:
        why += f"<div>whole on each device: <code>{_e(site.whole)}</code></div>"
    if site.gathered:
        why += f'<div class="why">{_e(site.gathered)}</div>'
    advice = f"<div><b>try:</b> {_e(site.advice)}</div>" if site.advice else ""
    source = f"<code>{_e(site.source)}</code>" + (f"<br>{_e(place)}" if place else "")
    shown = dict.fromkeys(t for t in (site.detail, site.shapes) if t)
    cells = [
        f'<td class="mark">{"fused" if site.fused else "XLA"}{times}</td>',
        f"<td><b>{_e(site.op)}</b><br><code>{'<br>'.join(map(_e, shown))}</code></td>",
        f"<td>{source}</td><td>{why}{advice}</td>",
        f'<td class="number">{quantity(site.flops)}</td><td class="number">{quantity(site.bytes_saved)}</td>',
        f'<td class="number">{_e(site.gain)}</td>',
    ]
    return f'<tr class="{"fused" if site.fused else "left"}">{"".join(cells)}</tr>'


def quantity(n: int) -> str:
    """1234567 -> 1.23 M; nothing for 0."""
    for unit in ("", "k", "M", "G", "T"):
        if n < 1000 or unit == "T":
            return f"{n:.3g} {unit}".strip() if n else ""
        n /= 1000  # pyright: ignore[reportAssignmentType]
    raise AssertionError


def _e(text: Any) -> str:
    return html.escape(str(text))
