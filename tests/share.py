"""`pytest --share N`: a part of the tests that meets every test function, for a check of ten minutes and not thirty."""

from __future__ import annotations

import argparse
import collections
import zlib

import pytest


def add_option(parser: pytest.Parser) -> None:
    parser.addoption(
        "--share",
        type=at_least_one,
        default=1,
        metavar="N",
        help="of the cases of each parametrized test run one in N, at least one, always the same; 1 runs all",
    )


def at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"N must be a whole number from 1 on, got {text!r}")
    return int(text)


def thinned(items: list[pytest.Item], share: int) -> tuple[list[pytest.Item], list[pytest.Item]]:
    """The tests that run, in their order, and the others."""
    cases: dict[str, list[pytest.Item]] = collections.defaultdict(list)
    for item in items:
        cases[item.nodeid.partition("[")[0]].append(item)
    kept = set()
    for of_one in cases.values():
        # By their hash: every Nth in order could be always the same of a parameter that varies fastest.
        of_one.sort(key=lambda item: zlib.crc32(item.nodeid.encode()))
        of_one = of_one if of_one[0].get_closest_marker("every_case") else of_one[: -(-len(of_one) // share)]
        kept |= {item.nodeid for item in of_one}
    return [i for i in items if i.nodeid in kept], [i for i in items if i.nodeid not in kept]
