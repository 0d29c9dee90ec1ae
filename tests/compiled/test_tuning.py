"""mode="max-autotune": measured once, kept on disk, whole entries only; `zenith cache`."""

from __future__ import annotations

import json
import resource
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fresh_process import started_script

import zenith_jax as zenith
from zenith_jax import cli, native
from zenith_jax.compiled import tuning
from zenith_jax.passes.choose import Choices
from zenith_jax.report import Site

pytestmark = pytest.mark.skipif(
    native.unavailable_reason("cpu") is not None, reason="the CPU module is not built: there is nothing to choose from"
)
X = np.sin(np.arange(4 * 64, dtype=np.float32)).reshape(4, 64)


def model(x):
    return jax.nn.softmax(x) @ jnp.ones((64, 2))


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("ZENITH_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def timed(monkeypatch):
    """Sites take these times; the names of those that were measured."""
    measured = []

    def measured_us(site):
        measured.append(site.op)
        return timed.times

    def timed(fused_us, xla_us):
        timed.times = fused_us, xla_us
        return measured

    monkeypatch.setattr(tuning, "measured_us", measured_us)
    return timed


@pytest.mark.parametrize(("times", "counts"), [((1.0, 2.0), {"softmax": 1}), ((2.0, 1.0), {})])
def test_the_faster_is_taken_and_measured_once(timed, times, counts):
    measured = timed(*times)
    first = zenith.compile(model, X, mode="max-autotune")
    again = zenith.compile(model, X, mode="max-autotune")
    assert measured == ["softmax"]
    assert first.report.counts() == again.report.counts() == counts
    np.testing.assert_allclose(first(X), model(X), rtol=1e-6)
    site = next(s for s in first.report.sites if s.op == "softmax")
    if counts:
        assert "measured on this device" in site.choice
    else:
        assert site.reason == "XLA was faster here, 1 us against 2"


def test_a_site_is_really_measured():
    zenith.compile(model, X, mode="max-autotune")
    (entry,) = tuning.entries()
    assert entry.key["site"].startswith("softmax")
    assert 0.1 < entry.fused_us < 1e6
    assert 0.1 < entry.xla_us < 1e6


def test_another_key_is_measured_again(timed, monkeypatch):
    measured = timed(1.0, 2.0)
    zenith.compile(model, X, mode="max-autotune")
    zenith.compile(model, np.tile(X, (2, 1)), mode="max-autotune")
    assert len(measured) == 2
    monkeypatch.setattr(tuning, "__version__", "99")
    zenith.compile(model, X, mode="max-autotune")
    assert len(measured) == 3


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"key": {}}', "cut", "other key", "negative"])
def test_a_damaged_entry_is_measured_again(timed, folder, damage):
    measured = timed(1.0, 2.0)
    zenith.compile(model, X, mode="max-autotune")
    (path,) = folder.glob("*.json")
    whole = path.read_text()
    content = json.loads(whole)
    other = {**content, "key": {**content["key"], "jaxlib": "0"}}
    texts = {"cut": whole[:-9], "other key": json.dumps(other), "negative": json.dumps({**content, "xla_us": -1})}
    path.write_text(texts.get(damage, damage))
    assert zenith.compile(model, X, mode="max-autotune").report.counts() == {"softmax": 1}
    assert len(measured) == 2
    assert path.read_text().startswith("{\n")


WRITE_OFTEN = """
from zenith_jax.compiled import tuning
for _ in range(50):
    tuning._write(tuning.Entry(tuning._key("site"), 1.0, 2.0, "now " * 2000))
"""


def test_processes_that_write_at_once_leave_whole_entries(folder, tmp_path_factory):
    writers = [
        started_script(WRITE_OFTEN, tmp_path_factory.mktemp("writer"), ZENITH_CACHE_DIR=str(folder)) for _ in range(2)
    ]
    seen = 0
    while any(w.poll() is None for w in writers):
        for path in folder.glob("*.json"):
            assert tuning._read(path) is not None, "a partial entry was read"
            seen += 1
    for writer in writers:
        _, errors = writer.communicate()
        assert writer.returncode == 0, errors
    assert seen
    assert [e.xla_us for e in tuning.entries()] == [2.0]
    assert not list(folder.glob(".*.part"))


def test_a_full_disk_is_survived_with_a_warning(timed, folder, caplog):
    measured = timed(1.0, 2.0)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write past the limit is an error, as on a full disk
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))
        compiled = zenith.compile(model, X, mode="max-autotune")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert compiled.report.counts() == {"softmax": 1}
    assert measured == ["softmax"]
    assert "a measurement cannot be kept in" in caplog.text and "set ZENITH_CACHE_DIR" in caplog.text
    assert list(folder.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_survived(timed, tmp_path, monkeypatch, caplog):
    timed(1.0, 2.0)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ZENITH_CACHE_DIR", str(tmp_path / "file" / "cache"))
    assert zenith.compile(model, X, mode="max-autotune").report.counts() == {"softmax": 1}
    assert "a measurement cannot be kept" in caplog.text


def test_a_saved_model_keeps_its_choices(timed, tmp_path):
    pytest.importorskip("flatbuffers", reason="jax.export serialises with it")
    timed(1.0, 2.0)
    with zenith.configured(use_cost=True):
        fused = zenith.compile(model, X, mode="max-autotune")
    assert "zenith_softmax" in fused.exported("cpu", {}).program.mlir_module()
    assert zenith.load(fused.save(tmp_path / "m.zenith")).mode == "max-autotune"


def test_the_cache_command(timed, capsys):
    timed(1.0, 2.0)
    zenith.compile(model, X, mode="max-autotune")
    assert cli.main(["cache", "ls"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("1 entries in ") and "\nzenith          1          2  softmax" in shown
    assert cli.main(["cache", "show", "softmax"]) == 0
    assert f"jaxlib    {jax.lib.__version__}" in capsys.readouterr().out
    assert cli.main(["cache", "show", "attention"]) == 1
    assert "has a site with 'attention' in it" in capsys.readouterr().out
    assert cli.main(["cache", "ls", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["fused_us"] == 1.0
    assert cli.main(["cache", "clear"]) == 0
    assert capsys.readouterr().out == "1 entries removed\n"
    assert not list(tuning.entries())


def test_sites_without_a_measurement_are_fused():
    choices = Choices({"a": (2.0, 1.0)})
    assert choices.declined("a") is not None
    assert choices.declined("b") is None
    assert Site("softmax", True, "here", detail="d", shapes="s").key == "softmax d s"
