"""Records of compilations: what they hold, to which compilation they belong, and who is told."""

from __future__ import annotations

import dataclasses
import json
import logging
import textwrap
import threading

import jax
import jax.numpy as jnp
import pytest
from fresh_process import started_script

import zenith_jax as zenith
from zenith_jax.config import JsonFormatter
from zenith_jax.passes import rewrite
from zenith_jax.telemetry import compiling

KEYS = {
    "schema": int,
    "id": int,
    "stage": str,
    "function": str,
    "program": str,
    "platform": str,
    "time": float,
    "seconds": dict,
    "passes": dict,
    "cache": str,
    "error": str,
    "fused": int,
    "refused": int,
    "flops": int,
    "bytes_saved": int,
    "sites": list,
}
SITE_KEYS = set(
    "op fused source detail reason where differentiated shapes advice choice flops bytes_saved expected_us whole "
    "gathered".split()
)


@pytest.fixture(autouse=True)
def fresh():
    zenith.telemetry.clear()
    with zenith.configured(use_cost=False):
        yield


def block(x):
    y = jax.nn.softmax(x * 2)
    return (y - y.mean(-1, keepdims=True)) / jnp.sqrt(y.var(-1, keepdims=True, ddof=1) + 1e-5)  # refused: N - 1


X = jnp.ones((4, 64))


def the_record():
    (record,) = zenith.telemetry.records()
    return record


def test_a_compilation_leaves_one_record_and_calls_leave_none():
    jitted = zenith.jit(block)
    for _ in range(3):
        jitted(X)
    record = the_record()
    assert (record.stage, record.function, record.program, record.platform) == ("compiled", "block", "block", "cpu")
    assert [(s.op, s.fused) for s in record.sites] == [("softmax", True), ("norm", False)]
    assert "63" in record.sites[1].reason or "64" in record.sites[1].reason
    assert all(s.source.startswith(__file__) for s in record.sites)
    assert set(record.seconds) == {"trace", "rewrite", "lower", "compile"}
    assert 0 < record.seconds["rewrite"] < record.seconds["trace"]
    assert sum(record.passes.values()) <= record.seconds["rewrite"]
    assert {"graph", "match.softmax", "emit", "rebuild"} <= set(record.passes)
    assert record.flops == record.sites[0].flops > 0
    assert record.bytes_saved == record.sites[0].bytes_saved > 0
    assert record.error == ""
    with pytest.raises(dataclasses.FrozenInstanceError):
        record.stage = "x"


def test_the_schema_of_its_json():
    zenith.jit(block)(X)
    plain = json.loads(json.dumps(the_record().as_dict()))
    assert {k: type(v) for k, v in plain.items()} == KEYS
    assert plain["schema"] == zenith.telemetry.SCHEMA == 1
    assert all(set(s) == SITE_KEYS | {"measured_us"} for s in plain["sites"])


def test_a_gradient_inside_belongs_to_the_same_record():
    def step(x):
        return jax.grad(lambda x: block(x).sum())(x)

    zenith.jit(step).lower(X).compile()
    record = the_record()
    assert record.function.endswith("step")
    assert [s.differentiated for s in record.sites if s.fused] == [True]


def test_ahead_of_time_in_stages_and_the_other_thread():
    """Two functions of one name, traced in two threads: each compilation gets its own record."""
    barrier, done = threading.Barrier(2), {}

    def run(width):
        def same_name(x):
            return jax.nn.softmax(x * 3)

        with zenith.configured(use_cost=False):
            traced = zenith.jit(same_name).trace(jnp.ones((2, width)))
            barrier.wait()
            done[width] = traced.lower().compile()

    threads = [threading.Thread(target=run, args=(n,)) for n in (16, 32)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    records = zenith.telemetry.records()
    assert sorted(r.sites[0].shapes for r in records) == ["float32[2,16]", "float32[2,32]"]
    assert all(r.stage == "compiled" for r in records)


def test_explain_leaves_a_rewritten_record_that_no_later_compilation_takes():
    zenith.explain(block)(X)
    jax.jit(lambda x: x + 5)(X)
    assert the_record().stage == "rewritten"
    assert "compile" not in the_record().seconds


def test_the_buffer_is_bounded(monkeypatch):
    monkeypatch.setattr(compiling, "CAPACITY", 3)
    for _ in range(5):
        zenith.explain(block)(X)
    ids = [r.id for r in zenith.telemetry.records()]
    assert len(ids) == 3 and ids == sorted(ids)


def test_listeners_hear_every_stage_until_they_end(caplog):
    heard = []
    end = zenith.telemetry.listen(heard.append)

    def broken(record):
        raise RuntimeError("mine")

    logger = logging.getLogger("zenith_jax")
    handlers, logger.handlers = logger.handlers, []  # the suite's own, which takes any logged exception for a bug
    end_broken = zenith.telemetry.listen(broken)
    try:
        zenith.jit(block)(X)
        end_broken()
        end()
        zenith.explain(block)(X)
    finally:
        logger.handlers = handlers
    assert [r.stage for r in heard] == ["rewritten", "compiled"]
    assert "a listener" in caplog.text


def test_a_failed_rewriting_says_so(monkeypatch):
    logger = logging.getLogger("zenith_jax")
    handlers, logger.handlers = logger.handlers, []
    monkeypatch.setattr(rewrite.Graph, "of", lambda jaxpr: 1 / 0)
    try:
        zenith.jit(block)(X)
    finally:
        logger.handlers = handlers
    assert "ZeroDivisionError" in the_record().error


def test_a_function_that_raises_leaves_nothing_behind():
    def wrong(x):
        raise KeyError("mine")

    with pytest.raises(KeyError):
        zenith.jit(wrong)(X)
    assert zenith.telemetry.records() == []
    zenith.jit(block)(X)
    assert the_record().function == "block"


def test_the_compilation_cache_is_named(tmp_path):
    from jax.experimental.compilation_cache import compilation_cache

    options = dict(
        jax_compilation_cache_dir=str(tmp_path),
        jax_persistent_cache_min_compile_time_secs=0,
        jax_persistent_cache_min_entry_size_bytes=-1,
    )
    before = {name: getattr(jax.config, name) for name in options}
    for name, value in options.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    try:
        for _ in range(2):
            jax.clear_caches()
            zenith.jit(block)(X)
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
    assert [r.cache for r in zenith.telemetry.records()] == ["miss", "hit"]


def test_a_line_of_json_for_each_compilation():
    lines = []

    class Lines(logging.Handler):
        def emit(self, record):
            lines.append(JsonFormatter().format(record))

    logger, handler = logging.getLogger("zenith_jax"), Lines()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        zenith.jit(block)(X)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    parsed = [json.loads(line) for line in lines]
    (compiled,) = [p["zenith"] for p in parsed if "zenith" in p]
    assert compiled == json.loads(json.dumps(the_record().as_dict()))
    assert any("left to XLA because" in p["message"] for p in parsed)


@pytest.mark.parametrize("level", ["info", "json"])
def test_zenith_log_writes_to_stderr(tmp_path, level):
    script = """
        import jax.numpy as jnp, zenith_jax as zenith
        def block(x):
            y = x * 2
            return (y - y.mean(-1, keepdims=True)) / jnp.sqrt(y.var(-1, keepdims=True, ddof=1) + 1e-5)
        zenith.jit(block).lower(jnp.ones((4, 64))).compile()
    """
    process = started_script(textwrap.dedent(script), tmp_path, ZENITH_LOG=level, ZENITH_COST="0")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and out == "", err
    lines = err.splitlines()
    if level == "json":
        records = [r["zenith"] for r in map(json.loads, lines) if "zenith" in r]
        assert [(r["function"], r["stage"], r["refused"]) for r in records] == [("block", "compiled", 1)]
    else:
        assert all(line.startswith("zenith: ") for line in lines)
        assert any("left to XLA because" in line for line in lines) and any("compile " in line for line in lines)
