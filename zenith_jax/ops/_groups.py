"""Rows cut into groups, of which a backward kernel sums each: the cotangents of scales and biases, in a fixed order."""

from __future__ import annotations

import math
from collections.abc import Sequence


def rows_per_group(rows: int, total_rows: int, groups: int) -> int:
    """How many of `rows` consecutive rows share one of about `groups` sums: a divisor, since a reshape cuts them."""
    wanted = max(4, total_rows // groups)
    return max((r for r in range(1, min(wanted, rows) + 1) if rows % r == 0), default=max(rows, 1))


def row_batch(batch: Sequence[int], kept: int, partitions: int) -> tuple[int, ...]:
    """Batch sizes of rows for a kernel that cuts runs of rows into groups itself, (*kept, *b, r): two b and more.

    With several devices only the last dimension of rows is cut, over n of the devices, which divides their number and
    the dimension, so that every run lies on one of them however the others are sharded.
    """
    whole, rows = tuple(batch[:kept]), tuple(batch[kept:])
    if partitions == 1:
        return (*whole, 1, 1, math.prod(rows))
    *lead, last = rows
    parts = max(1, math.gcd(last, partitions))
    return (*whole, *lead, parts, last // parts)


def grouped(batch: Sequence[int], kept: int, partitions: int, groups: int) -> tuple[int, ...]:
    """Batch sizes of rows cut into groups, (*kept, *groups, r): at least two before r, no group of two `kept` entries.

    Groups lie on one device each, as the runs of `row_batch` that they are cut from.
    """
    *lead, parts, rows = row_batch(batch, kept, partitions)
    r = rows_per_group(rows, math.prod(batch), groups)
    return (*lead, parts * rows // r, r)
