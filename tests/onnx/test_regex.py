"""RegexFullMatch: Python's `re` is the oracle, on texts that it gets through; time is linear where its is not."""

import itertools
import re
import time

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from onnx_nodes import call

from zenith_jax.frontends.onnx import OnnxError, UnsupportedError
from zenith_jax.frontends.onnx.regex import Pattern

PATTERNS = [
    "",
    *r"""
a ab a|b a| (a|b)*c a* a+ a? a{2} a{1,3} a{2,} (ab){1,2} a*?b (a*)* (a|a)*b (?:ab)+ (?P<name>a)b . .* (?s).* [abc]
[^abc] [a-c]+ [a-] [\w.]+ \d+ \D* \w\W \s \S+ ^ab$ \Aab\Z a\bc \bab\b a\Bb (?i)Ab[c-d] (?i:a)b (?m)^a$\n^b$ \. [\]]
\x61 é+ [à-é] (a|ab)(c|bcd) ((a)|b)+ x{0} (^a|b$)+ a+b+
""".split(),
]
TEXTS = ["".join(t) for n in range(4) for t in itertools.product("abc", repeat=n)]
TEXTS += ["\n", "a\nb", "a b", "a c", *"abcd a.b 12 é ée a- ] Ab ABC abd a_1 aaaa bcd".split()]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_agrees_with_re_on_ascii_classes(pattern):
    ours, theirs = Pattern(pattern), re.compile(pattern, re.ASCII if "(?i" not in pattern else 0)
    wrong = [text for text in TEXTS if ours.fullmatch(text) is not (theirs.fullmatch(text) is not None)]
    assert not wrong


def patterns():
    atoms = st.sampled_from(["a", "b", ".", "[ab]", "[^a]", r"\w", r"\b", "^", "$", "a|b"])
    return st.recursive(
        atoms,
        lambda inner: st.one_of(
            st.tuples(inner, inner).map("".join),
            st.tuples(inner, inner).map("|".join),
            st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "{1,2}", "*?"])).map(lambda t: f"(?:{t[0]}){t[1]}"),
        ),
        max_leaves=6,
    )


@hypothesis.given(patterns(), st.text("ab\n1", max_size=6))
@hypothesis.settings(max_examples=300, deadline=None)
def test_agrees_with_re_on_random_patterns(pattern, text):
    # Python's $ holds before a newline at the end too, RE2's does not: \Z is what RE2 means.
    theirs = re.compile(pattern.replace("$", r"\Z"), re.ASCII)
    assert Pattern(pattern).fullmatch(text) is (theirs.fullmatch(text) is not None)


def test_time_is_linear_where_backtracking_is_not():
    start = time.perf_counter()
    for pattern in ("(a+)+b", "(a|a)*b", "(a*)*b", "(a?){30}a{30}b", "(.*a){12}b"):
        assert not Pattern(pattern).fullmatch("a" * 60)
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize("pattern", ["(", "a**", "[b-a]", "a{2,1}", "\\"])
def test_malformed_pattern(pattern):
    with pytest.raises(OnnxError, match="is malformed"):
        Pattern(pattern)


@pytest.mark.parametrize("pattern", [r"(a)\1", "(?=a)a", "(?<!a)b", "(?>a)b", "a++"])
def test_what_re2_does_not_have(pattern):
    with pytest.raises(UnsupportedError, match="which RE2 does not have"):
        Pattern(pattern)


def test_nested_repetitions_are_bounded():
    with pytest.raises(OnnxError, match="more than 10000 states"):
        Pattern("((a{100}){100}){100}")


def test_operator():
    x = np.array([["ab", "b"], ["", "aab"]], object)
    np.testing.assert_array_equal(call("RegexFullMatch", x, pattern="a+b"), [[True, False], [False, True]])
    assert call("RegexFullMatch", np.array(["١"], object), pattern=r"\d").tolist() == [False], "digits are ASCII in RE2"
