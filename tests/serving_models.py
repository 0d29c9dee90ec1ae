"""Small models behind a real Triton server, its client, and what its processes hold."""

from __future__ import annotations

import os
import pathlib
import re
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

import zenith_jax as zenith
from zenith_jax.errors import ServingError
from zenith_jax.serving.server import has_libpython
from zenith_jax.serving.wire import TRITON_DTYPES

# What an answer may be off: the MLP's program for another size rounds its sums, of about 10, differently; 3e-6 was
# seen in 300 batches without a server. Rows of another request are off by far more.
TOLERANCE = 1e-5
W = np.random.default_rng(7).normal(size=(16, 8)).astype(np.float32)


def missing() -> str | None:
    """Why no server can be tested here, or None."""
    try:
        found = zenith.serving.find_triton()
    except ServingError as error:
        return str(error)
    if found.bundle is not None and not has_libpython():
        return f"{sys.executable} has no shared libpython"
    try:
        import tritonclient.grpc
        import tritonclient.http  # noqa: F401
    except ImportError as error:
        return f"tritonclient[http,grpc] is not installed: {error}"
    return None


def mlp(w, x):
    hidden = jax.nn.gelu(x @ w)
    return {"probabilities": jax.nn.softmax(hidden, axis=-1), "largest": hidden.max(-1)}


def compiled_mlp():
    return zenith.compile((mlp, W), jnp.ones((2, 16)), dynamic={"batch": (1, 4, 16)})


def rows(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, 16)).astype(np.float32)


_mlp = jax.jit(mlp)


def wrong(x: np.ndarray, answer: dict[str, np.ndarray]) -> float:
    """How far an answer of the MLP is from what it should be; infinite where its shape is another."""
    padded = np.zeros((16, 16), np.float32)
    padded[: len(x)] = x
    expected = {n: np.asarray(v)[: len(x)] for n, v in _mlp(W, padded).items()}
    expected["largest"] = expected["largest"][:, None]  # a number for each row: Triton has no empty dims
    if {n: v.shape for n, v in answer.items()} != {n: v.shape for n, v in expected.items()}:
        return float("inf")
    return max(float(np.abs(answer[n] - expected[n]).max()) for n in expected)


class Client:
    """tritonclient over one of its protocols: infer("mlp", x=array) -> {output: array}."""

    def __init__(self, server, protocol: str):
        import tritonclient.grpc
        import tritonclient.http

        self.module = {"http": tritonclient.http, "grpc": tritonclient.grpc}[protocol]
        self.client = self.module.InferenceServerClient(server.http if protocol == "http" else server.grpc)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.client.close()

    def input(self, name, array):
        tensor = self.module.InferInput(name, list(array.shape), TRITON_DTYPES[array.dtype.name])
        tensor.set_data_from_numpy(array)
        return tensor

    def infer(self, model, *, version="", request_id="", **inputs):
        tensors = [self.input(n, a) for n, a in inputs.items()]
        result = self.client.infer(model, tensors, model_version=version, request_id=request_id)
        response = result.get_response()
        outputs = response["outputs"] if isinstance(response, dict) else response.outputs
        names = [o["name"] if isinstance(o, dict) else o.name for o in outputs]
        return {n: result.as_numpy(n) for n in names}


def metrics_with(server, pattern: str) -> str:
    """The server's metrics as soon as they match: a model's counts are published a moment after its answers."""
    end = time.monotonic() + 10
    while not re.search(pattern, text := server.metrics()):
        assert time.monotonic() < end, f"nothing matches {pattern} in\n{text}"
        time.sleep(0.05)
    return text


def rss_mib(pid: int) -> float:
    pages = int(pathlib.Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20
