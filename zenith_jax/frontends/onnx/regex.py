"""Regular expressions with RE2's meaning, in time linear in the text: https://github.com/google/re2/wiki/Syntax

Python's own matcher backtracks: `(a+)+b` against forty a's takes hours, and the pattern comes from the model's file.
Here its parser is used, and all states that a text can be in are followed at once: Thompson 1968,
doi:10.1145/363347.363387. As in RE2 there are no backreferences and no lookaround, and \\d \\w \\s \\b know ASCII only.
"""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Callable, Iterable
from re import _constants as op  # type: ignore[attr-defined]
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any

from zenith_jax.frontends.onnx.errors import OnnxError, UnsupportedError

MAX_STATES = 10_000  # RE2 has a limit too: (a{1000}){1000} is a short text

_WORD = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_")
_DIGIT = frozenset("0123456789")
_SPACE = frozenset(" \t\n\r\f\v")
_CATEGORIES: dict[Any, tuple[frozenset[str], bool]] = {
    op.CATEGORY_DIGIT: (_DIGIT, True),
    op.CATEGORY_NOT_DIGIT: (_DIGIT, False),
    op.CATEGORY_WORD: (_WORD, True),
    op.CATEGORY_NOT_WORD: (_WORD, False),
    op.CATEGORY_SPACE: (_SPACE, True),
    op.CATEGORY_NOT_SPACE: (_SPACE, False),
}


@dataclasses.dataclass
class _State:
    """test: of the next character, on the way to `after`; holds: of the place in the text; neither: a fork."""

    after: list[int]
    test: Callable[[str], bool] | None = None
    holds: Callable[[str, int], bool] | None = None


class Pattern:
    """A compiled pattern. Raises OnnxError where it is malformed, UnsupportedError for what RE2 does not have."""

    def __init__(self, pattern: str):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what may mean something else in a later Python
            try:
                tree = parser.parse(pattern)
            except re.error as error:
                raise OnnxError(f"the pattern {pattern!r} is malformed: {error}") from None
        self.pattern = pattern
        self.states = [_State([])]  # 0: the end
        self.start = self._sequence(tree, 0, tree.state.flags)

    def fullmatch(self, text: str) -> bool:
        """Whether the whole text matches."""
        current = self._closure([self.start], text, 0)
        for place, character in enumerate(text):
            passed = (s for s in map(self.states.__getitem__, current) if s.test is not None and s.test(character))
            current = self._closure([n for s in passed for n in s.after], text, place + 1)
            if not current:
                return False
        return 0 in current

    def _closure(self, states: Iterable[int], text: str, place: int) -> set[int]:
        """All states that are reached without another character."""
        reached: set[int] = set()
        waiting = list(states)
        while waiting:
            number = waiting.pop()
            if number not in reached:
                reached.add(number)
                state = self.states[number]
                if state.test is None and (state.holds is None or state.holds(text, place)):
                    waiting += state.after
        return reached

    def _add(self, *after: int, **what: Any) -> int:
        if len(self.states) >= MAX_STATES:
            raise OnnxError(f"the pattern {self.pattern!r} has more than {MAX_STATES} states: are repetitions nested?")
        self.states.append(_State(list(after), **what))
        return len(self.states) - 1

    def _sequence(self, items: Any, after: int, flags: int) -> int:
        for kind, argument in reversed(list(items)):
            after = self._item(kind, argument, after, flags)
        return after

    def _item(self, kind: Any, argument: Any, after: int, flags: int) -> int:
        if kind is op.BRANCH:
            return self._add(*(self._sequence(branch, after, flags) for branch in argument[1]))
        if kind is op.SUBPATTERN:
            _, added, removed, inner = argument
            return self._sequence(inner, after, (flags | added) & ~removed)
        if kind in (op.MAX_REPEAT, op.MIN_REPEAT):  # greedy or not is the same where only the whole text counts
            return self._repeated(*argument, after=after, flags=flags)
        if kind is op.AT:
            return self._add(after, holds=_place(argument, bool(flags & re.MULTILINE)))
        if kind in (op.LITERAL, op.NOT_LITERAL, op.ANY, op.IN):
            return self._add(after, test=_test(kind, argument, flags))
        raise UnsupportedError(f"the pattern {self.pattern!r} uses {str(kind).lower()}, which RE2 does not have")

    def _repeated(self, least: int, most: Any, inner: Any, *, after: int, flags: int) -> int:
        if most is op.MAXREPEAT:
            again = self._add(after)
            self.states[again].after.append(self._sequence(inner, again, flags))
            after = again
        else:
            for _ in range(most - least):
                after = self._add(after, self._sequence(inner, after, flags))
        for _ in range(least):
            after = self._sequence(inner, after, flags)
        return after


def _test(kind: Any, argument: Any, flags: int) -> Callable[[str], bool]:
    if kind is op.ANY:
        return (lambda c: True) if flags & re.DOTALL else (lambda c: c != "\n")
    items = argument if kind is op.IN else [(op.LITERAL, argument)]
    negated = kind is op.NOT_LITERAL or items[0][0] is op.NEGATE
    members = [_member(*item) for item in items if item[0] is not op.NEGATE]
    folds = [str.lower, str.upper, str] if flags & re.IGNORECASE else [str]
    return lambda c: any(m(f(c)[:1]) for m in members for f in folds) is not negated


def _member(kind: Any, argument: Any) -> Callable[[str], bool]:
    """Of a set: one character, a range, a class."""
    if kind is op.LITERAL:
        return lambda c: c == chr(argument)
    if kind is op.RANGE:
        return lambda c: argument[0] <= ord(c) <= argument[1]
    members, inside = _CATEGORIES[argument]
    return lambda c: (c in members) is inside


def _place(kind: Any, multiline: bool) -> Callable[[str, int], bool]:
    if kind is op.AT_BEGINNING and multiline:
        return lambda text, i: i == 0 or text[i - 1] == "\n"
    if kind in (op.AT_BEGINNING, op.AT_BEGINNING_STRING):
        return lambda text, i: i == 0
    if kind is op.AT_END and multiline:
        return lambda text, i: i == len(text) or text[i] == "\n"
    if kind in (op.AT_END, op.AT_END_STRING):
        return lambda text, i: i == len(text)
    boundary = kind is op.AT_BOUNDARY
    return lambda text, i: ((text[i - 1 : i] in _WORD) != (text[i : i + 1] in _WORD)) is boundary
