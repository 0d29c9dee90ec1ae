"""`zenith serve`: each kind of model, signals, exit codes, and what it leaves behind."""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
import urllib.request
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from serving_models import TOLERANCE, Client, compiled_mlp, rows, wrong

import zenith_jax as zenith

MODEL = """
import jax, jax.numpy as jnp
def double(x): return {"doubled": x * 2}
def example_args(): return jnp.ones((1, 3))
"""
PORTS = ("--http-port", "0", "--grpc-port", "0", "--metrics-port", "0")


def environment(tmp_path, **more):
    package = str(pathlib.Path(zenith.__file__).parents[1])
    temporary = tmp_path / "tmp"
    temporary.mkdir(exist_ok=True)
    paths = os.pathsep.join(p for p in (package, os.environ.get("PYTHONPATH", "")) if p)
    return {**os.environ, "PYTHONPATH": paths, "JAX_PLATFORMS": "cpu", "TMPDIR": str(temporary), **more}


COMMAND = (sys.executable, "-c", "import sys; from zenith_jax.cli import main; sys.exit(main())", "serve")


@contextlib.contextmanager
def serving(tmp_path, *arguments, **more):
    """The process, once it says that it is ready, with its addresses."""
    with open(tmp_path / "log", "wb") as log:
        process = subprocess.Popen(
            [*COMMAND, *arguments, *PORTS],
            cwd=tmp_path,
            env=environment(tmp_path, **more),
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        try:
            line = ""
            for line in process.stdout:
                if line.startswith("zenith serve: ready"):
                    break
            found = re.search(r"ready: (\S+) at http://(\S+) and grpc://(\S+), metrics at (\S+)", line)
            assert found, (tmp_path / "log").read_text()[-3000:]
            yield SimpleNamespace(process=process, name=found[1], http=found[2], grpc=found[3], metrics=found[4])
        finally:
            if process.poll() is None:
                process.kill()
            process.stdout.close()
            process.wait()


def backends_below(pid):
    (triton,) = children(pid)
    return zenith.serving.TritonServer.backends(SimpleNamespace(process=SimpleNamespace(pid=triton)))


def children(pid):
    tasks = pathlib.Path(f"/proc/{pid}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]


def refused(tmp_path, *arguments, **more):
    done = subprocess.run(
        [*COMMAND, *arguments, *PORTS],
        cwd=tmp_path,
        env=environment(tmp_path, **more),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2, (done.returncode, done.stderr)
    return done.stderr


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGINT])
def test_a_function_of_a_file(triton, tmp_path, end):
    del triton
    (tmp_path / "mine.py").write_text(MODEL)
    target = "mine.py:double" if end == signal.SIGTERM else "mine:double"
    with serving(tmp_path, target, "--dynamic", "batch=1,4") as server:
        assert server.name == "double" and server.http.startswith("127.0.0.1:")
        with Client(server, "http") as client:
            (answer,) = client.infer("double", x=np.float32([[1, 2, 3]] * 3)).values()
        np.testing.assert_array_equal(answer, [[2, 4, 6]] * 3)
        time.sleep(0.5)  # until Triton has seen the connection's end: it waits for open ones
        server.process.send_signal(end)
        assert server.process.wait(60) == 0
    assert list((tmp_path / "tmp").iterdir()) == []


def test_a_saved_model_without_its_code_and_a_server_that_ends_by_itself(triton, tmp_path):
    del triton
    compiled_mlp().save(tmp_path / "mlp.zenith")
    with serving(tmp_path, "mlp.zenith", "--repository", "models", "--exit-seconds", "3") as server:
        x = rows(3)
        with Client(server, "grpc") as client:
            assert wrong(x, client.infer("mlp", x=x)) <= TOLERANCE
        (stub,) = backends_below(server.process.pid)
        os.kill(stub, signal.SIGKILL)
        assert server.process.wait(60) == 1
    assert "the process of a model died" in (tmp_path / "log").read_text()
    with serving(tmp_path, "models") as server:
        (triton_process,) = children(server.process.pid)
        os.kill(triton_process, signal.SIGKILL)
        assert server.process.wait(60) == 1
    assert "exit code -9" in (tmp_path / "log").read_text()
    assert (tmp_path / "models" / "mlp" / "1" / "model.zenith").is_file()


def test_an_onnx_model_is_asked_with_the_dtypes_that_it_declares(triton, tmp_path):
    del triton
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    helper, kind = onnx.helper, onnx.TensorProto
    graph = helper.make_graph(
        [helper.make_node("Gather", ["table", "ids"], ["rows"])],
        "lookup",
        [helper.make_tensor_value_info("ids", kind.INT64, ["batch", 2])],
        [helper.make_tensor_value_info("rows", kind.FLOAT, ["batch", 2, 3])],
        [helper.make_tensor("table", kind.FLOAT, [4, 3], np.arange(12, dtype=np.float32))],
    )
    opsets = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), tmp_path / "lookup.onnx")
    latencies = "--triton-option=--metrics-config=summary_latencies=true"
    with serving(tmp_path, "lookup.onnx", "--dynamic", "batch=1,4", latencies) as server:
        with Client(server, "grpc") as client:
            (answer,) = client.infer("lookup", ids=np.int64([[0, 3], [1, 1]])).values()
        np.testing.assert_array_equal(answer, np.arange(12).reshape(4, 3)[[[0, 3], [1, 1]]])
        text = urllib.request.urlopen(server.metrics, timeout=30).read().decode()
        assert re.search(r'nv_inference_request_summary_us\{model="lookup",version="1",quantile="0.99"\}', text)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == 0


def test_what_is_refused_before_a_server_starts(tmp_path):
    (tmp_path / "mine.py").write_text(MODEL)
    (tmp_path / "bad.zenith").write_bytes(b"PK no model")
    (tmp_path / "bad.onnx").write_bytes(b"\x00" * 50)
    given = dict(ZENITH_TRITON=str(tmp_path / "tritonserver"))
    (tmp_path / "tritonserver").write_text("")
    assert "expected FILE.onnx" in refused(tmp_path, "model.bin", **given)
    assert "bad.zenith" in refused(tmp_path, "bad.zenith", **given)
    assert "bad.onnx" in refused(tmp_path, "bad.onnx", **given)
    assert "NAME=SIZES" in refused(tmp_path, "mine.py:double", "--dynamic", "batch", **given)
    assert "cannot be imported" in refused(tmp_path, "nowhere.module:f", **given)
    missing = refused(tmp_path, "mine.py:double", ZENITH_TRITON="/nowhere")
    assert "pip install --no-deps --target" in missing


def test_a_repository_without_a_server(tmp_path, monkeypatch):
    from zenith_jax import cli

    (tmp_path / "mine.py").write_text(MODEL)
    monkeypatch.setenv("ZENITH_TRITON", "/nowhere")
    target, folder = str(tmp_path / "mine.py") + ":double", str(tmp_path / "models")
    assert cli.main(["serve", target, "--write-only"]) == 2
    assert cli.main(["serve", target, "--write-only", "--repository", folder, "--name", "twice"]) == 0
    assert (tmp_path / "models" / "twice" / "config.pbtxt").is_file()


def test_no_file_of_a_model_is_unpickled(tmp_path, monkeypatch):
    """A pickle that would leave a trace, under each name that is served as data."""
    from zenith_jax import cli

    payload = b"cos\nsystem\n(S'touch " + str(tmp_path / "trace").encode() + b"'\ntR."
    monkeypatch.setenv("ZENITH_TRITON", sys.executable)
    for name in ("model.zenith", "model.onnx"):
        (tmp_path / name).write_bytes(payload)
        assert cli.main(["serve", str(tmp_path / name)]) == 2
    assert not (tmp_path / "trace").exists()


def test_a_triton_that_fails_to_start(tmp_path, monkeypatch, capfd):
    from zenith_jax import cli

    fake = tmp_path / "tritonserver"
    fake.write_text("#!/bin/sh\nexit 3\n")
    fake.chmod(0o755)
    zenith.serving.TritonModelRepository(tmp_path / "models").add(
        zenith.compile(lambda x: x * 2, jnp.ones((2, 2))), name="m", ahead_of_time=False
    )
    started = time.monotonic()
    assert cli.main(["serve", str(tmp_path / "models"), "--triton", str(fake), *PORTS]) == 1
    assert "exit code 3" in capfd.readouterr().err and time.monotonic() - started < 30
