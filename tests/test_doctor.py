"""`zenith doctor`."""

import io
import json

import pytest
from rich.console import Console

from zenith_jax import cli, doctor
from zenith_jax.doctor import Finding


def test_json_lists_every_finding_and_the_exit_code_is_0_where_cpu_kernels_work(capsys):
    assert cli.main(["doctor", "--json"]) == 0
    report = {f["name"]: f for f in json.loads(capsys.readouterr().out)}
    assert report["CPU kernels"]["state"] == "ok"
    assert report["jax"]["section"] == "installed"
    assert {"processor", "nvcc", "NVIDIA driver", "JAX's backend"} <= set(report)


def test_exit_code_is_1_without_cpu_kernels(monkeypatch, capsys):
    reason = "zenith_jax._cpu is not built: run `pip install .`"
    monkeypatch.setattr(doctor.native, "module", lambda platform: None)
    monkeypatch.setattr(doctor.native, "unavailable_reason", lambda platform: reason)
    assert cli.main(["doctor"]) == 1
    shown = capsys.readouterr().out
    assert "CPU kernels: run `pip install .`" in shown


def test_text_keeps_brackets_and_lists_advice():
    finding = Finding("found", "GPU", "broken", "[cuda13]", "`pip install 'zenith-jax[cuda13]'`")
    out = io.StringIO()
    doctor.show([finding], Console(file=out, width=100))
    assert "[cuda13]" in out.getvalue()
    assert "  GPU: `pip install 'zenith-jax[cuda13]'`" in out.getvalue()


def test_unknown_command_exits_with_usage(capsys):
    with pytest.raises(SystemExit):
        cli.main(["cure"])
    assert "invalid choice: 'cure'" in capsys.readouterr().err
