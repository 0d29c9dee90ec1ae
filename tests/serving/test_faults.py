"""What goes wrong around a server: no wrong answer, no hang, no lost accepted request, and readiness tells the truth.

ZENITH_SERVING_SOAK=1 also runs 200 clients for two minutes, and 100,000 requests while memory is watched.
"""

from __future__ import annotations

import contextlib
import functools as ft
import http.client
import json
import os
import queue
import re
import resource
import signal
import socket
import struct
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from serving_models import TOLERANCE, Client, rows, rss_mib, wrong

import zenith_jax as zenith

SOAK = os.environ.get("ZENITH_SERVING_SOAK") == "1"
PATH = "/v2/models/mlp/infer"


def answers_rightly(server, model="mlp", seed=0, whole=True):
    x = rows(3, seed)
    for protocol in ("http", "grpc"):
        with Client(server, protocol) as client:
            assert client.client.is_server_ready() is whole and client.client.is_model_ready(model)
            assert wrong(x, client.infer(model, x=x)) <= TOLERANCE


@pytest.fixture(autouse=True)
def shared_server_survives(request):
    yield
    if "served" in request.fixturenames:
        answers_rightly(request.getfixturevalue("served").server)


@contextlib.contextmanager
def own_server(triton, tmp_path, **models):
    """A server that the test may harm, with explicit loading."""
    repository = zenith.serving.TritonModelRepository(tmp_path / "models")
    for name, model in models.items():
        repository.add(model, name=name, ahead_of_time=False)
    with zenith.serving.TritonServer(
        repository.path, installation=triton, explicit=True, log=tmp_path / "log", exit_seconds=5
    ) as server:
        yield server, repository


# --- requests that are wrong ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (dict(x=np.zeros((2, 15), np.float32)), "unexpected shape for input 'x'"),
        (dict(x=np.zeros((2, 16, 1), np.float32)), "unexpected shape for input 'x'"),
        (dict(x=np.zeros((17, 16), np.float32)), "must be <= 16"),
        (dict(x=np.zeros((2, 16), np.float64)), "TYPE_FP32|data-type"),
        (dict(x=np.zeros((2, 16), np.int32)), "TYPE_FP32|data-type"),
        (dict(y=np.zeros((2, 16), np.float32)), "unexpected inference input 'y'"),
        (dict(x=np.zeros((2, 16), np.float32), y=np.zeros((2, 1), np.float32)), "expected 1 inputs"),
    ],
    ids=["size", "rank", "batch", "float64", "int32", "name", "one too many"],
)
def test_a_wrong_input_is_refused_by_name(client, inputs, message):
    with pytest.raises(Exception, match=message):
        client.infer("mlp", **inputs)


def test_a_model_or_version_that_is_not_there(client):
    with pytest.raises(Exception, match="unknown model"):
        client.infer("nothing", x=rows(1))
    with pytest.raises(Exception, match="version"):
        client.infer("mlp", version="9", x=rows(1))


def test_a_length_over_the_largest_is_refused(served):
    with Client(served.server, "grpc") as client:
        with pytest.raises(Exception, match="length 9; the model is compiled for 1 to 8"):
            client.infer("lengths", x=np.zeros((1, 9, 3), np.float32))
        (answer,) = client.infer("lengths", x=np.ones((1, 8, 3), np.float32)).values()
        assert answer[0, -1, 0] == 16


def test_a_request_whose_inputs_differ_in_length_is_refused(served):
    with Client(served.server, "grpc") as client:
        with pytest.raises(Exception, match="keep: length is 5, in an input before it is 6"):
            client.infer("masked", x=np.ones((1, 6), np.float32), keep=np.ones((1, 5), np.float32))
        (answer,) = client.infer("masked", x=np.ones((1, 6), np.float32), keep=np.ones((1, 6), np.float32)).values()
        np.testing.assert_array_equal(answer, np.ones((1, 6)))


def test_one_request_of_a_batch_is_refused_and_the_others_are_answered(served):
    """Four requests in one call of the backend, the third with a number that does not fit."""

    def calls():
        return int(re.search(r'nv_inference_exec_count\{model="int32".*\} (\d+)', served.server.metrics())[1])

    sent = [np.array([[n, 1, 2**40 if n == 2 else 2]]) for n in range(4)]
    with Client(served.server, "grpc") as client:
        for _ in range(20):
            before, done = calls(), queue.Queue()
            for n, x in enumerate(sent):
                answered = ft.partial(lambda done, n, result, error: done.put((n, (result, error))), done, n)
                client.client.async_infer("int32", [client.input("x", x)], answered)
            found = dict(done.get(timeout=30) for _ in sent)
            assert "which int32 does not hold" in str(found[2][1])
            for n in (0, 1, 3):
                output = found[n][0].get_response().outputs[0].name
                np.testing.assert_array_equal(found[n][0].as_numpy(output), sent[n] * 2 + 1)
            if calls() == before + 1:
                return
    pytest.fail("the requests never came to the backend together")


def binary_request(x, claimed=None):
    """Headers and body of a request in Triton's binary extension; claimed: bytes that its JSON says follow."""
    size = x.nbytes if claimed is None else claimed
    tensor = {"name": "x", "shape": list(x.shape), "datatype": "FP32", "parameters": {"binary_data_size": size}}
    head = json.dumps({"inputs": [tensor]}).encode()
    return {"Inference-Header-Content-Length": str(len(head))}, head + x.tobytes()


def posted(server, body, headers=None):
    """The status of an HTTP answer."""
    connection = http.client.HTTPConnection(server.http, timeout=30)
    try:
        connection.request("POST", PATH, body, headers or {})
        return connection.getresponse().status
    finally:
        connection.close()


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"\x00\xff" * 500,
        b"[" * 20_000,
        b'{"inputs": 3}',
        b'{"inputs": [{"name": "x", "shape": [1, 16], "datatype": "FP32", "data": ["a"]}]}',
        b'{"inputs": [{"name": "x", "shape": [1, 16], "datatype": "FP32", "data": [1, 2]}]}',
        b'{"inputs": [{"name": "x", "shape": [-1, 16], "datatype": "FP32", "data": []}]}',
        b'{"inputs": [{"name": "x", "shape": [1, 99999], "datatype": "FP32", "data": [1]}]}',
    ],
    ids="empty brace bytes nested no-list strings short negative large-shape".split(),
)
def test_malformed_json(served, body):
    assert 400 <= posted(served.server, body) < 600  # Triton answers some with 400, some with 500


def test_binary_bodies_that_lie(served):
    x = rows(2)
    headers, body = binary_request(x)
    assert posted(served.server, body, headers) == 200
    assert 400 <= posted(served.server, body[:-7], headers) < 500
    for claimed in (0, 7, x.nbytes * 2, 2**40):
        lying, content = binary_request(x, claimed)
        assert 400 <= posted(served.server, content, lying) < 600
    for length in ("-1", "9999999", "nonsense", str(2**70)):
        assert 400 <= posted(served.server, body, {"Inference-Header-Content-Length": length}) < 600


def test_an_oversized_body(served):
    """64 MiB where 2 KiB are expected, and more than gRPC's message limit of the client allows."""
    headers, body = binary_request(np.zeros((1 << 20, 16), np.float32))
    assert 400 <= posted(served.server, body, headers) < 500
    with Client(served.server, "grpc") as client, pytest.raises(Exception, match="must be <= 16"):
        client.infer("mlp", x=np.zeros((1 << 18, 16), np.float32))


def test_bytes_that_are_no_http(served):
    for payload in (b"\x16\x03\x01" + os.urandom(200), b"GET / HTTP/9.9\r\n\r\n", b"A" * 100_000):
        for port in (served.server.http_port, served.server.grpc_port):
            with socket.create_connection(("127.0.0.1", port), 10) as s:
                s.sendall(payload)
                s.settimeout(0.3)
                with contextlib.suppress(OSError):
                    s.recv(1000)


def test_clients_that_hang_up(served):
    """Before the body is sent whole, and before the answer comes, with a reset."""
    headers, body = binary_request(rows(4))
    lines = [f"POST {PATH} HTTP/1.1", "Host: x", f"Content-Length: {len(body)}"]
    request = "\r\n".join([*lines, *(f"{k}: {v}" for k, v in headers.items()), "", ""]).encode() + body
    for sent in (len(request) // 3, len(request) - 1, len(request)):
        for _ in range(20):
            with socket.create_connection(("127.0.0.1", served.server.http_port), 10) as s:
                s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                s.sendall(request[:sent])


# --- load -------------------------------------------------------------------------------------------------------------


def load(server, clients, seconds, stop=None):
    """(answers, problems) of clients that ask all the time, each in a thread, half of them over HTTP."""
    stop, problems, answered = stop or threading.Event(), [], []

    def ask(seed):
        x, mine = rows(1 + seed % 4, seed), 0
        with Client(server, "http" if seed % 2 else "grpc") as client:
            while not stop.is_set():
                try:
                    error = wrong(x, client.infer("mlp", x=x))
                    if error > TOLERANCE:
                        problems.append(f"wrong by {error}")
                    mine += 1
                except Exception as error:
                    problems.append(f"{type(error).__name__}: {error}")
                    if len(problems) > 1000:
                        break
        answered.append(mine)

    threads = [threading.Thread(target=ask, args=(s,)) for s in range(clients)]
    for t in threads:
        t.start()
    stop.wait(seconds)
    stop.set()
    for t in threads:
        t.join(60)
        assert not t.is_alive(), "a client hangs"
    return answered, problems


@pytest.mark.timeout(400)
def test_many_clients(served):
    clients, seconds = (200, 120) if SOAK else (20, 5)
    answered, problems = load(served.server, clients, seconds)
    print(f"{clients} clients, {seconds} s: {sum(answered)} answers, the slowest client had {min(answered)}")
    assert problems == [] and len(answered) == clients and min(answered) > 0


@pytest.mark.timeout(1200)
def test_memory_is_flat(served):
    requests = 100_000 if SOAK else 1_500
    (stub,) = stubs_of(served.server, "mlp")
    with Client(served.server, "grpc") as client:

        def ask(n):
            for i in range(n):
                x = rows(1 + i % 16, i % 7)
                assert set(client.infer("mlp", x=x)) == {"probabilities", "largest"}

        ask(requests // 10)  # until allocators have what they keep
        before = rss_mib(stub), rss_mib(served.server.process.pid)
        ask(requests)
        after = rss_mib(stub), rss_mib(served.server.process.pid)
    print(f"{requests} requests: RSS of the backend {before[0]:.1f} -> {after[0]:.1f} MiB, of the server "
          f"{before[1]:.1f} -> {after[1]:.1f} MiB")  # fmt: skip
    assert after[0] - before[0] < 8 and after[1] - before[1] < 16


def stubs_of(server, model):
    """Backends of one model, which their arguments name."""
    found = []
    for pid in server.backends():
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            if f"/{model}/".encode() in file.read():
                found.append(pid)
    return found


# --- the server's side ------------------------------------------------------------------------------------------------


def until(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.05)


def test_a_killed_backend(triton, tmp_path, compiled):
    """Its requests fail at once, and other models go on. `zenith serve` ends then: test_serve_command.py."""
    with own_server(triton, tmp_path, mlp=compiled, other=compiled) as (server, _):
        x = rows(2)
        (stub,) = stubs_of(server, "mlp")
        os.kill(stub, signal.SIGKILL)
        for protocol in ("grpc", "http"):
            with Client(server, protocol) as client:
                started = time.monotonic()
                with pytest.raises(Exception, match="not healthy"):
                    client.infer("mlp", x=x)
                assert time.monotonic() - started < 20
                assert wrong(x, client.infer("other", x=x)) <= TOLERANCE
        assert len(stubs_of(server, "other")) == 1 and stubs_of(server, "mlp") == []


def test_a_corrupt_version_does_not_take_over(triton, tmp_path, compiled):
    with own_server(triton, tmp_path, mlp=compiled) as (server, repository), Client(server, "http") as client:
        folder = repository.add(compiled, name="mlp", ahead_of_time=False)
        content = bytearray((folder / "model.zenith").read_bytes())
        content[len(content) // 2] ^= 1
        for damaged in (bytes(content), content[: len(content) // 2], b""):
            (folder / "model.zenith").write_bytes(damaged)
            with pytest.raises(Exception, match=r"load failed.*model\.zenith"):
                client.client.load_model("mlp")
            states = {m["version"]: m for m in server.index() if m["name"] == "mlp"}
            assert states["2"]["state"] == "UNAVAILABLE" and "Error" in states["2"]["reason"]
            answers_rightly(server, whole=False)  # by version 1; the server as a whole is not ready


def test_a_model_file_that_is_written_over_in_use(triton, tmp_path, compiled):
    """In place, as cp does: the parameters in use are those that were checked."""
    with own_server(triton, tmp_path, mlp=compiled) as (server, repository):
        file = repository.path / "mlp" / "1" / "model.zenith"
        size = file.stat().st_size
        file.write_bytes(os.urandom(size))
        answers_rightly(server)
        os.truncate(file, 10)
        answers_rightly(server, seed=1)


def test_out_of_memory(triton, tmp_path, compiled):
    """A request that needs more than there is gets an error; the next one that fits is answered."""

    def large(x):
        return x[:, None, :] * jnp.ones((1024, 1))

    example = jax.ShapeDtypeStruct(jax.export.symbolic_shape("batch, length"), jnp.float32)
    model = zenith.compile(large, example, dynamic={"batch": (1,), "length": (16, 1 << 15)})
    with own_server(triton, tmp_path, large=model, mlp=compiled) as (server, _), Client(server, "grpc") as client:
        (stub,) = stubs_of(server, "large")
        with open(f"/proc/{stub}/statm") as file:
            virtual = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.prlimit(stub, resource.RLIMIT_AS, (virtual + (64 << 20), resource.RLIM_INFINITY))
        with pytest.raises(Exception, match=r"(?i)memory|alloc|RESOURCE_EXHAUSTED|shm|shared"):
            client.infer("large", x=np.ones((1, 1 << 15), np.float32))
        (answer,) = client.infer("large", x=np.ones((1, 16), np.float32)).values()
        np.testing.assert_array_equal(answer, np.ones((1, 1024, 16)))
        answers_rightly(server)


# For the model.py of a version, behind its imports: writes down what happens in the model's process, a line each.
SPY = """
        import time
        import jax
        from zenith_jax.compiled import CompiledModel

        log = open(folder / "happened", "a", buffering=1)
        say = lambda what: print(time.monotonic(), what, file=log)
        warm_up, execute = CompiledModel.warm_up, Backend.execute

        def slow_warm_up(model):
            time.sleep({warm_up})
            warm_up(model)
            say("warm")

        def slow_execute(backend, requests):
            say("execute " + " ".join(r.request_id() for r in requests))
            time.sleep({execute})
            return execute(backend, requests)

        CompiledModel.warm_up, Backend.execute = slow_warm_up, slow_execute
        jax.monitoring.register_event_duration_secs_listener(
            lambda event, *_, **__: say("compile") if event.endswith("backend_compile_duration") else None
        )
"""
IMPORT = "        from zenith_jax.serving.backend import Backend\n"


def spied(version, warm_up=0.0, execute=0.0):
    """Makes both take so much longer. Returns a function that tells what happened: [(time.monotonic(), what)]."""
    code = (version / "model.py").read_text()
    assert IMPORT in code
    spy = SPY.replace("{warm_up}", str(warm_up)).replace("{execute}", str(execute))
    (version / "model.py").write_text(code.replace(IMPORT, IMPORT + spy))

    def happened():
        lines = (version / "happened").read_text().splitlines() if (version / "happened").exists() else []
        return [(float(when), what) for when, what in (line.split(" ", 1) for line in lines)]

    return happened


def test_sigterm_under_load(triton, tmp_path, compiled):
    """24 clients, half of them over HTTP, have a request each with the server, most of them in its queue for a second
    more. Then the signal: each gets its answer. What comes after it is answered or refused; nobody hangs."""
    repository = zenith.serving.TritonModelRepository(tmp_path / "models")
    happened = spied(repository.add(compiled, name="mlp", ahead_of_time=False, dynamic_batching=False), execute=0.05)
    server = zenith.serving.TritonServer(repository.path, installation=triton, log=tmp_path / "log", exit_seconds=20)
    count, signalled = 24, threading.Event()
    answers, late = {}, {}

    def ask(number):
        x = rows(1 + number % 4, number)
        with Client(server, "http" if number % 2 else "grpc") as client:
            for into, identity in ((answers, f"early{number}"), (late, f"late{number}")):
                try:
                    into[identity] = wrong(x, client.infer("mlp", request_id=identity, x=x)), time.monotonic()
                except Exception as error:
                    into[identity] = error, time.monotonic()
                signalled.wait(60)

    def executed():
        return sum(len(what.split()) - 1 for _, what in happened() if what.startswith("execute"))

    def accepted():
        pending = re.search(r'nv_inference_pending_request_count\{model="mlp".*\} (\d+)', server.metrics())
        return executed() + int(pending[1])

    with server:
        threads = [threading.Thread(target=ask, args=(n,)) for n in range(count)]
        for t in threads:
            t.start()
        until(lambda: accepted() >= count)
        waiting, when = count - executed(), time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)  # those that are answered by then ask again
        signalled.set()
        for t in threads:
            t.join(60)
            assert not t.is_alive(), "a client hangs"
        assert server.wait(60) == 0
    after = [answer for answer, at in answers.values() if at > when]
    print(f"{count} accepted, {waiting} of them waiting at the signal, {len(after)} answered after it; "
          f"{sum(isinstance(a, Exception) for a, _ in late.values())} of {len(late)} later ones refused")  # fmt: skip
    assert waiting > count // 3, "nothing was left to lose"
    assert not {i: a for i, (a, _) in answers.items() if isinstance(a, Exception) or a > TOLERANCE}
    assert len(answers) == len(late) == count and len(after) >= waiting
    assert all(isinstance(a, Exception) or a <= TOLERANCE for a, _ in late.values())
    lost = {i for _, what in happened() for i in what.split()[1:]} - {
        i for i, (a, _) in {**answers, **late}.items() if not isinstance(a, Exception)
    }
    assert not lost, "computed, and not answered"


def polled(server, model, seconds=60):
    """Asks for readiness of the server and of the model over HTTP and gRPC, again and again, until all have said yes.
    Returns when each said so first, and when those that were answered at all were asked."""
    first, asked = {}, []
    end = time.monotonic() + seconds
    with Client(server, "http") as over_http, Client(server, "grpc") as over_grpc:
        while len(first) < 4:
            assert time.monotonic() < end, f"only {sorted(first)} said yes"
            for protocol, api in (("http", over_http.client), ("grpc", over_grpc.client)):
                for kind, ask in (("server", api.is_server_ready), ("model", ft.partial(api.is_model_ready, model))):
                    begun = time.monotonic()
                    try:
                        yes = ask()
                    except Exception:  # nobody listens yet
                        continue
                    asked.append(begun)
                    if yes:
                        first.setdefault((kind, protocol), time.monotonic())
            time.sleep(0.005)
    return first, asked


def test_it_is_not_ready_before_it_is_warm(triton, tmp_path, compiled):
    """Asked from the first moment on, while the warm-up takes a second longer: no yes comes before every program has
    run, and no request then waits for a compiler. So at the server's start, and when a running one loads a model."""
    repository = zenith.serving.TritonModelRepository(tmp_path / "models")
    happened = spied(repository.add(compiled, name="first", ahead_of_time=False), warm_up=1)
    server = zenith.serving.TritonServer(
        repository.path, installation=triton, explicit=True, log=tmp_path / "log", exit_seconds=5
    )
    server.start()
    try:
        said_yes, _ = polled(server, "first")
        (warm,) = [when for when, what in happened() if what == "warm"]
        assert min(said_yes.values()) > warm

        happened = spied(repository.add(compiled, name="second", ahead_of_time=False), warm_up=1)

        def load():
            with Client(server, "http") as client:
                client.client.load_model("second")

        loading = threading.Thread(target=load)
        loading.start()
        said_yes, asked = polled(server, "second")
        loading.join(60)
        with Client(server, "http") as client:
            (warm,) = [when for when, what in happened() if what == "warm"]
            assert min(when for (kind, _), when in said_yes.items() if kind == "model") > warm
            assert min(asked) < warm - 0.5, "it was not asked while it loaded"
            compiled_before = [what for _, what in happened()].count("compile")
            for n in (1, 4, 16, 3):
                assert wrong(rows(n), client.infer("second", x=rows(n))) <= TOLERANCE
            assert [what for _, what in happened()].count("compile") == compiled_before >= 3
    finally:
        assert server.stop() == 0
