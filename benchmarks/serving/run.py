"""The same encoder behind the same Triton server, by Zenith and by ONNX Runtime.

    python benchmarks/serving/run.py [--part accuracy|start|closed|loadgen] [--seconds 20] [--json FILE]

Parts: accuracy against ONNX Runtime in this process; start, from the server's start to ready, with and without
programs compiled ahead of time; closed, perf_analyzer with 1 and 16 requests in flight; loadgen, the four scenarios.
The two models take turns: three minutes for loadgen.

Needs torch, transformers, onnxscript, onnx, onnxruntime, tritonclient[grpc] and mlcommons-loadgen, a Triton server as
for the tests, and for `closed` the perf_analyzer of the wheel tritonclient==2.51.0, named by PERF_ANALYZER.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import pathlib
import statistics
import subprocess
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import models
import numpy as np
from rich.console import Console
from rich.table import Table

from zenith_jax.bench.machine import machine
from zenith_jax.serving import TritonServer, find_triton

SAMPLES = 64
TURN_SECONDS = 2.0  # of one model in one scenario
RESAMPLED = 1000
TITLES = {"loadgen": "LoadGen scenarios", "compared": "Zenith against ONNX Runtime: above 1 it is ahead"}
WINDOW = 400  # requests of one of perf_analyzer's windows: two seconds or so
EXPECTED = 500.0  # samples a second, of which Offline sends as many as its turn takes


def accuracy(server: TritonServer, onnx_file: pathlib.Path) -> list[dict[str, Any]]:
    """1 - |answer - reference| / |reference| of each sample, in every batch size: the worst and the mean."""
    import onnxruntime
    import tritonclient.grpc as grpc

    ids = models.sentences(SAMPLES)
    session = onnxruntime.InferenceSession(str(onnx_file), providers=["CPUExecutionProvider"])
    reference = np.concatenate([session.run(None, {"input_ids": ids[i : i + 1]})[0] for i in range(len(ids))])
    found = []
    with grpc.InferenceServerClient(server.grpc) as client:
        for name in models.NAMES:
            scores = []
            for rows in (1, 3, 16):
                for start in range(0, len(ids), rows):
                    part = ids[start : start + rows]
                    tensor = grpc.InferInput("input_ids", list(part.shape), "INT64")
                    tensor.set_data_from_numpy(part)
                    got = client.infer(name, [tensor]).as_numpy("vectors")
                    want = reference[start : start + rows]
                    scores += list(1 - np.linalg.norm(got - want, axis=1) / np.linalg.norm(want, axis=1))
            found.append(
                dict(part="accuracy", model=name, worst=float(min(scores)), mean=float(statistics.mean(scores)))
            )
            assert min(scores) >= 0.999, f"{name} is at {min(scores):.6f} of the reference"
    return found


def start(root: pathlib.Path, onnx_file: pathlib.Path) -> list[dict[str, Any]]:
    """Seconds from the start of a server with one model to ready, shortest of three."""
    found = []
    for label, ahead in (("zenith, programs ahead of time", True), ("zenith, compiled at start", False)):
        repository = models.write(root / f"start-{ahead}", onnx_file, ahead_of_time=ahead)
        for name in models.NAMES if ahead else ("zenith",):
            alone = root / f"alone-{ahead}-{name}"
            alone.mkdir()
            (alone / name).symlink_to(repository.path / name)
            times = []
            for _ in range(3):
                begun = time.perf_counter()
                with TritonServer(alone, log=root / "log"):
                    times.append(time.perf_counter() - begun)
            found.append(dict(part="start", model=label if name == "zenith" else name, seconds=min(times)))
    return found


def closed(server: TritonServer) -> list[dict[str, Any]]:
    """perf_analyzer, whose clients wait for their answers: it understates the tail under overload."""
    binary = os.environ.get("PERF_ANALYZER", "perf_analyzer")
    found = []
    with tempfile.TemporaryDirectory() as folder:
        bundle = find_triton().bundle
        if bundle is not None:  # two libraries of its own that the wheel does not have
            for name in ("libb64.so.0d", "libcudart.so.12"):
                (like,) = (bundle.parents[1] / "nvidia_pytriton.libs").glob(f"{name.split('.')[0]}-*")
                (pathlib.Path(folder) / name).symlink_to(like)
        data = pathlib.Path(folder) / "data.json"
        rows = [{"input_ids": row.tolist()} for row in models.sentences(SAMPLES)]
        data.write_text(json.dumps({"data": rows}))
        for concurrency in (1, 16):
            for turn in range(2):
                for name in models.NAMES if turn == 0 else reversed(models.NAMES):
                    report = pathlib.Path(folder) / "report.csv"
                    command = [
                        binary, "-m", name, "-u", server.grpc, "-i", "grpc", "--async", "--input-data", str(data),
                        "--concurrency-range", str(concurrency), "-f", str(report),
                        # Windows by requests, and stable by the median: one late answer of a shared machine moves the
                        # mean of a window by more than 10 %, the default.
                        "--measurement-mode", "count_windows", "--measurement-request-count", str(WINDOW),
                        "--percentile", "50", "--stability-percentage", "15", "--max-trials", "12",
                    ]  # fmt: skip
                    environment = {**os.environ, "LD_LIBRARY_PATH": folder}
                    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
                    case = dict(part="closed", model=name, case=f"{concurrency} in flight")
                    if "Failed to obtain stable measurement" in done.stdout + done.stderr:  # other work on the machine
                        found.append({**case, "per_second": "unstable"})
                        continue
                    if not report.is_file():
                        raise RuntimeError(done.stdout + done.stderr)
                    (row,) = csv.DictReader(report.read_text().splitlines())
                    found.append(
                        dict(
                            case,
                            per_second=float(row["Inferences/Second"]),
                            **{f"p{p}_ms": float(row[f"p{p} latency"]) / 1000 for p in (50, 90, 99)},
                        )
                    )
                    report.unlink()
    return found


def loadgen(server: TritonServer, seconds: float) -> list[dict[str, Any]]:
    """Each scenario in short turns, the models alternating, so that what else happens on the machine meets both alike;
    the queries of all turns are pooled. Offline is first: Server then sends both models 60 % of the slower one's
    throughput. Behind them, Zenith against ONNX Runtime."""
    import scenarios

    samples = models.sentences(SAMPLES)
    found, compared, offline = [], [], {}
    for scenario in ("Offline", "SingleStream", "MultiStream", "Server"):
        turns: dict[str, list[Any]] = {name: [] for name in models.NAMES}
        for turn in range(max(1, round(seconds / TURN_SECONDS))):
            for name in models.NAMES if turn % 2 == 0 else reversed(models.NAMES):
                qps = 0.6 * min(offline.values()) if scenario == "Server" else offline.get(name, EXPECTED)
                turns[name].append(
                    scenarios.run(server.grpc, name, samples, scenario, seconds=TURN_SECONDS, qps=qps, seed=turn)
                )
        results = {name: _pooled(scenario, turns[name]) for name in models.NAMES}
        if scenario == "Offline":
            offline = {name: result["per_second"] for name, result in results.items()}
        found += [dict(part="loadgen", model=name, case=scenario, **result) for name, result in results.items()]
        compared.append(dict(part="compared", case=scenario, **_compared(scenario, turns)))
    return found + compared


def _pooled(scenario: str, turns: Sequence[Any]) -> dict[str, Any]:
    """p50, p90 and p99 of all queries in ms, and samples a second. Offline has one query a turn: its latency says
    nothing."""
    from scenarios import ROWS

    latencies = np.concatenate([t.latencies_ms for t in turns])
    if scenario in ("SingleStream", "MultiStream"):  # LoadGen's own time between two queries does not count
        per_second = ROWS[scenario] * 1000 / latencies.mean()
    else:
        per_second = sum(t.samples for t in turns) / sum(t.seconds for t in turns)
    percentiles = {f"p{p}_ms": float(np.percentile(latencies, p)) for p in (50, 90, 99)}
    if scenario == "Offline":
        percentiles = dict.fromkeys(percentiles, "")
    return dict(queries=len(latencies), **percentiles, per_second=float(per_second))


def _compared(scenario: str, turns: dict[str, list[Any]]) -> dict[str, Any]:
    """ONNX Runtime's p99 by Zenith's, and Zenith's throughput by ONNX Runtime's: above 1, Zenith is ahead. With the
    range of 90 % of samples, with replacement, of the pairs of turns."""
    rng, count = np.random.default_rng(0), len(turns[models.NAMES[0]])
    drawn = [np.arange(count), *(rng.integers(0, count, count) for _ in range(RESAMPLED))]
    ratios: dict[str, list[float]] = {"p99_ms": [], "per_second": []}
    for indices in drawn:
        ours, theirs = (_pooled(scenario, [turns[name][i] for i in indices]) for name in models.NAMES)
        if scenario != "Offline":
            ratios["p99_ms"].append(theirs["p99_ms"] / ours["p99_ms"])
        ratios["per_second"].append(ours["per_second"] / theirs["per_second"])

    def text(values: list[float]) -> str:
        low, high = np.percentile(values, [5, 95]) if values else (0, 0)
        return f"{values[0]:.2f} ({low:.2f} to {high:.2f})" if values else ""

    return {f"{name} ahead": text(values) for name, values in ratios.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", action="append", choices=("accuracy", "start", "closed", "loadgen"))
    parser.add_argument("--seconds", type=float, default=20, help="of each scenario and model")
    parser.add_argument("--onnx", type=pathlib.Path, help="use this file, and write it where it is not there")
    parser.add_argument("--json", type=pathlib.Path)
    arguments = parser.parse_args()
    parts = arguments.part or ["accuracy", "loadgen", "closed", "start"]
    found: list[dict[str, Any]] = []

    def keep(rows: list[dict[str, Any]]) -> None:
        """At once: a measurement that is ended loses no part that is done."""
        found.extend(rows)
        if arguments.json is not None:
            arguments.json.write_text(json.dumps(dict(machine=machine().text(), results=found), indent=1))

    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        onnx_file = arguments.onnx or root / "encoder.onnx"
        if not onnx_file.exists():
            models.export(onnx_file)
        if set(parts) - {"start"}:
            repository = models.write(root / "models", onnx_file)
            with TritonServer(repository.path, log=root / "log") as server:
                if "accuracy" in parts:
                    keep(accuracy(server, onnx_file))
                if "loadgen" in parts:
                    keep(loadgen(server, arguments.seconds))
                if "closed" in parts:
                    keep(closed(server))
        if "start" in parts:
            keep(start(root, onnx_file))
    console = Console()
    console.print(machine().text(), highlight=False)
    for part in dict.fromkeys(row["part"] for row in found):
        rows = [{k: v for k, v in row.items() if k != "part"} for row in found if row["part"] == part]
        table = Table(*rows[0], title=TITLES.get(part, part))
        for row in rows:
            table.add_row(*(f"{v:.6g}" if isinstance(v, float) else str(v) for v in row.values()))
        console.print(table)


if __name__ == "__main__":
    main()
