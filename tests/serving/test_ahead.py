"""What is measured ahead of time: the number of threads and the seconds of each program, also beside other work."""

from __future__ import annotations

import json
import os
import textwrap

import pytest
from fresh_process import run_script
from serving_models import compiled_mlp

import zenith_jax as zenith
from zenith_jax.errors import ServingError
from zenith_jax.serving import ahead

EVERY, BUT_ONE = ahead.POOL_THREADS
SIZES = ([1], [2], [8])


def rounds(seconds, slowed=(), factor=3.0):
    """ROUNDS rounds of programs that take so many seconds; in those of `slowed` a neighbour has the processors."""
    return [[(s, t * (factor if i in slowed else 1)) for s, t in zip(SIZES, seconds, strict=True)] for i in range(5)]


def test_the_faster_number_of_threads():
    fast, slow = (0.002, 0.004, 0.015), (0.004, 0.008, 0.030)
    assert ahead.chosen({EVERY: rounds(fast), BUT_ONE: rounds(slow)})[0] == EVERY
    best, seconds = ahead.chosen({EVERY: rounds(slow), BUT_ONE: rounds(fast)})
    assert best == BUT_ONE and seconds == list(zip(SIZES, fast, strict=True))
    assert ahead.chosen({EVERY: rounds(slow)}) == (EVERY, list(zip(SIZES, slow, strict=True)))


@pytest.mark.parametrize("slowed", [(0,), (0, 1, 2, 3), (1, 2, 3, 4)])
def test_a_neighbour_in_all_rounds_but_one_changes_nothing(slowed):
    fast, slow = (0.002, 0.004, 0.015), (0.004, 0.008, 0.030)
    for first, second in ((fast, slow), (slow, fast)):
        undisturbed = ahead.chosen({EVERY: rounds(first), BUT_ONE: rounds(second)})
        assert ahead.chosen({EVERY: rounds(first, slowed), BUT_ONE: rounds(second)}) == undisturbed
        assert ahead.chosen({EVERY: rounds(first), BUT_ONE: rounds(second, slowed)}) == undisturbed


def test_programs_are_compiled_and_each_is_measured(tmp_path):
    with zenith.configured(use_cost=False):
        model = compiled_mlp()
    repository = zenith.serving.TritonModelRepository(tmp_path / "models")
    folder = repository.add(model, name="m")
    settings = json.loads((folder / "serving.json").read_text())
    assert settings["pool_threads"] in ahead.POOL_THREADS
    assert [sizes for sizes, _ in settings["seconds"]] == [[1], [4], [16]]
    assert all(0 < seconds < 1 for _, seconds in settings["seconds"])
    assert [p.name for p in folder.glob("cache*")] == ["cache"]


def test_a_server_finds_the_programs_that_were_compiled_elsewhere(tmp_path):
    """They are compiled before the version is renamed into its place: no key may hold a folder's name."""
    folder = zenith.serving.TritonModelRepository(tmp_path / "models").add(compiled_mlp(), name="m")

    def programs():
        return sorted(p.name for p in (folder / "cache").iterdir() if p.name.endswith("-cache"))

    before = programs()
    assert len(before) == 3
    script = f"""
        import pathlib
        from zenith_jax.serving.backend import Model
        folder = pathlib.Path({str(folder)!r})
        Model(folder, folder / "cache")
    """
    run_script(textwrap.dedent(script), tmp_path, timeout_s=120)
    assert programs() == before  # a program that is not found is compiled and stored


def test_a_version_that_a_server_could_not_load_is_refused_with_the_reason(tmp_path):
    processes = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ServingError, match=r"(?s)cannot be compiled as a server would: .*serving\.json"):
        ahead.compile_ahead(tmp_path, of_cpu=True, fused=True)
    assert len(os.listdir("/proc/self/fd")) == processes  # no pipe of a process is left
