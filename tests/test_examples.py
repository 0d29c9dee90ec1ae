"""The examples and the GPU benchmark run, at their tiny sizes, each in a process of its own."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]


def run(*command: str) -> str:
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "COLUMNS": "200"}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=250, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_training_gpt2_lowers_the_loss_as_plain_jax_does():
    def losses(*options: str) -> list[float]:
        shown = run("examples/train_gpt2_nnx.py", "--tiny", "--steps", "10", "--batch", "2", *options)
        return [float(line.split("loss ")[1].split(",")[0]) for line in shown.splitlines() if "loss " in line]

    fused, plain = losses(), losses("--plain")
    assert fused[-1] < fused[0] - 0.5
    assert fused == pytest.approx(plain, abs=5e-3)


def test_explain_model():
    shown = run("examples/explain_model.py")
    assert "4 sites fused, 0 left to XLA" in shown
    assert "do not return the attention weights" in shown.replace("\n", " ") or "elsewhere" in shown
    assert "255" in shown


def test_ops_directly():
    assert "a wrong call says what is wrong: attention" in run("examples/ops_directly.py")


def test_own_kernel_in_pallas():
    shown = run("examples/own_kernel_pallas.py")
    assert "fused  gated_norm  float32[2,6,32], float32[2,6,32], float32[32] eps=1e-05" in shown
    assert "because the kernel is written for float32, not bfloat16" in shown
    assert float(shown.split("largest difference ")[1].split()[0]) < 1e-4


def test_torch_compile_backend():
    pytest.importorskip("torch")
    pytest.importorskip("onnxscript")
    shown = run("examples/torch_compile_backend.py")
    assert "exported 1 time, compiled for 2 combinations of sizes" in shown
    differences = [float(line.split("difference ")[1]) for line in shown.splitlines() if "difference " in line]
    assert len(differences) == 3 and max(differences) < 1e-4


def test_keras_model():
    pytest.importorskip("tensorflow")
    pytest.importorskip("tf2onnx")
    shown = run("examples/keras_model.py")
    assert "(64, 10)" in shown
    differences = [float(line.split("difference ")[1]) for line in shown.splitlines() if "difference " in line]
    assert len(differences) == 2 and max(differences) < 1e-4


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray[serve] is not installed")
def test_ray_serve():
    shown = run("examples/ray_serve.py")
    assert "32 answers" in shown
    assert float(shown.split("difference ")[1]) < 1e-6


def test_gpt2_training_step_benchmark(tmp_path):
    path = tmp_path / "figures.json"
    run("benchmarks/h100/gpt2_train_step.py", "--tiny", "--runs", "1", "--batch", "2", "--json", str(path))
    figures = json.loads(path.read_text())
    found = {"attention": 2, "layer_norm": 1, "add_layer_norm": 4, "gelu_erf": 2, "cross_entropy": 1}
    assert figures["fused"] == found
    assert set(figures["median_ms"]) == {"jax.jit", "zenith.jit"}
    assert figures["machine"]["date"]


def test_benchmark_of_loading_onnx_models(tmp_path):
    pytest.importorskip("onnxruntime")
    path = tmp_path / "figures.json"
    shown = run("benchmarks/onnx_load.py", "--tiny", "--external", "--json", str(path))
    assert "zenith.onnx" in shown and "ONNX Runtime" in shown
    figures = json.loads(path.read_text())
    assert figures["weights_bytes"] > 50_000
    assert all(figures[by]["load_s"] > 0 for by in ("zenith.onnx", "ONNX Runtime"))


def test_every_door_gives_the_same_answers(tmp_path):
    path = tmp_path / "figures.json"
    # Doors that torch has a part in take a minute; tests/pytorch, tf_keras_models and serving test these.
    torch = ("ONNX file", "torch eager", "torch module", "zenith.torch", "torch.compile, zenith")
    others = ("tf.function", "Keras", "served", "client")
    skipped = [f"--skip={door}" for door in (*torch, *others)]
    shown = run("benchmarks/doors.py", "--tiny", "--model", "encoder", *skipped, "--json", str(path))
    tables = json.loads(path.read_text())["tables"]
    assert [t["model"] for t in tables] == ["encoder"]
    for table in tables:
        doors = {door["name"] for door in table["doors"]}
        assert doors >= {"jax.jit", "JAX function", "flax nnx", "flax linen", "loaded file"}
        assert all(door["error"] < 1e-5 for door in table["doors"]), shown
        assert all(reason for reason in table["missing"].values())
