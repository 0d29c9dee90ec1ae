"""Requests as calls: which rows go where, without a server."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zenith_jax.compiled.buckets import Spec
from zenith_jax.errors import InputError
from zenith_jax.serving.batching import Batcher, split

INPUTS = (Spec("x", ("batch", "length", 2), "float32"), Spec("n", ("batch",), "int32"))
DYNAMIC = {"batch": (1, 4, 6), "length": (2, 5)}
OUTPUTS = (Spec("y", ("batch", "length", 2), "float32"), Spec("m", ("batch",), "int32"))


def identity(call):
    """A model whose outputs are its inputs, and that asks for a compiled size."""
    assert call.arrays[0].shape == (call.bucket["batch"], call.bucket["length"], 2)
    assert call.arrays[1].shape == (call.bucket["batch"],)
    assert call.bucket["batch"] in DYNAMIC["batch"] and call.bucket["length"] in DYNAMIC["length"]
    return call.arrays


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.lists(st.one_of(st.none(), st.tuples(st.integers(1, 6), st.integers(1, 5))), max_size=9),
    st.lists(st.floats(0.001, 1), min_size=6, max_size=6),
)
def test_every_request_gets_its_own_rows_and_no_others(shapes, seconds):
    programs = itertools.product(*DYNAMIC.values())
    batcher = Batcher(INPUTS, DYNAMIC, "batch", dict(zip(programs, seconds, strict=True)))
    rng = np.random.default_rng(0)
    requests = [
        None if s is None else [rng.normal(size=(*s, 2)).astype(np.float32), rng.integers(0, 99, s[0], np.int32)]
        for s in shapes
    ]
    answers = {}
    for call in batcher.calls(requests):
        for index, answer in zip(call.requests, split(OUTPUTS, identity(call), call, "batch"), strict=True):
            assert index not in answers
            answers[index] = answer
    assert set(answers) == {i for i, r in enumerate(requests) if r is not None}
    for index, answer in answers.items():
        for got, sent in zip(answer, requests[index], strict=True):
            np.testing.assert_array_equal(got, sent)
            assert got.flags.owndata and got.flags.c_contiguous and got.flags.writeable


def test_results_are_given_as_they_are_to_one_request_of_a_compiled_size():
    batcher = Batcher(INPUTS, DYNAMIC, "batch")
    for rows, length, others, is_whole in ((4, 5, 0, True), (4, 4, 0, False), (3, 5, 0, False), (1, 2, 1, False)):
        request = [np.zeros((rows, length, 2), np.float32), np.zeros(rows, np.int32)]
        (call,) = batcher.calls([request] * (1 + others))
        assert call.is_whole == is_whole
        assert call.rows == (rows,) * (1 + others) and call.sizes["length"] == length
        assert (call.arrays[0] is request[0]) == is_whole


def test_as_few_calls_as_fit():
    batcher = Batcher(INPUTS, DYNAMIC, "batch")
    requests = [[np.zeros((n, 2, 2), np.float32), np.zeros(n, np.int32)] for n in (2, 2, 2, 1)]
    assert [(c.requests, c.rows, c.bucket["batch"]) for c in batcher.calls(requests)] == [
        ((0, 1, 2), (2, 2, 2), 6),
        ((3,), (1,), 1),
    ]


@pytest.mark.parametrize(
    ("rows", "calls"),
    [
        ([1] * 5, [4, 1]),
        ([1] * 7, [4, 1, 1, 1]),
        ([1] * 8, [4, 4]),
        ([1] * 14, [4, 4, 4, 1, 1]),
        ([1] * 15, [16]),  # 16.2 ms either way
        ([3, 3], [4, 4]),
        ([2, 2, 1], [4, 1]),
    ],
)
def test_the_calls_that_take_the_least_time(rows, calls):
    """A program of n rows takes n ms, and each call 0.2 ms besides."""
    dynamic = {"batch": (1, 4, 16)}
    seconds = {(n,): n / 1000 for n in dynamic["batch"]}
    batcher = Batcher((Spec("x", ("batch", 2), "float32"),), dynamic, "batch", seconds)
    found = batcher.calls([[np.zeros((n, 2), np.float32)] for n in rows])
    assert [c.bucket["batch"] for c in found] == calls


def test_programs_as_fast_for_many_rows_as_for_one_are_called_once():
    """As on a GPU."""
    seconds = {(1,): 0.0010, (4,): 0.0011, (16,): 0.0012}
    batcher = Batcher((Spec("x", ("batch", 2), "float32"),), {"batch": (1, 4, 16)}, "batch", seconds)
    for n in range(2, 17):
        (call,) = batcher.calls([[np.zeros((1, 2), np.float32)]] * n)
        assert call.bucket["batch"] == (4 if n <= 4 else 16)


def test_without_a_batch_dimension_each_request_is_a_call():
    batcher = Batcher((Spec("x", (2, "length"), "float32"),), {"length": (2, 5)}, None)
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    calls = batcher.calls([[x], [x + 1]])
    assert [c.arrays[0].shape for c in calls] == [(2, 5), (2, 5)]
    ((got,),) = split((Spec("y", (2, "length"), "float32"),), calls[1].arrays, calls[1], None)
    np.testing.assert_array_equal(got, x + 1)


@pytest.mark.parametrize(
    ("index", "array", "message"),
    [
        (0, np.zeros((1, 2, 3), np.float32), r"float32\[batch, length, 2\] got shape \[1, 2, 3\]"),
        (0, np.zeros((1, 2), np.float32), r"got shape \[1, 2\]"),
        (0, np.zeros((1, 9, 2), np.float32), r"length 9; the model is compiled for 1 to 5"),
        (0, np.zeros((0, 2, 2), np.float32), r"batch 0; the model is compiled for 1 to 6"),
        (0, np.zeros((1, 2, 2), np.int32), "got int32"),
        (1, np.array([2**31], np.int64), "which int32 does not hold"),
        (1, np.array([-(2**31) - 1], np.int64), "which int32 does not hold"),
        (1, np.array([0.5]), "got float64"),
    ],
)
def test_refused_inputs(index, array, message):
    with pytest.raises(InputError, match=message):
        Batcher(INPUTS, DYNAMIC, "batch").converted(index, array)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((2, 3, 2), (1,)), "n: batch is 1, in an input before it is 2"),
        (((1, 3, 2), (2,)), "n: batch is 2, in an input before it is 1"),
    ],
)
def test_a_request_whose_inputs_disagree_is_refused(shapes, message):
    batcher = Batcher(INPUTS, DYNAMIC, "batch")
    x, n = np.zeros(shapes[0], np.float32), np.zeros(shapes[1], np.int32)
    with pytest.raises(InputError, match=message):
        batcher.agree([batcher.converted(0, x), batcher.converted(1, n)])
    batcher.agree([x, np.zeros(len(x), np.int32)])


def test_one_name_on_two_axes_of_an_input():
    batcher = Batcher((Spec("x", ("n", "n"), "float32"),), {"n": (2, 4)}, None)
    batcher.agree([np.zeros((3, 3), np.float32)])
    with pytest.raises(InputError, match="x: n is 3, in an input before it is 2"):
        batcher.agree([np.zeros((2, 3), np.float32)])


def test_wide_integers_that_fit_are_taken():
    got = Batcher(INPUTS, DYNAMIC, "batch").converted(1, np.array([2**31 - 1, -(2**31)], np.int64))
    assert got.dtype == np.int32 and got.tolist() == [2**31 - 1, -(2**31)]
