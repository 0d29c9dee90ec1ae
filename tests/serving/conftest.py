"""A real Triton server with small models, for all tests of this folder; they skip, with the reason, without one."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from serving_models import Client, compiled_mlp, missing

import zenith_jax as zenith


def lengths(x):
    """Sums along each sequence: zeros behind it change nothing."""
    return jnp.cumsum(x, axis=1) * 2


def masked(x, keep):
    """Two inputs of the same batch and length."""
    return x * keep


def whole(x, y):
    return x @ y


def twice(x):
    return x * 2 + 1


@dataclasses.dataclass(frozen=True)
class Served:
    server: Any
    repository: Any


@pytest.fixture(scope="session")
def compiled():
    return compiled_mlp()


@pytest.fixture(scope="session")
def triton():
    reason = missing()
    if reason is not None:
        pytest.skip(reason)
    return zenith.serving.find_triton()


@pytest.fixture(scope="session")
def served(triton, compiled, tmp_path_factory):
    """One server with all models; tests that harm a server start their own."""
    root = tmp_path_factory.mktemp("served")
    repository = zenith.serving.TritonModelRepository(root / "models")
    repository.add(compiled, name="mlp", dynamic_batching={"max_queue_delay_us": 2000})
    example = jax.ShapeDtypeStruct((*jax.export.symbolic_shape("batch, length"), 3), jnp.float32)
    quick = dict(ahead_of_time=False)
    repository.add(
        zenith.compile(lengths, example, dynamic={"batch": (2, 4), "length": (4, 8)}), name="lengths", **quick
    )
    row = jax.ShapeDtypeStruct(jax.export.symbolic_shape("batch, length"), jnp.float32)
    repository.add(
        zenith.compile(masked, row, row, dynamic={"batch": (2, 4), "length": (4, 8)}), name="masked", **quick
    )
    repository.add(zenith.compile(whole, jnp.ones((2, 3)), jnp.ones((3, 2))), name="whole", **quick)
    for dtype in ("bfloat16", "float16", "int32"):
        model = zenith.compile(twice, jnp.ones((2, 3), dtype), dynamic={"batch": (1, 4)})
        wide = {model.inputs[0].name: "int64"} if dtype == "int32" else {}
        repository.add(model, name=dtype, dtypes=wide, dynamic_batching={"max_queue_delay_us": 5000}, **quick)
    with zenith.serving.TritonServer(
        repository.path, installation=triton, explicit=True, log=root / "log", exit_seconds=5
    ) as server:
        yield Served(server, repository)


@pytest.fixture(params=["http", "grpc"])
def client(request, served):
    with Client(served.server, request.param) as made:
        yield made
