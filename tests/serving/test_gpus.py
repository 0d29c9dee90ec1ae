"""Instances on GPUs behind a real server: where they run, what they answer, and how fast."""

from __future__ import annotations

import concurrent.futures
import os
import pathlib
import shutil
import statistics
import subprocess
import time

import jax
import numpy as np
import pytest
from serving_models import Client

import zenith_jax as zenith

pytestmark = pytest.mark.gpu

INSTANCES = 2
WIDTH, CLASSES = 256, 8


def mlp(w, x):
    hidden = jax.nn.gelu(x @ w["up"]) @ w["down"]
    return {"probabilities": jax.nn.softmax(hidden, axis=-1)}


def weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    shapes = {"up": (WIDTH, 4 * WIDTH), "down": (4 * WIDTH, CLASSES)}
    return {n: (rng.normal(size=s) / s[0] ** 0.5).astype(np.float32) for n, s in shapes.items()}


def devices(pid: int) -> set[str]:
    """The GPUs that a process has open."""
    opened = set()
    for entry in pathlib.Path(f"/proc/{pid}/fd").iterdir():
        try:
            opened.add(os.readlink(entry))
        except OSError:
            continue  # closed meanwhile
    return {name for name in opened if name.startswith("/dev/nvidia") and name.removeprefix("/dev/nvidia").isdigit()}


def test_instances_share_a_gpu_and_answer_as_jax_on_it(triton, tmp_path):
    w = weights()
    model = zenith.compile((mlp, w), np.ones((2, WIDTH), np.float32), dynamic={"batch": (1, 8)})
    expected = jax.jit(mlp)
    repository = zenith.serving.TritonModelRepository(tmp_path / "models")
    for gpu in range(len(jax.devices())):
        repository.add(model, name=f"mlp{gpu}", instances=INSTANCES, gpus=(gpu,), memory_fraction=0.05)
    every = range(len(jax.devices()))
    repository.add(model, name="every", gpus=tuple(every), memory_fraction=0.05, ahead_of_time=False)
    options = dict(installation=triton, log=tmp_path / "log", exit_seconds=5)
    with zenith.serving.TritonServer(repository.path, **options) as server:
        stubs = server.backends()
        assert len(stubs) == (INSTANCES + 1) * len(every)
        found = [devices(pid) for pid in stubs]
        assert all(found), "an instance has no GPU open"
        names = [*(f"mlp{gpu}" for gpu in every), "every"]

        def ask(seed: int) -> float:
            x = np.random.default_rng(seed).normal(size=(1 + seed % 5, WIDTH)).astype(np.float32)
            with Client(server, ("http", "grpc")[seed % 2]) as client:
                answer = client.infer(names[seed % len(names)], x=x)["probabilities"]
            # Probabilities; float32 products of a GPU are TensorFloat-32 ones, 2^-11 of sums of about 1.
            return float(np.abs(answer - np.asarray(expected(w, x)["probabilities"])).max())

        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            errors = list(pool.map(ask, range(64)))
        assert max(errors) < 2e-3
        x = np.ones((1, WIDTH), np.float32)
        times = []
        with Client(server, "grpc") as client:
            assert all(client.client.is_model_ready(name) for name in names)
            for _ in range(300):
                start = time.perf_counter()
                client.infer("mlp0", x=x)
                times.append(time.perf_counter() - start)
        cuts = statistics.quantiles(times, n=100)
        print(f"{len(stubs)} instances on {sorted(map(sorted, found))}, largest error {max(errors):.1e}")
        print(f"one request: p50 {cuts[49] * 1e3:.2f} ms, p99 {cuts[98] * 1e3:.2f} ms")
        assert 'zenith_model_load_seconds{model="mlp0",version="1"}' in server.metrics()
    assert server.wait() == 0


def used_mib() -> list[int]:
    """Memory in use on each GPU."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return [int(line) for line in subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()]


@pytest.mark.parametrize(
    ("visible", "gpu", "taken"), [(None, 1, 1), ("1", 0, 1), ("1,0", 1, 0)], ids=["all", "second", "reversed"]
)
def test_an_instance_takes_the_gpu_that_triton_means(triton, tmp_path, visible, gpu, taken):
    """Triton counts the GPUs that CUDA_VISIBLE_DEVICES leaves it."""
    if len(jax.devices()) < 2 or "CUDA_VISIBLE_DEVICES" in os.environ or shutil.which("nvidia-smi") is None:
        pytest.skip("needs two GPUs, all of them visible, and nvidia-smi")
    model = zenith.compile((mlp, weights()), np.ones((2, WIDTH), np.float32))
    repository = zenith.serving.TritonModelRepository(tmp_path / "models")
    repository.add(model, name="mlp", gpus=(gpu,), memory_fraction=0.2, ahead_of_time=False)
    environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "true"}
    if visible is not None:
        environment["CUDA_VISIBLE_DEVICES"] = visible
    before = used_mib()
    options = dict(installation=triton, log=tmp_path / "log", exit_seconds=5, environment=environment)
    with zenith.serving.TritonServer(repository.path, **options) as server:
        grown = [now - then for now, then in zip(used_mib(), before, strict=True)]
        with Client(server, "grpc") as client:
            assert client.infer("mlp", x=np.ones((2, WIDTH), np.float32))["probabilities"].shape == (2, CLASSES)
    print(f"CUDA_VISIBLE_DEVICES={visible}, gpus=({gpu},): memory grew by {grown} MiB")
    assert grown.index(max(grown)) == taken and max(grown) > 10_000
