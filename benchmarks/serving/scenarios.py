"""LoadGen scenarios against a model in a Triton server, over asynchronous gRPC.

The load generator of MLPerf (package mlcommons-loadgen) decides when queries come, and measures each from when it was
to be sent. What it gives here are no MLPerf results, which are reviewed submissions.
"""

from __future__ import annotations

import array
import dataclasses
import pathlib
import re
import tempfile
import threading
from collections.abc import Sequence
from typing import Any

import mlperf_loadgen as lg
import numpy as np
import tritonclient.grpc as grpc

SCENARIOS = ("SingleStream", "MultiStream", "Offline", "Server")
ROWS = {"SingleStream": 1, "MultiStream": 8, "Offline": 16, "Server": 1}  # of one request
IN_FLIGHT = 8  # requests that Offline keeps under way
WARM_REQUESTS = 5  # before a turn: the other model had the caches


@dataclasses.dataclass(frozen=True)
class Turn:
    """What LoadGen saw. latencies_ms: of each query, until its last sample was answered. seconds: from the first
    query to the last answer."""

    latencies_ms: np.ndarray
    samples: int
    seconds: float


def run(address: str, model: str, samples: np.ndarray, scenario: str, *, seconds: float, qps: float, seed: int) -> Turn:
    """qps: samples a second to expect, or for Server to send. seed: of what is sent when. Raises RuntimeError where a
    request failed."""
    client, errors = grpc.InferenceServerClient(address), []
    free = threading.Semaphore(IN_FLIGHT if scenario == "Offline" else 10_000)

    def tensor(indices: Sequence[int]) -> Any:
        made = grpc.InferInput("input_ids", [len(indices), samples.shape[1]], "INT64")
        made.set_data_from_numpy(samples[list(indices)])
        return made

    def issue(queries: list[Any]) -> None:
        for start in range(0, len(queries), ROWS[scenario]):
            chunk = queries[start : start + ROWS[scenario]]
            free.acquire()

            def done(result: Any, error: Any, chunk: list[Any] = chunk) -> None:
                free.release()
                if error is not None:
                    errors.append(error)
                rows = np.zeros((len(chunk), 1), np.float32) if error else result.as_numpy("vectors")
                buffers = [array.array("B", row.tobytes()) for row in rows]
                responses = [
                    lg.QuerySampleResponse(q.id, b.buffer_info()[0], b.buffer_info()[1])
                    for q, b in zip(chunk, buffers, strict=True)
                ]
                lg.QuerySamplesComplete(responses)

            client.async_infer(model, [tensor([q.index for q in chunk])], done)

    settings = lg.TestSettings()
    settings.scenario = getattr(lg.TestScenario, scenario)
    settings.mode = lg.TestMode.PerformanceOnly
    settings.min_duration_ms, settings.max_duration_ms = int(seconds * 1000), 0
    settings.min_query_count = 1
    settings.single_stream_expected_latency_ns = int(1e9 / qps)
    settings.multi_stream_expected_latency_ns = int(ROWS["MultiStream"] * 1e9 / qps)
    settings.multi_stream_samples_per_query = ROWS["MultiStream"]
    settings.offline_expected_qps = qps
    settings.server_target_qps = qps
    settings.qsl_rng_seed = settings.sample_index_rng_seed = settings.schedule_rng_seed = seed
    with tempfile.TemporaryDirectory() as folder:
        logs = lg.LogSettings()
        logs.log_output.outdir = folder
        logs.log_output.copy_summary_to_stdout = False
        logs.enable_trace = True
        sut = lg.ConstructSUT(issue, lambda: None)
        qsl = lg.ConstructQSL(len(samples), len(samples), lambda _: None, lambda _: None)
        try:
            for _ in range(WARM_REQUESTS):
                client.infer(model, [tensor(range(ROWS[scenario]))])
            lg.StartTestWithLogSettings(sut, qsl, settings, logs)
        finally:
            lg.DestroyQSL(qsl)
            lg.DestroySUT(sut)
            client.close()
        found = _traced(pathlib.Path(folder) / "mlperf_log_trace.json")
    if errors:
        raise RuntimeError(f"{len(errors)} requests failed: {errors[0]}")
    return found


_SAMPLE = re.compile(r'"name":"Sample".*"ph":"b".*"ts":([\d.]+),.*"query_seq":(\d+),.*"complete_ns":(\d+)')


def _traced(file: pathlib.Path) -> Turn:
    """From LoadGen's trace: an event for each sample, from when its query was to be sent (ts, in us)."""
    events = [(float(m[1]) / 1e3, int(m[2]), int(m[3]) / 1e6) for m in _SAMPLE.finditer(file.read_text())]
    latencies: dict[int, float] = {}
    for _, query, latency in events:
        latencies[query] = max(latency, latencies.get(query, 0.0))
    end = max(scheduled + latency for scheduled, _, latency in events)
    return Turn(np.array(list(latencies.values())), len(events), (end - min(e[0] for e in events)) / 1e3)
