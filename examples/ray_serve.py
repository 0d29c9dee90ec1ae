"""A saved model as a deployment of Ray Serve, which joins requests and spreads replicas over machines.

An example only: Zenith serves through Triton (docs/serving.md). Take Ray where models are parts of a Python program.

pip install 'ray[serve]'
"""

import concurrent.futures
import json
import pathlib
import socket
import tempfile
import urllib.request

import jax
import jax.numpy as jnp
import numpy as np
import ray
from ray import serve

import zenith_jax as zenith


@serve.deployment(ray_actor_options={"num_cpus": 1})
class Model:
    """A process of its own, which loads the file once and is ready when every compiled size has run."""

    def __init__(self, path: str):
        self.model = zenith.load(path)
        self.model.warm_up()

    @serve.batch(max_batch_size=16, batch_wait_timeout_s=0.005)
    async def answers(self, rows: list[np.ndarray]) -> list[np.ndarray]:
        return list(np.asarray(self.model(np.stack(rows))))

    async def __call__(self, request) -> list[float]:
        row = np.asarray(await request.json(), np.float32)
        return (await self.answers(row)).tolist()


def mlp(x):
    rng = np.random.default_rng(0)
    w, v = (jnp.asarray(rng.normal(size=s) / 8, jnp.float32) for s in ((64, 256), (256, 8)))
    return jax.nn.softmax(jax.nn.gelu(x @ w) @ v)


def ask(url: str, row: np.ndarray) -> np.ndarray:
    request = urllib.request.Request(url, json.dumps(row.tolist()).encode())
    with urllib.request.urlopen(request, timeout=60) as answer:
        return np.array(json.loads(answer.read()), np.float32)


def main() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    rows = np.random.default_rng(1).normal(size=(32, 64)).astype(np.float32)
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)  # before JAX has threads: it forks
    try:
        with tempfile.TemporaryDirectory() as folder:
            compiled = zenith.compile(mlp, jnp.ones((1, 64)), dynamic={"batch": (1, 4, 16)})
            path = compiled.save(pathlib.Path(folder) / "mlp.zenith")
            serve.start(http_options={"host": "127.0.0.1", "port": port})
            serve.run(Model.bind(str(path)))  # pyright: ignore[reportAttributeAccessIssue]
            with concurrent.futures.ThreadPoolExecutor(8) as pool:
                answers = np.stack(list(pool.map(lambda row: ask(f"http://127.0.0.1:{port}/", row), rows)))
    finally:
        serve.shutdown()
        ray.shutdown()
    print(f"{len(answers)} answers, largest difference {np.abs(answers - np.asarray(mlp(rows))).max():.1e}")


if __name__ == "__main__":
    main()
