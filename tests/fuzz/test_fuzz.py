"""Random programs, fused against unfused. Short here; ZENITH_FUZZ_SECONDS=3600, or run.py, for long.

What a program is: programs.py; what "the same function" means: check.py.
"""

from __future__ import annotations

import os
import random
import time
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fuzz.check import Tally, Wrong, check, transformed
from fuzz.oracle import evaluate
from fuzz.programs import drawn, programs
from hypothesis import HealthCheck, Phase, given, seed, settings

import zenith_jax as zenith
from zenith_jax.report import collecting

SECONDS = float(os.environ.get("ZENITH_FUZZ_SECONDS", "20"))
BATCH = 40
# A fuzzer whose programs do not fuse proves nothing. Of 2000 programs, in batches of 40, 62 % fused. Those of a batch
# resemble each other: the variance of a batch's share was 4.4 times that of programs drawn one by one.
SHARE, ALIKE = 0.62, 4.4


def least_fused(programs: int, alike: float) -> float:
    """How many fuse, but for one case in 10000 by chance."""
    return programs * SHARE - 3.7 * (programs * alike * SHARE * (1 - SHARE)) ** 0.5


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of constants that overflow, as mask fills in float16 do
@pytest.mark.timeout(SECONDS + 300)
def test_no_random_program_changes_by_fusion():
    tally, start, batch = Tally(), time.monotonic(), 0
    while batch == 0 or time.monotonic() - start < SECONDS:

        @seed(20260105 + batch)
        @settings(max_examples=BATCH, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(programs())
        def one_batch(program):
            if time.monotonic() - start < SECONDS:
                check(program, tally)

        one_batch()
        jax.clear_caches()
        batch += 1
    print(f"\n{tally}")
    compared = tally.programs["fused"] + tally.programs["untouched"]
    assert tally.programs["fused"] >= least_fused(compared, ALIKE), str(tally)


def test_most_programs_fuse():
    fused, count = 0, 60
    for i in range(count):
        program = drawn(random.Random(i).randrange)
        with zenith.configured(use_cost=False), collecting() as sites:
            jax.make_jaxpr(transformed(program, zenith.fuse))(*program.arrays())
        fused += any(s.fused for s in sites)
    assert fused >= least_fused(count, alike=1.0)


def test_programs_are_replayed_alike():
    """A program's text is the program: what a failure prints can be run again."""
    from fuzz.programs import Program

    for i in range(3):
        program = drawn(random.Random(i).randrange)
        again = eval(repr(program), {"Program": Program})
        arrays = program.arrays()
        assert str(jax.make_jaxpr(program)(*arrays)) == str(jax.make_jaxpr(again)(*again.arrays()))


def test_a_wrong_rewrite_is_found(monkeypatch):
    """The fuzzer sees a norm whose eps is off by 1e-3, which no shape and no dtype shows."""
    from zenith_jax.passes.match import norm
    from zenith_jax.passes.rewrite import _traced

    right = norm._climb
    monkeypatch.setattr(norm, "_climb", lambda t, e, r, m, eps, i: right(t, e, r, m, eps + 1e-3, i))
    _traced.cache_clear()

    @seed(1)
    @settings(
        max_examples=60, deadline=None, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
    )
    @given(programs())
    def some(program):
        check(program, Tally())

    with pytest.raises(Wrong, match="error"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        some()
    _traced.cache_clear()


def test_the_oracle_is_jax_in_float64():
    def function(x, w, labels):
        x = jax.nn.standardize(jnp.tanh(x @ w), axis=-1).astype(jnp.bfloat16).astype(w.dtype)
        logits = jax.lax.scan(lambda c, w: (jnp.sin(c @ w), c.sum()), x, jnp.stack([w, w]))[0]
        return jnp.take_along_axis(jax.nn.log_softmax(logits), labels, -1), jnp.cumsum(x[::-1], 0), jnp.argmax(x, 1)

    rng = np.random.default_rng(0)
    args = rng.normal(size=(5, 4)), rng.normal(size=(4, 4)), rng.integers(4, size=(5, 1)).astype(np.int32)
    narrow = [a.astype(np.float32) if a.dtype == np.float64 else a for a in args]
    found = evaluate(jax.make_jaxpr(function)(*narrow), args)
    with jax.enable_x64(True):
        # The cast to bfloat16 rounds in JAX, and not in the oracle.
        expected = jax.jit(lambda *a: function(*a))(*args)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=0.05 if a.dtype == np.float64 else 0)
    exact = jax.make_jaxpr(lambda x, w: jax.nn.softmax(x @ w) / 3)(*narrow[:2])
    with jax.enable_x64(True):
        np.testing.assert_allclose(evaluate(exact, args[:2])[0], jax.nn.softmax(args[0] @ args[1]) / 3, rtol=1e-12)
    assert zenith.config().enabled
