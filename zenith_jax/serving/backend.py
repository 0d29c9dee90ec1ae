"""A saved model in a process of Triton's Python backend: what the repository's model.py calls.

Tensors cross by DLPack. `as_numpy()` and `Tensor(name, ndarray)` of Triton before 25.02 are built against NumPy 1 and
give wrong values under NumPy 2 without an error.
"""

from __future__ import annotations

import collections
import ctypes
import gc
import json
import logging
import os
import pathlib
import shutil
import threading
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from zenith_jax import native
from zenith_jax.borrowed import BorrowedArrays
from zenith_jax.compiled import CompiledModel, load
from zenith_jax.errors import SavedModelError, ZenithError
from zenith_jax.ir import _compat
from zenith_jax.serving.ahead import CACHE
from zenith_jax.serving.batching import Batcher, Call, split
from zenith_jax.serving.repository import MODEL, SETTINGS

logger = logging.getLogger("zenith_jax")

# name -> (kind, description); labels are model and version, and bucket where it says so. docs/telemetry.md
METRICS = {
    "zenith_model_fused_sites": ("gauge", "Sites of the model that Zenith's kernels compute"),
    "zenith_model_load_seconds": ("gauge", "Time from reading the saved model to ready, warm-up included"),
    "zenith_executions_total": ("counter", "Calls of the compiled model, by the sizes of the program, label bucket"),
    "zenith_rows_total": ("counter", "Rows of requests that were computed"),
    "zenith_padding_rows_total": ("counter", "Rows of zeros that filled compiled sizes"),
    "zenith_refused_requests_total": ("counter", "Requests that were answered with an error"),
}
PUBLISH_SECONDS = 0.1  # Prometheus asks every few seconds


class Model:
    """A saved model, compiled and warm: every program has run before this returns. cache: of compiled programs."""

    def __init__(self, folder: pathlib.Path, cache: pathlib.Path):
        started = time.perf_counter()
        # The calling thread computes: handing each call to a thread of JAX's and back cost 0.1 ms, and there is
        # nothing to do meanwhile.
        jax.config.update("jax_cpu_enable_async_dispatch", False)
        settings = json.loads((folder / SETTINGS).read_text())
        _use_cache(cache)
        self.compiled = _loaded(folder / MODEL)
        self.compiled.warm_up()
        device = native.default_device()
        self.on_cpu = native.platform_of(device) == "cpu"
        self.borrowed = BorrowedArrays.of(np.ndarray, device) if self.on_cpu else None
        self.batch: str | None = settings["batch"]
        seconds = {tuple(sizes): took for sizes, took in settings.get("seconds", ())}
        self.batcher = Batcher(self.compiled.inputs, self.compiled.dynamic, self.batch, seconds)
        # JAX's hundred thousand objects stay: looking through them for garbage took a tenth of a call's time.
        gc.collect()
        gc.freeze()
        self.load_seconds = time.perf_counter() - started

    def __call__(self, call: Call) -> list[list[Any]]:
        """The outputs of each request of the call: NumPy arrays, or JAX arrays on the CPU."""
        program = self.compiled.programs[tuple(call.bucket[n] for n in self.compiled.dynamic)]
        # A failed computation raises here; reading its results would end the process (jaxlib 0.10.2).
        is_whole = self.on_cpu and call.is_whole
        arrays = [self._in_place(x) for x in call.arrays] if is_whole else call.arrays
        results = [x.block_until_ready() for x in program(arrays)]
        if is_whole:
            return [results]
        return split(self.compiled.outputs, [np.asarray(x) for x in results], call, self.batch)

    def _in_place(self, x: np.ndarray) -> Any:
        """An array in the memory of a request's input, which Triton uses again and again. It does not own it: the
        request is there until it has been answered."""
        borrowed = self.borrowed
        if borrowed is None:
            return x
        array = borrowed.find(x)
        if array is None:
            array = borrowed.array(x, x.shape, x.dtype)
            borrowed.keep(x, array)
        return x if array is None else array


def _loaded(path: pathlib.Path) -> CompiledModel:
    """The model, from a copy in memory that nobody else has: `load` maps the parameters, and a file that is written
    over while they are in use would change them."""
    with os.fdopen(os.memfd_create("model.zenith"), "r+b") as copy, open(path, "rb") as file:
        shutil.copyfileobj(file, copy, 1 << 24)
        copy.flush()
        name = f"/proc/self/fd/{copy.fileno()}"
        try:
            return load(name)
        except SavedModelError as error:
            raise SavedModelError(str(error).replace(name, str(path))) from None


def _use_cache(folder: pathlib.Path) -> None:
    """JAX's compilation cache: holds the programs that ahead.py compiled, and takes no others."""
    if not folder.is_dir():
        return
    # XLA's own caches are off: their folder would be in each program's key, and no other folder would find it.
    jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


class Backend:
    """execute(requests) -> responses, as Triton calls it: one response for each request, in their order."""

    def __init__(self, folder: pathlib.Path, args: dict[str, Any], utils: Any):
        self.utils = utils
        self.model = Model(folder, folder / CACHE)
        labels = {"model": args["model_name"], "version": args["model_version"]}
        self.metrics = _Metrics(utils, labels)
        self.metrics.set("zenith_model_fused_sites", len(self.model.compiled.report.fused))
        self.metrics.set("zenith_model_load_seconds", self.model.load_seconds)

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        responses: list[Any] = [None] * len(requests)
        inputs: list[Any] = [None] * len(requests)
        for index, request in enumerate(requests):
            try:
                inputs[index] = self._inputs(request)
            except ZenithError as error:
                responses[index] = self._refused(str(error))
            except Exception as error:
                logger.exception("a request could not be read")
                responses[index] = self._refused(f"{type(error).__name__}: {error}")
        for call in self.model.batcher.calls(inputs):
            try:
                answers = [self._response(requests[i], a) for i, a in zip(call.requests, self.model(call), strict=True)]
            except Exception as error:  # out of memory, for one: the next call may succeed
                logger.exception("a call of %d requests failed", len(call.requests))
                answers = [self._refused(f"{type(error).__name__}: {error}") for _ in call.requests]
            else:
                self.metrics.count(call, self.model.batch)
            for index, answer in zip(call.requests, answers, strict=True):
                responses[index] = answer
        return responses

    def close(self) -> None:
        self.metrics.close()

    def _inputs(self, request: Any) -> list[np.ndarray]:
        found = []
        for index, spec in enumerate(self.model.compiled.inputs):
            tensor = self.utils.get_input_tensor_by_name(request, spec.name)
            if tensor is None:
                raise ZenithError(f"the request has no input {spec.name}")
            found.append(self.model.batcher.converted(index, _array(tensor, spec.dtype)))
        self.model.batcher.agree(found)
        return found

    def _response(self, request: Any, arrays: Sequence[Any]) -> Any:
        outputs = list(zip(self.model.compiled.outputs, arrays, strict=True))
        if len(outputs) > 1:  # a single one is what is asked for
            wanted = set(request.requested_output_names())
            outputs = [(spec, x) for spec, x in outputs if spec.name in wanted]
        tensors = [_tensor(self.utils, spec.name, x) for spec, x in outputs]
        return self.utils.InferenceResponse(output_tensors=tensors)

    def _refused(self, message: str) -> Any:
        self.metrics.refused()
        return self.utils.InferenceResponse(output_tensors=[], error=self.utils.TritonError(message))


class _Metrics:
    """Counts here, and tells Triton from a thread of its own: each of its calls is a message to the server and back,
    93 us, for which no request has to wait."""

    def __init__(self, utils: Any, labels: dict[str, str]):
        kinds = {"gauge": utils.MetricFamily.GAUGE, "counter": utils.MetricFamily.COUNTER}
        self._families = {
            name: utils.MetricFamily(name=name, description=text, kind=kinds[kind])
            for name, (kind, text) in METRICS.items()
        }
        self._labels = labels
        self._metrics: dict[tuple[str, Any], Any] = {}
        for name in METRICS:
            if name != "zenith_executions_total":
                self._metric(name, None)
        self._events: collections.deque[tuple[str, Any, int]] = collections.deque()  # metric, bucket, by how much
        self._counted, self._closed = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._publish, name="zenith-metrics", daemon=True)
        self._thread.start()

    def set(self, name: str, value: float) -> None:
        self._metric(name, None).set(value)

    def count(self, call: Call, batch: str | None) -> None:
        rows = sum(call.rows)
        self._count("zenith_executions_total", 1, tuple(call.bucket.items()))
        self._count("zenith_rows_total", rows)
        if batch is not None and call.bucket[batch] > rows:
            self._count("zenith_padding_rows_total", call.bucket[batch] - rows)

    def refused(self) -> None:
        self._count("zenith_refused_requests_total", 1)

    def close(self) -> None:
        """Tells Triton what is left."""
        self._closed.set()
        self._counted.set()
        self._thread.join()

    def _count(self, name: str, n: int, bucket: Any = None) -> None:
        self._events.append((name, bucket, n))
        if not self._counted.is_set():
            self._counted.set()

    def _publish(self) -> None:
        while not self._closed.is_set():
            self._counted.wait()
            self._closed.wait(PUBLISH_SECONDS)  # what comes meanwhile goes along
            self._counted.clear()
            counts = collections.Counter()
            while self._events:
                name, bucket, n = self._events.popleft()
                counts[name, bucket] += n
            try:
                for (name, bucket), n in counts.items():
                    self._metric(name, bucket).increment(n)
            except Exception:  # a server that ends, for one; requests go on
                logger.exception("metrics could not be published")

    def _metric(self, name: str, bucket: Any) -> Any:
        if (name, bucket) not in self._metrics:
            labels = self._labels
            if bucket is not None:
                labels = {**labels, "bucket": ",".join(f"{k}={size}" for k, size in bucket) or "only"}
            self._metrics[name, bucket] = self._families[name].Metric(labels=labels)
        return self._metrics[name, bucket]


# --- DLPack -----------------------------------------------------------------------------------------------------------

_set_name = ctypes.pythonapi.PyCapsule_SetName
_set_name.argtypes, _set_name.restype = [ctypes.py_object, ctypes.c_char_p], ctypes.c_int
_CONSUMED = b"used_dltensor"  # kept alive here: a capsule points to its name
_BFLOAT16 = np.dtype(jax.numpy.bfloat16)  # the name of a dtype is put together anew, 2.5 us, and 35 with cold caches


class _Exporter:
    """A tensor of Triton's whose `__dlpack__` takes what NumPy asks with. Its own raises TypeError, with a message that
    shows its arguments, and NumPy asks again."""

    def __init__(self, tensor: Any):
        self.tensor = tensor

    def __dlpack__(self, **_: Any) -> Any:
        return self.tensor.to_dlpack()

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.tensor.__dlpack_device__()


def _array(tensor: Any, dtype: str) -> np.ndarray:
    if dtype == "bfloat16":  # NumPy's DLPack does not know it
        return np.asarray(jax.dlpack.from_dlpack(tensor))
    return np.from_dlpack(_Exporter(tensor))


def _tensor(utils: Any, name: str, x: Any) -> Any:
    """x: a NumPy array, or a JAX array on the CPU, which is computed."""
    if isinstance(x, jax.Array):  # in its own memory; JAX's capsules do not look at their name when they are freed
        return utils.Tensor.from_dlpack(name, _compat.dlpack_of_array(x, None))
    capsule = (jax.numpy.asarray(x) if x.dtype == _BFLOAT16 else x).__dlpack__()
    tensor = utils.Tensor.from_dlpack(name, capsule)
    _set_name(capsule, _CONSUMED)  # Triton calls it "used_dlpack", which NumPy complains about when it frees it
    return tensor
