"""What `pytest --share N` leaves out, and what it never does."""

from __future__ import annotations

import argparse
import dataclasses

import pytest
from share import at_least_one, thinned


@dataclasses.dataclass(frozen=True)
class Item:
    nodeid: str
    marker: str = ""

    def get_closest_marker(self, name):
        return self.marker == name or None


ALONE = [Item("a.py::alone"), Item("b.py::alone")]
MANY = [Item(f"a.py::many[{n}-{kind}]") for n in range(10) for kind in ("x", "y")]
NEVER_THINNED = [Item(f"a.py::whole[{n}]", "every_case") for n in range(9)]
ALL = [ALONE[0], *MANY, *NEVER_THINNED, ALONE[1]]


@pytest.mark.parametrize(("share", "of_many"), [(1, 20), (3, 7), (4, 5), (100, 1)])
def test_every_test_keeps_its_part_of_the_cases(share, of_many):
    kept, others = thinned(ALL, share)
    assert sorted(map(str, kept + others)) == sorted(map(str, ALL))
    assert kept == [item for item in ALL if item in kept], "in their order"
    assert {*ALONE, *NEVER_THINNED} <= {*kept}
    assert sum(item in MANY for item in kept) == of_many


def test_a_smaller_share_is_part_of_a_larger_one_and_of_every_kind():
    few, more = (set(thinned(ALL, share)[0]) for share in (4, 2))
    assert few < more
    assert {item.nodeid[-2] for item in more & {*MANY}} == {"x", "y"}


@pytest.mark.parametrize("wrong", ["0", "-1", "half", "1.5", ""])
def test_a_share_is_a_number_from_1(wrong):
    assert at_least_one("4") == 4
    with pytest.raises(argparse.ArgumentTypeError, match="from 1 on, got"):
        at_least_one(wrong)
