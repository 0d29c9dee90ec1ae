"""`python -m zenith_jax.bench`: every case at a tiny size, its figures, and its exit codes."""

import dataclasses
import io
import json
import time

import jax
import numpy as np
import pytest
from rich.console import Console

from zenith_jax import cli
from zenith_jax.bench import cases, memory, run, timing

TINY = [
    cases.attention_case(cases.dot_product_attention, 1, 2, 64, 16),
    cases.attention_case(cases.causal_attention, 1, 2, 64, 16),
    cases.attention_case(cases.einsum_attention, 1, 2, 64, 16),
    cases.rows_case("gelu_erf", cases.gelu_erf, 64, 256),
    cases.rows_case("gelu_tanh", cases.gelu_tanh, 64, 256),
    cases.rows_case("silu", jax.nn.silu, 64, 256),
    cases.rows_case("layer_norm", cases.layer_norm, 64, 256, parameters=2),
    cases.rows_case("rms_norm", cases.rms_norm, 64, 256, parameters=1),
    cases.rows_case("add + layer_norm", cases.add_layer_norm, 64, 256, arrays=2, parameters=2),
    cases.rows_case("softmax", jax.nn.softmax, 64, 256),
    cases.image_case(cases.group_norm_silu, 2, 8, 64),
    cases.encoder_layer_case(2, 64),
]


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("case", TINY, ids=lambda c: c.name)
def test_every_case_is_fused_and_its_kernels_are_called(case, gradient):
    with run.configured(use_cost=False):
        m = run.measure(dataclasses.replace(case, gradient=gradient), runs=1, seconds=0)
    assert sum(m.fused.values()) == (9 if "encoder" in case.name else 1)
    assert any(call.endswith("_bwd") for call in m.calls) == gradient
    assert m.jax_seconds > 0 and m.zenith_seconds > 0


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
def test_labels_name_one_case_each(platform):
    labels = [c.label for c in cases.cases(platform)]
    assert len(set(labels)) == len(labels)


def test_work_of_attention_and_of_a_sum_with_its_norm():
    attention = cases.attention_case(cases.dot_product_attention, 2, 3, 16, 8)
    assert attention.work == 2 * 2 * 2 * 3 * 16 * 16 * 8  # two products, multiply and add
    assert cases.attention_case(cases.causal_attention, 2, 3, 16, 8).work == attention.work / 2
    both = cases.rows_case("", cases.add_layer_norm, 4, 8, arrays=2, parameters=2)
    assert both.work == 4 * 4 * 8 * 4  # x, residual, sum and norm


def test_interleaved_gives_each_its_own_median():
    calls = []
    times = timing.interleaved(
        {"slow": lambda: (calls.append("slow"), time.sleep(0.02)), "quick": lambda: calls.append("quick")}, runs=4
    )
    assert times["slow"] >= 0.02 > times["quick"]
    slow, quick = (["slow"] * timing.BURST, ["quick"] * timing.BURST)
    assert calls[4:] == slow + quick + quick + slow + slow + quick  # after both were warmed up


def test_the_first_call_of_a_burst_is_not_counted():
    calls = []

    def f():  # slow when another function ran before it
        time.sleep(0.02 if calls[-1:] == ["g"] else 0.001)
        calls.append("f")

    times = timing.interleaved({"f": f, "g": lambda: calls.append("g")}, runs=10)
    assert 0.001 <= times["f"] < 0.02


def test_interleaved_stops_when_the_time_is_up_and_counts_every_round():
    steps = []
    timing.interleaved({"f": lambda: time.sleep(0.01)}, runs=10, seconds=0, step=lambda: steps.append(1))
    assert len(steps) == 10


def test_a_queued_round_has_as_many_calls_as_take_5_ms():
    calls = []
    times = timing.interleaved({"f": lambda: (calls.append(0), time.sleep(0.001))}, runs=3, queued=True)
    rounds = len(calls) - 2 - 10  # two to warm up, ten to see how long one takes
    assert 3 < rounds <= 3 * 5 and rounds % 3 == 0
    assert 0.001 <= times["f"] < 0.1


def measurement(speed, calls=("gelu_erf_fwd",)):
    return run.Measurement(TINY[3], speed, 1.0, {"gelu_erf": 1}, calls, ())


def test_check_fails_for_a_rewritten_case_that_is_slower(monkeypatch):
    def exit_code(m, *options):
        monkeypatch.setattr(run, "measured", lambda *_, **__: [m])
        return cli.main(["bench", "--only", "gelu", *options])

    assert exit_code(measurement(0.5), "--check") == 1
    assert exit_code(measurement(0.5)) == 0
    assert exit_code(measurement(0.98), "--check") == 0
    assert exit_code(measurement(0.5, calls=()), "--check") == 0  # XLA's own code: noise


def test_a_slow_case_is_measured_again(monkeypatch):
    speeds = iter([0.5, 1.5])
    monkeypatch.setattr(run, "measure", lambda case, **_: measurement(next(speeds)))
    console = Console(file=io.StringIO())
    assert [m.speed for m in run.measured(TINY[:1], runs=1, seconds=0, retry=True, console=console)] == [1.5]


def test_json_has_the_machine_and_the_figures(monkeypatch, tmp_path):
    monkeypatch.setattr(run, "measured", lambda *_, **__: [measurement(2.0)])
    assert cli.main(["bench", "--only", "gelu", "--json", str(tmp_path / "figures.json")]) == 0
    content = json.loads((tmp_path / "figures.json").read_text())
    assert content["machine"]["jax"] == jax.__version__
    assert content["cases"][0]["speed"] == 2.0


def test_a_pattern_without_a_case_is_an_error(capsys):
    assert cli.main(["bench", "--only", "no such case"]) == 2
    assert "no case matches" in capsys.readouterr().out


def test_table_says_who_computed_and_why():
    refused = dataclasses.replace(measurement(1.0, calls=()), fused={}, reasons=("XLA is as fast [here]",))
    missing = measurement(1.0, calls=())
    out = io.StringIO()
    Console(file=out, width=200).print(run.table([measurement(2.0), refused, missing]))
    shown = out.getvalue()
    assert "2.00 x" in shown and "XLA (XLA is as fast [here])" in shown and "XLA: no kernel was called" in shown


def test_markdown_has_a_row_a_case():
    lines = run.markdown([measurement(2.0)]).splitlines()
    assert lines[2].startswith("| gelu_erf 64x256 float32 | 2e+03 | 1e+03 | 2.00 x |")
    assert len({line.count("|") for line in lines}) == 1


def test_peak_memory_grows_linearly_with_our_kernel_and_quadratically_without():
    figures = {(f.how, f.length): f.mebibytes for f in memory.growths((1024, 2048), gradients=(False,))}
    # XLA holds the logits, 4 bytes for each pair of positions; we hold the result, 64 times 4 bytes for each position.
    logits = memory.HEADS * 2048**2 * 4 / 2**20
    assert figures["jax.jit", 2048] > 0.9 * logits
    assert figures["zenith.jit", 2048] < 0.5 * logits
    assert np.isfinite(list(figures.values())).all()
