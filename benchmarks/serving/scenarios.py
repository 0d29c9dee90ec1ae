"""LoadGen scenarios against a model in a Triton server, over asynchronous gRPC.

The load generator of MLPerf (package mlcommons-loadgen) decides when queries come; what it prints here are no MLPerf
results, which are reviewed submissions.
"""

from __future__ import annotations

import array
import json
import pathlib
import tempfile
import threading
from typing import Any

import mlperf_loadgen as lg
import numpy as np
import tritonclient.grpc as grpc

SCENARIOS = ("SingleStream", "MultiStream", "Offline", "Server")
ROWS = {"SingleStream": 1, "MultiStream": 8, "Offline": 16, "Server": 1}  # of one request
P99_QUERIES = 664
IN_FLIGHT = 8  # requests that Offline keeps under way


def run(
    address: str, model: str, samples: np.ndarray, scenario: str, *, seconds: float, qps: float, bound_ms: float
) -> dict[str, Any]:
    """p50, p90, p99 in ms, samples a second, and whether the scenario is valid. qps: to expect, or for Server to send;
    bound_ms: of Server's p99."""
    client, errors = grpc.InferenceServerClient(address), []
    free = threading.Semaphore(IN_FLIGHT if scenario == "Offline" else 10_000)

    def issue(queries: list[Any]) -> None:
        for start in range(0, len(queries), ROWS[scenario]):
            chunk = queries[start : start + ROWS[scenario]]
            free.acquire()
            tensor = grpc.InferInput("input_ids", [len(chunk), samples.shape[1]], "INT64")
            tensor.set_data_from_numpy(samples[[q.index for q in chunk]])

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

            client.async_infer(model, [tensor], done)

    settings = lg.TestSettings()
    settings.scenario = getattr(lg.TestScenario, scenario)
    settings.mode = lg.TestMode.PerformanceOnly
    settings.min_duration_ms, settings.max_duration_ms = int(seconds * 1000), 0
    # Fewer do not tell a p99 with LoadGen's confidence of 99 %.
    settings.min_query_count = P99_QUERIES if scenario in ("MultiStream", "Server") else 1
    settings.single_stream_expected_latency_ns = int(1e9 / qps)
    settings.multi_stream_expected_latency_ns = int(ROWS["MultiStream"] * 1e9 / qps)
    settings.multi_stream_samples_per_query = ROWS["MultiStream"]
    settings.offline_expected_qps = qps
    settings.server_target_qps = qps
    settings.server_target_latency_ns = int(bound_ms * 1e6)
    settings.server_target_latency_percentile = 0.99
    with tempfile.TemporaryDirectory() as folder:
        logs = lg.LogSettings()
        logs.log_output.outdir = folder
        logs.log_output.copy_summary_to_stdout = False
        sut, qsl = (
            lg.ConstructSUT(issue, lambda: None),
            lg.ConstructQSL(len(samples), len(samples), lambda _: None, lambda _: None),
        )
        try:
            lg.StartTestWithLogSettings(sut, qsl, settings, logs)
        finally:
            lg.DestroyQSL(qsl)
            lg.DestroySUT(sut)
            client.close()
        found = _results(pathlib.Path(folder) / "mlperf_log_detail.txt")
    if errors:
        raise RuntimeError(f"{len(errors)} requests failed: {errors[0]}")
    ms = {p: found[f"result_{p}.00_percentile_latency_ns"] / 1e6 for p in (50, 90, 99)}
    per_second = {
        "SingleStream": lambda: found["result_qps_without_loadgen_overhead"],
        "MultiStream": lambda: ROWS["MultiStream"] / (found["result_mean_latency_ns"] / 1e9),
        "Offline": lambda: found["result_samples_per_second"],
        "Server": lambda: found["result_completed_samples_per_sec"],
    }[scenario]()
    return dict(
        p50_ms=ms[50], p90_ms=ms[90], p99_ms=ms[99], per_second=per_second, valid=found["result_validity"] == "VALID"
    )


def _results(log: pathlib.Path) -> dict[str, Any]:
    entries = [
        json.loads(line.removeprefix(":::MLLOG ")) for line in log.read_text().splitlines() if ":::MLLOG" in line
    ]
    return {e["key"]: e["value"] for e in entries if e["key"].startswith("result_")}
