"""zenith compile and zenith run: what they write and print, and the exit codes that scripts go by."""

from __future__ import annotations

import json

import numpy as np
import pytest

from zenith_jax import cli
from zenith_jax.version import __version__

pytest.importorskip("flatbuffers", reason="jax.export serialises with it")

MODEL = """
import jax, jax.numpy as jnp
params = {"w": jnp.cos(jnp.arange(32.0)).reshape(8, 4)}
def apply(params, tokens): return {"logits": tokens @ params["w"]}
model = (apply, params)
def model_args(): return (jnp.ones((3, 8)),)
def broken(x): return x @ x
number = 3
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "commands_model.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_compile_and_run(folder, capsys):
    command = ["compile", "commands_model.py:model", "--dynamic", "batch=1,4", "--mode", "reduce-overhead", "--json"]
    assert cli.main(command) == 0
    written = json.loads(capsys.readouterr().out)
    assert written["file"] == "model.zenith"
    assert written["inputs"] == [{"name": "tokens", "shape": ["batch", 8], "dtype": "float32"}]
    x = np.sin(np.arange(24, dtype=np.float32)).reshape(3, 8)
    np.savez("in.npz", tokens=x)
    files = ["--inputs", "in.npz", "--output", "out.npz"]
    assert cli.main(["run", "model.zenith", *files, "--json", "--bench", "0.01"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["outputs"]["logits"]["shape"] == [3, 4]
    assert shown["benchmark"]["median_ms"] > 0
    np.testing.assert_allclose(
        np.load("out.npz")["logits"], x @ np.cos(np.arange(32, dtype=np.float32)).reshape(8, 4), atol=1e-5
    )
    assert cli.main(["run", "model.zenith"]) == 0
    assert capsys.readouterr().out.startswith("logits: dtype float32, shape [4, 4], min ")


def test_exit_codes(folder, capsys):
    (folder / "bad.zenith").write_bytes(b"nothing")
    np.savez("in.npz", other=1)
    assert cli.main(["compile", "commands_model.py:model", "-o", "m.zenith"]) == 0
    for command, code, message in (
        (["compile", "nowhere.onnx"], 2, "there is no file nowhere.onnx"),
        (["compile", "commands_model.py:apply"], 2, "no arguments for apply"),
        (["compile", "commands_model.py:model", "--dynamic", "batch=x"], 2, "--dynamic takes NAME=SIZES"),
        (
            ["compile", "commands_model.py:number", "--args", "f32[2]"],
            1,
            "cannot compile an object of type",
        ),
        (["compile", "commands_model.py:broken", "--args", "f32[2,3]"], 1, "cannot be traced with the example inputs"),
        (["compile", "commands_model.py:model", "-o", "none/m.zenith"], 1, "there is no folder none"),
        (["run", "nowhere.zenith"], 2, "there is no file"),
        (["run", "bad.zenith"], 1, "truncated, or another kind of file"),
        (["run", "m.zenith", "--inputs", "bad.zenith"], 2, "is no readable .npz file"),
        (["run", "m.zenith", "--inputs", "in.npz"], 2, "holds ['other'], the inputs ['tokens'] are missing"),
    ):
        assert cli.main(command) == code, command
        assert message in capsys.readouterr().err.replace("\n", " "), command
    np.savez("in.npz", tokens=np.ones((2, 8), np.float32))
    assert cli.main(["run", "m.zenith", "--inputs", "in.npz"]) == 2
    assert "tokens has shape (2, 8)" in capsys.readouterr().err


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_shows_an_example(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main([command, "--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    # The actions of `zenith onnx` have an example each.
    below = shown.partition("usage: zenith ")[2]
    assert f"zenith {command} " in below or command == "onnx", "no example besides the usage"


def test_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"zenith-jax {__version__}\n"


def test_an_unknown_command_is_a_usage_error(capsys):
    for argv in ([], ["nonsense"], ["cache", "nonsense"]):
        with pytest.raises(SystemExit) as stopped:
            cli.main(argv)
        assert stopped.value.code == 2
    assert "invalid choice" in capsys.readouterr().err
