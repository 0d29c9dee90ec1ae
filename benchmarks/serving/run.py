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
from zenith_jax.serving import TritonModelRepository, TritonServer, find_triton

SAMPLES = 64
TURN_SECONDS = 2.0  # of one model in one scenario
RESAMPLED = 1000
TITLES = {
    "loadgen": "LoadGen scenarios",
    "compared": "Zenith against ONNX Runtime: above 1 it is ahead. others: of a processor, by other processes",
}
WINDOW = 400  # requests of one of perf_analyzer's windows: two seconds or so
EXPECTED = 500.0  # samples a second, of which Offline sends as many as its turn takes


def settings(repository: TritonModelRepository) -> list[dict[str, Any]]:
    """What `add` measured and chose for Zenith's model: its pool's threads, and how long it takes calls to be."""
    chosen = json.loads((repository.path / "zenith" / "1" / "serving.json").read_text())
    took = ", ".join(f"{rows}: {1000 * seconds:.1f}" for (rows,), seconds in chosen["seconds"])
    return [dict(part="settings", pool_threads=chosen["pool_threads"], **{"ms of a call by rows": took})]


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
    """Each scenario in short turns, the models alternating, so that what else happens on the machine meets both alike.
    Offline is first: Server then sends both models 60 % of the slower one's throughput. Behind them, Zenith against
    ONNX Runtime."""
    import scenarios

    samples = models.sentences(SAMPLES)
    found, compared, offline = [], [], {}
    for scenario in ("Offline", "SingleStream", "MultiStream", "Server"):
        turns: dict[str, list[Any]] = {name: [] for name in models.NAMES}
        before = time.perf_counter(), *_processor_seconds(server)
        for turn in range(max(1, round(seconds / TURN_SECONDS))):
            for name in models.NAMES if turn % 2 == 0 else reversed(models.NAMES):
                qps = 0.6 * min(offline.values()) if scenario == "Server" else offline.get(name, EXPECTED)
                turns[name].append(
                    scenarios.run(server.grpc, name, samples, scenario, seconds=TURN_SECONDS, qps=qps, seed=turn)
                )
        took, all_used, we_used = np.subtract((time.perf_counter(), *_processor_seconds(server)), before)
        results = {name: _measured(scenario, turns[name]) for name in models.NAMES}
        if scenario == "Offline":
            offline = {name: result["per_second"] for name, result in results.items()}
        found += [dict(part="loadgen", model=name, case=scenario, **result) for name, result in results.items()]
        others = f"{100 * (all_used - we_used) / took:.0f} %"
        compared.append(dict(part="compared", case=scenario, **_compared(scenario, turns), others=others))
    return found + compared


def _measured(scenario: str, turns: Sequence[Any]) -> dict[str, Any]:
    """p50, p90 and p99 in ms of the queries of all turns; p99 of the turn in the middle, which a neighbour that comes
    and goes does not move; samples a second. Offline has one query a turn, whose latency says nothing."""
    from scenarios import ROWS

    latencies = np.concatenate([t.latencies_ms for t in turns])
    if scenario in ("SingleStream", "MultiStream"):  # LoadGen's own time between two queries does not count
        per_second = ROWS[scenario] * 1000 / latencies.mean()
    else:
        per_second = sum(t.samples for t in turns) / sum(t.seconds for t in turns)
    shown: dict[str, Any] = {f"p{p}_ms": float(np.percentile(latencies, p)) for p in (50, 90, 99)}
    shown["p99_ms of a turn"] = float(np.median([np.percentile(t.latencies_ms, 99) for t in turns]))
    if scenario == "Offline":
        shown = dict.fromkeys(shown, "")
    return dict(queries=len(latencies), **shown, per_second=float(per_second))


def _compared(scenario: str, turns: dict[str, list[Any]]) -> dict[str, Any]:
    """ONNX Runtime's latency by Zenith's, and Zenith's throughput by ONNX Runtime's: above 1, Zenith is ahead. Of all
    turns, with the range of 90 % of samples, with replacement, of the pairs of turns; and p99 pair by pair: the median
    of the pairs' ratios, with the smallest and the largest."""
    rng, count = np.random.default_rng(0), len(turns[models.NAMES[0]])
    drawn = [np.arange(count), *(rng.integers(0, count, count) for _ in range(RESAMPLED))]
    ratios: dict[str, list[float]] = {"p50_ms": [], "p99_ms": [], "per_second": []}
    for indices in drawn:
        ours, theirs = (_measured(scenario, [turns[name][i] for i in indices]) for name in models.NAMES)
        for key, found in ratios.items():
            if key == "per_second":
                found.append(ours[key] / theirs[key])
            elif scenario != "Offline":
                found.append(theirs[key] / ours[key])

    def text(values: list[float], low: float, high: float) -> str:
        return f"{values[0]:.2f} ({low:.2f} to {high:.2f})"

    shown = {key: text(values, *np.percentile(values, [5, 95])) if values else "" for key, values in ratios.items()}
    pairs: list[float] = []
    if scenario != "Offline":
        ours, theirs = ([np.percentile(t.latencies_ms, 99) for t in turns[name]] for name in models.NAMES)
        pairs = sorted(float(b / a) for a, b in zip(ours, theirs, strict=True))
    shown["p99_ms by pairs"] = text([float(np.median(pairs))], pairs[0], pairs[-1]) if pairs else ""
    return shown


def _processor_seconds(server: TritonServer) -> tuple[float, float]:
    """That everybody has used, with what a hypervisor took, and that this process, the server and its models have."""
    ticks = os.sysconf("SC_CLK_TCK")
    with open("/proc/stat") as file:
        user, nice, system, _, _, irq, softirq, stolen, *_ = map(int, file.readline().split()[1:])
    ours = 0
    assert server.process is not None
    for pid in {os.getpid(), server.process.pid, *server.backends()}:
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        ours += int(fields[11]) + int(fields[12])  # utime and stime
    return (user + nice + system + irq + softirq + stolen) / ticks, ours / ticks


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
            keep(settings(repository))
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
