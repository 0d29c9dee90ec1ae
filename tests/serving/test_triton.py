"""What a real server answers: values, dtypes, batching, versions, metrics, over HTTP and gRPC."""

from __future__ import annotations

import concurrent.futures
import threading
import time

import ml_dtypes
import numpy as np
import pytest
from serving_models import TOLERANCE, Client, metrics_with, rows, wrong

import zenith_jax as zenith
from zenith_jax.errors import ServingError
from zenith_jax.serving.backend import METRICS, PUBLISH_SECONDS


@pytest.mark.parametrize("n", [1, 2, 4, 5, 16])
def test_answers_are_those_of_the_model(client, n):
    x = rows(n, seed=n)
    assert wrong(x, client.infer("mlp", x=x)) <= TOLERANCE


def test_a_padded_length_is_cut(client):
    x = np.random.default_rng(0).normal(size=(3, 5, 3)).astype(np.float32)
    (answer,) = client.infer("lengths", x=x).values()
    np.testing.assert_allclose(answer, np.cumsum(x, axis=1) * 2, rtol=1e-6, atol=1e-6)


def test_a_model_without_a_batch_dimension(client):
    x, y = np.arange(6, dtype=np.float32).reshape(2, 3), np.arange(6, dtype=np.float32).reshape(3, 2)
    (answer,) = client.infer("whole", x=x, y=y).values()
    np.testing.assert_array_equal(answer, x @ y)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int32"])
def test_dtypes(client, dtype):
    sent = {"bfloat16": ml_dtypes.bfloat16, "int32": np.int64}.get(dtype, dtype)
    x = np.array([[0, 1, 2], [-3, 100, 5]]).astype(sent)
    (answer,) = client.infer(dtype, x=x).values()
    np.testing.assert_array_equal(answer.astype(np.float64), x.astype(np.float64) * 2 + 1)


def test_integers_that_do_not_fit_are_refused(client):
    with pytest.raises(Exception, match="which int32 does not hold"):
        client.infer("int32", x=np.array([[1, 2, 2**40]]))


def test_what_it_says_of_the_model(client):
    metadata = client.client.get_model_metadata("mlp")
    metadata = metadata if isinstance(metadata, dict) else {"inputs": metadata.inputs, "outputs": metadata.outputs}
    shape = lambda t: (t["name"], list(map(int, t["shape"]))) if isinstance(t, dict) else (t.name, list(t.shape))  # noqa: E731
    assert [shape(t) for t in metadata["inputs"]] == [("x", [-1, 16])]
    assert sorted(shape(t) for t in metadata["outputs"]) == [("largest", [-1, 1]), ("probabilities", [-1, 8])]
    assert client.client.is_server_ready() and client.client.is_model_ready("mlp")


def test_one_output_of_several(client):
    wanted = [client.module.InferRequestedOutput("largest")]
    result = client.client.infer("mlp", [client.input("x", rows(2))], outputs=wanted)
    assert result.as_numpy("probabilities") is None
    assert result.as_numpy("largest").shape == (2, 1)


def test_requests_are_joined_and_everybody_gets_their_own_rows(served):
    def count(metric):
        return sum(
            float(line.rsplit(" ", 1)[1])
            for line in served.server.metrics().splitlines()
            if line.startswith(metric) and 'model="mlp"' in line
        )

    time.sleep(3 * PUBLISH_SECONDS)  # what was counted before
    before, rows_before = count("zenith_executions_total"), count("zenith_rows_total")
    barrier = threading.Barrier(12)

    def ask(seed):
        x = rows(1 + seed % 3, seed)
        with Client(served.server, "grpc") as client:
            barrier.wait()
            return [wrong(x, client.infer("mlp", x=x)) for _ in range(10)]

    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        errors = [e for found in pool.map(ask, range(12)) for e in found]
    assert len(errors) == 120 and max(errors) <= TOLERANCE
    end = time.monotonic() + 10
    while count("zenith_rows_total") - rows_before < 240 and time.monotonic() < end:
        time.sleep(PUBLISH_SECONDS)
    time.sleep(3 * PUBLISH_SECONDS)
    assert count("zenith_rows_total") - rows_before == 240  # 4 clients of 1, 2 and 3 rows, 10 times each
    assert 0 < count("zenith_executions_total") - before < 120


def test_metrics_hold_what_the_documentation_lists(client, served):
    client.infer("mlp", x=rows(3))
    text = metrics_with(served.server, r'zenith_padding_rows_total\{model="mlp",version="1"\} [1-9]')
    families = {line.split()[2]: line.split()[3] for line in text.splitlines() if line.startswith("# TYPE zenith")}
    assert families == {name: kind for name, (kind, _) in METRICS.items()}
    assert metrics_with(served.server, r'zenith_executions_total\{bucket="batch=4",model="mlp",version="1"\}')


def test_a_new_version_takes_over_without_losing_a_request(served, compiled):
    """Requests go on while version 2 is published and loaded; each is answered rightly, at the end by the new one."""
    with Client(served.server, "http") as control:
        served.repository.add(compiled, name="reloaded", ahead_of_time=False)
        control.client.load_model("reloaded")
        stop, problems, answered = threading.Event(), [], [0]

        def ask(seed):
            x = rows(2, seed)
            with Client(served.server, "grpc") as client:
                while not stop.is_set():
                    try:
                        if wrong(x, client.infer("reloaded", x=x)) > TOLERANCE:
                            problems.append("a wrong answer")
                    except Exception as error:
                        problems.append(repr(error))
                    answered[0] += 1

        threads = [threading.Thread(target=ask, args=(s,)) for s in range(3)]
        for t in threads:
            t.start()
        try:
            folder = served.repository.add(compiled, name="reloaded", ahead_of_time=False)
            assert folder.name == "2"
            control.client.load_model("reloaded")
        finally:
            stop.set()
            for t in threads:
                t.join()
        assert not problems and answered[0] > 20
        states = {(m["version"], m["state"]) for m in served.server.index() if m["name"] == "reloaded"}
        assert ("2", "READY") in states and ("1", "READY") not in states
        control.client.unload_model("reloaded")


def test_an_input_from_shared_memory(served):
    shm = pytest.importorskip("tritonclient.utils.shared_memory")
    x = rows(4)
    with Client(served.server, "grpc") as client:
        region = shm.create_shared_memory_region("zenith_test", "/zenith_test_input", x.nbytes)
        try:
            shm.set_shared_memory_region(region, [x])
            client.client.register_system_shared_memory("zenith_test", "/zenith_test_input", x.nbytes)
            tensor = client.module.InferInput("x", list(x.shape), "FP32")
            tensor.set_shared_memory("zenith_test", x.nbytes)
            result = client.client.infer("mlp", [tensor])
            assert wrong(x, {n: result.as_numpy(n) for n in ("probabilities", "largest")}) <= TOLERANCE
        finally:
            client.client.unregister_system_shared_memory("zenith_test")
            shm.destroy_shared_memory_region(region)


def test_a_server_without_a_gpu_refuses_the_group_for_its_gpu_alone(triton, compiled, tmp_path):
    """Triton reads the instance group, and misses the device."""
    repository = zenith.serving.TritonModelRepository(tmp_path / "models")
    repository.add(compiled, name="m", instances=2, gpus=(97, 99), ahead_of_time=False)
    server = zenith.serving.TritonServer(repository.path, installation=triton, log=tmp_path / "log", exit_seconds=5)
    with pytest.raises(ServingError, match="m_0 of model m specifies invalid or unsupported gpu id 97"), server:
        pass


def test_it_listens_on_this_machine_only(served):
    """HTTP, gRPC and metrics: what Linux says of their sockets."""
    ports = {served.server.http_port, served.server.grpc_port, served.server.metrics_port}
    listening = set()
    for table in ("tcp", "tcp6"):
        with open(f"/proc/{served.server.process.pid}/net/{table}") as file:
            for _, local, _, state, *_ in map(str.split, file.readlines()[1:]):
                address, port = local.split(":")
                if state == "0A" and int(port, 16) in ports:  # TCP_LISTEN
                    listening.add((address.removeprefix("0000000000000000FFFF0000"), int(port, 16)))
    # 127.0.0.1 as Linux writes it, also where it is mapped into IPv6.
    assert listening == {("0100007F", port) for port in ports}
    assert served.server.http.startswith("127.0.0.1:")
