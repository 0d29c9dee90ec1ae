"""ONNX's official backend suite: every case passes, or is in suite.toml with its reason and does what is written there.

In 64-bit mode, because the suite compares dtypes. `python tests/onnx_suite.py` prints the scores and the failures.
"""

import collections
import pathlib
import tomllib

import jax
import onnx_suite
import pytest
from onnx_suite import EAGER, JIT, PASS, RANDOM, STATIC, UNSUPPORTED

onnx = pytest.importorskip("onnx")

BATCHES = 16  # so that two processes end at about the same time
TABLE = tomllib.loads(pathlib.Path(__file__).with_name("suite.toml").read_text())
NOT_PASSED = {case: group["result"] for group in TABLE["not_passed"] for case in group["cases"]}
NOT_JITTED = {case: group["how"] for group in TABLE["not_jitted"] for case in group["cases"]}
HAS_CASES_OF_TABLE = onnx.__version__ == TABLE["version"]


@pytest.fixture(scope="module", autouse=True)
def suite_mode():
    with jax.enable_x64(True):
        yield
    jax.clear_caches()


def expected(name: str) -> tuple[str, str | None]:
    """Result, and how the case is run where it passes."""
    result = NOT_PASSED.get(name, PASS)
    return result, NOT_JITTED.get(name, JIT) if result == PASS else None


@pytest.mark.parametrize("batch", range(BATCHES))
def test_cases_do_what_the_table_says(batch):
    outcomes = [onnx_suite.outcome(onnx_suite.case(name)) for name in onnx_suite.names()[batch::BATCHES]]
    found = {o.name: (o.result, o.how if o.result == PASS else None) for o in outcomes}
    reasons = {o.name: o.reason for o in outcomes}
    surprises = [
        f"{name} should be {expected(name)}, is {is_}: {reasons[name]}"
        for name, is_ in found.items()
        if is_ != expected(name)
    ]
    assert not surprises, "\n".join(surprises)
    unnamed = [o.name for o in outcomes if o.result == UNSUPPORTED and "node " not in o.reason]
    assert not unnamed, "what is unsupported names the node"


def test_totals():
    """The batches hold every case to the table, so the table is the score."""
    names = set(onnx_suite.names())
    if HAS_CASES_OF_TABLE:
        assert len(names) == TABLE["cases"]
        assert set(NOT_PASSED) | set(NOT_JITTED) <= names, "the table has cases that the suite does not have"
    assert not set(NOT_PASSED) & set(NOT_JITTED)
    results = collections.Counter(expected(n)[0] for n in names)
    hows = collections.Counter(expected(n)[1] for n in names)
    assert set(results) <= {PASS, UNSUPPORTED, RANDOM}, "no result is wrong, and no case fails for another reason"
    assert results[PASS] >= 2012
    assert hows[JIT] >= 1923
    assert set(hows) <= {JIT, EAGER, STATIC, None}


def test_a_mismatch_is_not_taken_for_another_draw():
    case = onnx_suite.case("test_training_dropout_default_mask")
    inputs, outputs = case.data[0]
    ours = [outputs[0][::-1], outputs[1][::-1]]  # a mask that does not fit the values
    assert not onnx_suite._is_another_draw(case, inputs, outputs, ours)
    assert not onnx_suite._is_another_draw(case, inputs, outputs, [outputs[0].astype("float64"), outputs[1]])
    other = onnx_suite.case("test_relu")
    assert not onnx_suite._is_another_draw(other, *other.data[0], other.data[0][0])
