"""The consistency table: one model through every door of Zenith, with the same weights, answers compared, times beside
those of jax.jit, torch and torch.compile.

  python benchmarks/doors.py                      # BERT-base's layers, the MNIST CNN and ResNet-50
  python benchmarks/doors.py --tiny               # small ones in seconds: what CI runs
  python benchmarks/doors.py --model mnist --batch 64 --mode reduce-overhead

Every call gets its input on the device, in its framework's own type, from a few arrays in turn, as requests are not
one and the same; doors take turns. Times are of a call that is waited for, after a few that are not counted, and on a
GPU also of one of many calls that are waited for together. The served door is timed by Triton's own statistics of what
computing takes, "client" is the same call as its client sees it, with input and answer on their way. A door whose
framework or extra is not installed is listed with the reason. Exit code 1 where answers differ.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import itertools
import json
import os
import pathlib
import random
import statistics
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import door_models
import door_resnet
import jax
import jax.numpy as jnp
import numpy as np

import zenith_jax as zenith
from zenith_jax.bench.machine import machine
from zenith_jax.errors import MissingExtraError, ServingError

# Of the largest output; float32 products of 768 terms through 12 layers, in another order of summation in each library.
TOLERANCE = 2e-3
INPUTS = 4  # arrays that calls take in turn
UNCOUNTED = 3  # calls of each turn: what came right after another door's takes 1.5 to 3 times as long on a GPU
BATCHES = {
    "cpu": {"mnist": (64, 1024), "encoder": (1,), "resnet50": (1, 8)},
    "gpu": {"mnist": (64, 1024), "encoder": (1, 8), "resnet50": (1, 8)},
}
MODELS = tuple(BATCHES["cpu"])


def made(name: str, tiny: bool) -> door_models.Model:
    if name == "mnist":
        return door_models.mnist_cnn()
    if name == "resnet50":
        return door_resnet.resnet(**(dict(stages=(1, 1), width=8, size=32) if tiny else {}))
    return door_models.encoder(**(dict(layers=2, width=64, heads=4, length=32) if tiny else {}))


@dataclasses.dataclass
class Door:
    """start(): calls. wait(result): until it and what was started before are computed. clock(): seconds. baseline: not
    compared with the fastest, for it is not Zenith, or more than a call."""

    name: str
    start: Callable[[], Any]
    wait: Callable[[Any], Any] = lambda result: result
    baseline: bool = False
    clock: Callable[[], float] = time.perf_counter
    median_ms: float = 0.0
    queued_ms: float | None = None
    error: float = 0.0
    made_s: float = 0.0

    def call(self) -> Any:
        return self.wait(self.start())


class Missing(Exception):
    """Why a door cannot be tried here."""


def doors(
    model: door_models.Model, x: np.ndarray, mode: str, folder: pathlib.Path, stack: contextlib.ExitStack
) -> Iterator[tuple[str, Any]]:
    """(name, () -> Door), made one after the other. stack: ends what they start."""
    params = jax.tree.map(jnp.asarray, model.params)
    inputs = [jnp.array(x) for _ in range(INPUTS)]
    on_device = inputs[0]

    def of(name: str, function: Callable[[Any], Any], *, baseline: bool = False) -> Door:
        turns = itertools.cycle(inputs)
        return Door(name, lambda: function(next(turns)), jax.block_until_ready, baseline)

    def compiled(name: str, obj: Any) -> Door:
        return of(name, zenith.compile(obj, on_device, mode=mode))

    def jax_jit() -> Door:
        jitted = jax.jit(model.function)
        return of("jax.jit", lambda x: jitted(params, x), baseline=True)

    def saved() -> Door:
        path = zenith.compile((model.function, params), on_device, mode=mode).save(folder / "model.zenith")
        return of("loaded file", zenith.load(path))

    yield "jax.jit", jax_jit
    yield "JAX function", lambda: compiled("JAX function", (model.function, params))
    yield "flax nnx", lambda: compiled("flax nnx", model.nnx())
    yield (
        "flax linen",
        lambda: compiled("flax linen", (model.linen(), params if model.is_variables else {"params": params})),
    )
    yield "loaded file", saved
    yield "ONNX file", lambda: of("ONNX file", _onnx(model, x, mode, folder))
    yield "torch eager", lambda: _torch("torch eager", model, x, lambda module, _: module, baseline=True)
    yield "torch.compile", lambda: _torch("torch.compile", model, x, _inductor, baseline=True)
    if jax.default_backend() == "gpu":
        yield "torch.compile, graphs", lambda: _torch("torch.compile, graphs", model, x, _graphs, baseline=True)
    yield "torch module", lambda: _torch("torch module", model, x, _compiled(mode))
    yield "zenith.torch", lambda: _torch("zenith.torch", model, x, _zenith_torch)
    yield "torch.compile, zenith", lambda: _torch("torch.compile, zenith", model, x, _zenith_backend)
    fastest = "tf.function" if _keras_backend() == "tensorflow" else "Keras, jax.jit"
    yield fastest, lambda: _keras(fastest, model, x, _as_keras_does, baseline=True)
    yield (
        "Keras",
        lambda: _keras("Keras", model, x, lambda keras_model, tensor: zenith.compile(keras_model, tensor, mode=mode)),
    )
    served = _Served(folder / "served", (model.function, params), x, mode, stack)
    yield "served", lambda: Door("served", served.call, clock=served.seconds)
    yield "client", lambda: Door("client", served.call, baseline=True)


def _torch_or_missing() -> Any:
    try:
        import torch
    except ImportError as error:
        raise Missing("torch is not installed") from error
    torch.set_float32_matmul_precision("high")  # TensorFloat-32 on a GPU, as JAX by default
    return torch


def _onnx(model: door_models.Model, x: np.ndarray, mode: str, folder: pathlib.Path) -> Callable[[Any], Any]:
    torch = _torch_or_missing()
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise Missing("onnxscript, with which torch writes ONNX, is not installed") from error
    path = folder / "model.onnx"
    torch.onnx.export(model.torch(), (torch.from_numpy(x),), path, dynamo=True, verbose=False)
    compiled = zenith.compile(path, x, mode=mode)
    return lambda x: compiled(x)[0]


def _torch(
    name: str, model: door_models.Model, x: np.ndarray, wrapped: Callable[[Any, Any], Any], *, baseline: bool = False
) -> Door:
    torch = _torch_or_missing()
    device = "cuda" if torch.cuda.is_available() and jax.default_backend() == "gpu" else "cpu"
    tensors = [torch.from_numpy(x).to(device, copy=True) for _ in range(INPUTS)]
    module = wrapped(model.torch().to(device), tensors[0])
    turns = itertools.cycle(tensors)

    def start() -> Any:
        with torch.inference_mode():
            return module(next(turns))

    def wait(result: Any) -> Any:
        if device == "cuda":
            torch.cuda.synchronize()
        return result

    return Door(name, start, wait, baseline)


def _inductor(module: Any, _: Any) -> Any:
    return _torch_or_missing().compile(module)


def _graphs(module: Any, _: Any) -> Any:
    return _torch_or_missing().compile(module, mode="reduce-overhead")


def _compiled(mode: str) -> Callable[[Any, Any], Any]:
    return lambda module, example: zenith.compile(module, example, mode=mode)


def _zenith_torch(module: Any, _: Any) -> Any:
    return zenith.torch.compile(module)


def _zenith_backend(module: Any, _: Any) -> Any:
    from zenith_jax.frontends.torch import dynamo  # as the name "zenith" gives it where the package is installed

    return _torch_or_missing().compile(module, backend=dynamo.zenith)


def _keras(
    name: str, model: door_models.Model, x: np.ndarray, wrapped: Callable[[Any, Any], Any], *, baseline: bool = False
) -> Door:
    backend, wait = _keras_backend(), jax.block_until_ready
    if backend is None:
        raise Missing("keras is not installed")
    tensors = [jnp.array(x) for _ in range(INPUTS)]
    if backend == "tensorflow":
        import tensorflow as tf

        tensors, wait = [tf.constant(x) + 0 for _ in range(INPUTS)], _waited
    compiled = wrapped(model.keras(), tensors[0])
    turns = itertools.cycle(tensors)
    return Door(name, lambda: compiled(next(turns)), wait, baseline)


def _keras_backend() -> str | None:
    """What Keras computes in: TensorFlow where it is installed, else JAX, if KERAS_BACKEND does not say."""
    if importlib.util.find_spec("keras") is None:
        return None
    os.environ.setdefault("KERAS_BACKEND", "jax" if importlib.util.find_spec("tensorflow") is None else "tensorflow")
    import keras

    return keras.backend.backend()


def _waited(tensor: Any) -> Any:
    """TensorFlow computes on the CPU before it returns; a GPU is waited for by reading one number, in 0.1 ms."""
    if jax.default_backend() == "gpu":
        tensor[(0,) * tensor.ndim].numpy()
    return tensor


def _as_keras_does(keras_model: Any, _: Any) -> Any:
    """What `predict` calls."""
    if _keras_backend() == "tensorflow":
        import tensorflow as tf

        return tf.function(lambda x: keras_model(x, training=False))
    state = [[v.value for v in of] for of in (keras_model.trainable_variables, keras_model.non_trainable_variables)]
    jitted = jax.jit(lambda state, x: keras_model.stateless_call(*state, x, training=False)[0])
    return lambda x: jitted(state, x)


class _Served:
    """A Triton server with the model, started at the first call."""

    def __init__(self, folder: pathlib.Path, obj: Any, x: np.ndarray, mode: str, stack: contextlib.ExitStack):
        self.folder, self.obj, self.x, self.mode, self.stack = folder, obj, x, mode, stack
        self.server: Any = None

    def start(self) -> None:
        try:
            import tritonclient.grpc as triton

            zenith.serving.find_triton()
        except (ImportError, RuntimeError, ServingError) as error:  # RuntimeError: a tritonclient without its grpc part
            raise Missing(f"no Triton to serve with: {error}") from error
        compiled = zenith.compile(self.obj, self.x, mode=self.mode)
        repository = zenith.serving.TritonModelRepository(self.folder)
        gpu = dict(gpus=(0,), memory_fraction=0.2) if jax.default_backend() == "gpu" else {}
        repository.add(compiled, name="model", ahead_of_time=False, **gpu)
        self.server = self.stack.enter_context(zenith.serving.TritonServer(repository.path, log=f"{self.folder}.log"))
        self.client = triton.InferenceServerClient(self.server.grpc)
        self.input = triton.InferInput(compiled.inputs[0].name, self.x.shape, "FP32")
        self.input.set_data_from_numpy(self.x)
        self.output = compiled.outputs[0].name

    def call(self) -> np.ndarray:
        if self.server is None:
            self.start()
        return self.client.infer("model", [self.input]).as_numpy(self.output)

    def seconds(self) -> float:
        """What Triton counts as computing, of all calls until now."""
        with urllib.request.urlopen(f"http://{self.server.http}/v2/models/model/stats") as answer:
            return json.load(answer)["model_stats"][0]["inference_stats"]["compute_infer"]["ns"] * 1e-9


def _in_float64(result: Any) -> np.ndarray:
    return np.asarray(result.cpu() if hasattr(result, "cpu") else result, np.float64)


def measured(
    model: door_models.Model, batch: int, mode: str, skip: set[str], seconds: float
) -> tuple[list[Door], dict[str, str]]:
    """Every door with its median and its error against jax.jit, and reasons of those that could not be tried."""
    x = np.float32(np.random.default_rng(1).normal(size=(batch, *model.input_shape)))
    found, missing = [], {}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        # One after the other: XLA times its choices on a GPU while it compiles, and others beside it disturb that.
        for name, make in doors(model, x, mode, pathlib.Path(folder), stack):
            if name in skip:
                continue
            begin = time.perf_counter()
            try:
                door = make()
                door.call()
                door.made_s = time.perf_counter() - begin
                found.append(door)
            except (Missing, MissingExtraError) as reason:
                missing[name] = str(reason)
        reference = _in_float64(found[0].call())
        for door in found:
            result = _in_float64(door.call())
            door.error = float(np.abs(result - reference).max() / np.abs(reference).max())
            door.call()
        times: dict[str, list[float]] = {door.name: [] for door in found}
        queued: dict[str, list[float]] = {door.name: [] for door in found if door.clock is time.perf_counter}
        is_gpu = jax.default_backend() == "gpu"
        order = random.Random(0)  # so that no door always comes after the same other one
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or len(times[found[0].name]) < 3:
            for door in order.sample(found, len(found)):
                # What came right after torch took 6.3 ms instead of 0.7 once; its threads may spin on after a call.
                time.sleep(0.02)
                for _ in range(UNCOUNTED):
                    door.call()
                counted = 10 if is_gpu else 3
                for _ in range(counted):
                    start = door.clock()
                    door.call()
                    times[door.name].append(door.clock() - start)
                if is_gpu and door.name in queued:
                    queued[door.name].append(_queued(door, 3 * counted))
    for door in found:
        door.median_ms = statistics.median(times[door.name]) * 1e3
        if queued.get(door.name):
            door.queued_ms = statistics.median(queued[door.name]) * 1e3
    return found, missing


def _queued(door: Door, calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        result = door.start()
    door.wait(result)
    return (time.perf_counter() - start) / calls


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, action="append", help="repeat for several; default: all")
    parser.add_argument("--batch", type=int, action="append")
    parser.add_argument("--mode", default="default", choices=("default", "reduce-overhead", "max-autotune"))
    parser.add_argument("--skip", action="append", default=[], metavar="DOOR", help="torch.compile takes minutes")
    parser.add_argument("--seconds", type=float, default=10.0, help="of measuring each table")
    parser.add_argument("--budget", type=float, default=float("inf"), metavar="SECONDS", help="begin no table after it")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write the figures too")
    options = parser.parse_args()
    print(f"zenith {zenith.__version__}, mode {options.mode}: {machine().text()}")
    started, batches = time.perf_counter(), BATCHES["gpu" if jax.default_backend() == "gpu" else "cpu"]
    figures, wrong = [], False
    for name in options.model or MODELS:
        model = made(name, options.tiny)
        for batch in options.batch or ((2,) if options.tiny else batches[name]):
            if time.perf_counter() - started > options.budget:
                print(f"\n{name}, batch {batch}: left out, the budget is spent")
                continue
            skip = {*options.skip, *(("torch.compile",) if options.tiny else ())}
            found, missing = measured(model, batch, options.mode, skip, 0.2 if options.tiny else options.seconds)
            own = [d.median_ms for d in found if not d.baseline]
            print(
                f"\n{name}, batch {batch}: slowest door {max(own) / min(own):.2f} x the fastest "
                f"(made in {sum(d.made_s for d in found):.0f} s)",
                flush=True,
            )
            for door in found:
                bad = not door.error < TOLERANCE
                wrong |= bad
                note = "  WRONG" if bad else ""
                kind = "  " if door.baseline else "* "
                queue = "" if door.queued_ms is None else f" {door.queued_ms:9.3f} ms queued"
                print(
                    f"{kind}{door.name:24} {door.median_ms:9.3f} ms{queue}   error {door.error:.1e}{note}", flush=True
                )
            for door, reason in missing.items():
                print(f"- {door:24} {reason}")
            rows = [{k: v for k, v in vars(d).items() if k not in ("start", "wait", "clock")} for d in found]
            figures.append(dict(model=name, batch=batch, doors=rows, missing=missing))
            if options.json:  # each time: the machine may be lent for less than all of them
                text = json.dumps(dict(machine=dataclasses.asdict(machine()), tables=figures), indent=1)
                options.json.write_text(text)
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
