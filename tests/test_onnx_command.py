"""`zenith onnx`: what is in a model, what it gives, whether it agrees with ONNX Runtime, and how fast it is."""

import json
import sys

import numpy as np
import pytest
from onnx_models import FLOAT, INT, STRING, info, model, node, onnx

from zenith_jax import cli

RNG = np.random.default_rng(0)
W = RNG.normal(size=(8, 16)).astype(np.float32)


@pytest.fixture
def file(tmp_path):
    """y = gelu(x @ w), cut to its first n columns: n is an input that decides a shape."""
    nodes = [
        node("MatMul", ["x", "w"], ["m"]),
        node("Gelu", ["m"], ["g"]),
        node("Slice", ["g", "zero", "n", "axes"], ["y"]),
        node("ArgMax", ["y"], ["best"], axis=-1),
    ]
    proto = model(
        nodes,
        [info("x", FLOAT, ["batch", "length", 8]), info("n", INT, [1])],
        [info("y", FLOAT, ["batch", "length", None]), info("best", INT)],
        w=W,
        zero=np.array([0]),
        axes=np.array([-1]),
    )
    onnx.save(proto, tmp_path / "model.onnx")
    return str(tmp_path / "model.onnx")


def run(capsys, *arguments, code=0):
    """What `zenith onnx ... --json` prints."""
    assert cli.main(["onnx", *arguments, "--json"]) == code
    return json.loads(capsys.readouterr().out)


def fails(capsys, *arguments):
    """What a call with exit code 2 says."""
    assert cli.main(["onnx", *arguments]) == 2
    out, err = capsys.readouterr()
    assert not out
    return err


def test_inspect_says_what_is_in_a_model(file, capsys):
    found = run(capsys, "inspect", file)
    assert found["opset"] == 23 and found["unsupported"] == {}
    assert found["inputs"][0] == {"name": "x", "type": "float32[batch, length, 8]", "static": False}
    assert found["inputs"][1]["static"]
    assert found["nodes"] == {"MatMul": 1, "Gelu": 1, "Slice": 1, "ArgMax": 1}
    assert found["weights"] == {"float32": {"arrays": 1, "elements": 128, "bytes": 512}}


def test_inspect_explains_what_is_fused(file, capsys):
    found = run(capsys, "inspect", file, "--explain", "--dim", "batch=2", "--dim", "length=64", "--input", "n=[4]")
    assert found["explain"]["sites"], "the activation after the product is a site, fused or refused"


def test_inspect_of_what_is_not_computed_is_exit_code_1(tmp_path, capsys):
    onnx.save(model([node("Evil", ["x"], ["y"]), node("Evil", ["y"], ["z"], "b")], ["x"], ["z"]), tmp_path / "m.onnx")
    assert run(capsys, "inspect", str(tmp_path), code=1)["unsupported"] == {"Evil": 2}


def test_run_takes_files_literals_and_random_inputs(file, tmp_path, capsys):
    x = RNG.normal(size=(1, 3, 8)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    np.savez(tmp_path / "all.npz", x=x, n=np.array([4]))
    saved = []
    for given in (
        ["--input", f"x={tmp_path / 'x.npy'}", "--input", "n=[4]"],
        ["--inputs", str(tmp_path / "all.npz")],
        ["--inputs", str(tmp_path / "all.npz"), "--input", f"x={x.tolist()}"],
    ):
        found = run(capsys, "run", file, *given, "--save", str(tmp_path / "out.npz"))
        assert [o["type"] for o in found["outputs"]] == ["float32[1, 3, 4]", "int32[1, 3, 1]"]
        saved.append(np.load(tmp_path / "out.npz")["y"])
    for y in saved[1:]:
        np.testing.assert_array_equal(y, saved[0])
    found = run(capsys, "run", file, "--dim", "batch=2", "--input", "n=[4]")
    assert found["inputs"][0]["type"] == "float32[2, 1, 8]"
    assert found != run(capsys, "run", file, "--dim", "batch=2", "--input", "n=[4]", "--seed", "1")


def test_check_agrees_or_shows_where_not(file, capsys):
    pytest.importorskip("onnxruntime")
    arguments = ("check", file, "--dim", "batch=2", "--dim", "length=3", "--input", "n=[4]")
    found = run(capsys, *arguments)
    assert found["agrees"] and [o["name"] for o in found["outputs"]] == ["y", "best"]
    assert found["outputs"][0]["relative"] < 1e-5
    found = run(capsys, *arguments, "--rtol", "-1", code=1)
    assert not found["agrees"] and not found["outputs"][0]["agrees"]


@pytest.mark.parametrize(
    ("result", "expected", "agrees"),
    [
        ([1.0, 2.0], [1.0, 2.001], True),
        ([1.0, 2.0], [1.0, 2.01], False),
        ([0.0, 1e-4], [0.0, 0.0], True),  # nothing to be relative to
        ([0.0, np.nan], [0.0, np.nan], True),
        ([0.0, 1.0], [0.0, np.nan], False),
        ([np.inf, 1.0], [-np.inf, 1.0], False),
        ([np.inf, 1.0], [np.inf, 1.0], True),
        ([[1.0, 2.0]], [1.0, 2.0], False),
    ],
)
def test_comparison(result, expected, agrees):
    from zenith_jax.onnx_command.check import _compared

    row = _compared("y", np.array(result, np.float32), np.array(expected, np.float32), 1e-3)
    assert row["agrees"] is agrees


def test_bench_measures_both_and_says_what_is_fused(file, capsys):
    pytest.importorskip("onnxruntime")
    arguments = ("bench", file, "--dim", "length=4", "--input", "n=[4]", "--runs", "3")
    found = run(capsys, *arguments)
    assert [row["by"] for row in found["rows"]] == ["zenith.jit", "jax.jit", "ONNX Runtime"]
    assert all(row["median_ms"] > 0 and row["first_ms"] > 0 for row in found["rows"])
    assert isinstance(found["fused"], dict)
    run(capsys, *arguments, "--at-least", "1e9", code=1)


@pytest.mark.parametrize("action", ["inspect", "run", "check", "bench"])
def test_tables_are_for_people(file, capsys, action):
    if action in ("check", "bench"):
        pytest.importorskip("onnxruntime")
    more = ["--runs", "1"] if action == "bench" else ["--explain"] if action == "inspect" else []
    assert cli.main(["onnx", action, file, "--input", "n=[4]", *more]) == 0
    out = capsys.readouterr().out
    wanted = {"inspect": "MatMul 1", "run": "float32[1, 1, 4]", "check": "agrees", "bench": "zenith.jit"}
    assert wanted[action] in out


def test_help_has_an_example(capsys):
    for action in ("inspect", "run", "check", "bench"):
        with pytest.raises(SystemExit, match="0"):
            cli.main(["onnx", action, "--help"])
        assert f"zenith onnx {action} model.onnx" in capsys.readouterr().out


def test_errors_say_what_to_write(file, tmp_path, capsys):
    assert "there is no file" in fails(capsys, "inspect", str(tmp_path / "nowhere.onnx"))
    (tmp_path / "bad.onnx").write_bytes(b"\xff" * 50)
    assert "cannot be read as an ONNX model" in fails(capsys, "inspect", str(tmp_path / "bad.onnx"))
    assert "input 'n' decides a shape" in fails(capsys, "run", file)
    n = ("--input", "n=[4]")
    assert "--input is NAME=VALUE, not 'n'" in fails(capsys, "run", file, "--input", "n")
    assert "no inputs ['m']; it has x: float32[batch, length, 8]" in fails(capsys, "run", file, *n, "--input", "m=1")
    assert "cannot be read" in fails(capsys, "run", file, "--input", "n=__import__('os')")
    assert "cannot be read" in fails(capsys, "run", file, "--input", "n=nowhere.npy")
    assert "the symbolic dimensions are batch, length" in fails(capsys, "run", file, *n, "--dim", "bach=2")
    assert "'many' is no size" in fails(capsys, "run", file, *n, "--dim", "batch=many")
    assert "at least 1" in fails(capsys, "bench", file, *n, "--runs", "0")


def test_dimension_without_a_symbol_is_called_by_its_input(tmp_path, capsys):
    onnx.save(model([node("Relu", ["x"], ["y"])], [info("x", FLOAT, [None, 3])]), tmp_path / "m.onnx")
    found = run(capsys, "run", str(tmp_path / "m.onnx"), "--dim", "x.0=5")
    assert found["outputs"][0]["type"] == "float32[5, 3]"


def test_failure_on_random_inputs_says_which_dimensions_were_free(tmp_path, capsys):
    proto = model([node("Reshape", ["x", "s"], ["y"])], [info("x", FLOAT, ["batch", 3])], s=np.array([2, 3]))
    onnx.save(proto, tmp_path / "m.onnx")
    message = fails(capsys, "run", str(tmp_path / "m.onnx"))
    assert "node Reshape 'the_Reshape'" in message and "were 1: --dim batch=N" in message
    assert cli.main(["onnx", "run", str(tmp_path / "m.onnx"), "--dim", "batch=2"]) == 0


def test_strings_are_given_not_drawn(tmp_path, capsys):
    proto = model([node("StringConcat", ["x", "x"], ["y"])], [info("x", STRING, [1])], [info("y", STRING, [1])])
    onnx.save(proto, tmp_path / "m.onnx")
    assert "cannot be random" in fails(capsys, "run", str(tmp_path / "m.onnx"))
    found = run(capsys, "run", str(tmp_path / "m.onnx"), "--input", "x=['ab']")
    assert found["outputs"][0]["type"] == "object[1]"


def test_without_onnx_runtime_the_error_names_what_to_install(file, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert "pip install onnxruntime" in fails(capsys, "check", file, "--input", "n=[4]")
