"""A roofline of the results in this folder: operations a second over operations a byte, ours and the best peer's.

    python benchmarks/h100/roofline.py docs/images/roofline_h100.svg      # needs matplotlib; no GPU

The roof is what was measured beside the ops: a copy's bandwidth, and the rate that large products sustain. Bytes are
those of arguments and results, each once; operations those of the formula's products, or, along rows, of each element.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import pathlib
import re
from collections.abc import Iterator
from typing import Any

RESULTS = pathlib.Path(__file__).parent / "results"
COPY, PRODUCTS, PEAK = 2.79e12, 700e12, 989e12  # bytes/s, operations/s measured, and of the data sheet, bfloat16
# Operations on an element of a row, forward: additions, products and elementary functions.
OF_AN_ELEMENT = {"layer_norm": 8, "rms_norm": 5, "add_layer_norm": 9, "add_rms_norm": 6, "softmax": 5,
                 "cross_entropy": 4, "gelu(erf)": 12, "gelu(tanh)": 9, "silu": 4}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Point:
    family: str
    operations: float
    bytes: float
    seconds: dict[str, float]  # "zenith", and peers

    def at(self, name: str) -> tuple[float, float]:
        return self.operations / self.bytes, self.operations / self.seconds[name]

    def best_peer(self) -> str | None:
        peers = {n: s for n, s in self.seconds.items() if n != "zenith"}
        return min(peers, key=peers.__getitem__) if peers else None


def read(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text())


def sizes(case: str) -> dict[str, int]:
    """{"b": 4, "h": 32, "kv": 8, ...} of "b4 h32/8 s4096 d192/128 causal"."""
    found = {k: int(v) for k, v in re.findall(r"\b([bstd])(\d+)", case)}
    heads = re.search(r"\bh(\d+)(?:/(\d+))?", case)
    assert heads is not None, case
    found["h"], found["kv"] = int(heads[1]), int(heads[2] or heads[1])
    return found


def attention() -> Iterator[Point]:
    for case in read("attention")["cases"]:
        n = sizes(case["case"])
        itemsize, tokens = 2, n["b"] * n["s"] * n["d"]
        moved = itemsize * tokens * (2 * n["h"] + 2 * n["kv"])
        backward = case["pass"] == "fwd+bwd"
        ms, rate = case["ms"], case["TFLOP/s"]
        yield Point(
            "attention, forward and backward" if backward else "attention, forward",
            rate["zenith"] * ms["zenith"] * 1e9, moved * (3 if backward else 1),
            {name: t / 1e3 for name, t in ms.items()},
        )  # fmt: skip


def decoding() -> Iterator[Point]:
    for case in read("attention_masks")["zenith decoding"]:
        n = sizes(case["case"])
        pairs = n["b"] * n["s"] * n["d"]
        yield Point("decoding", 4 * pairs * n["h"] * n["t"], 4 * pairs * n["kv"], {"zenith": case["ms"] / 1e3})


def linear() -> Iterator[Point]:
    for case in read("linear")["cases"]:
        m, k, n, ms = case["rows"], case["k"], case["n"], case["ms"]
        if case["epilogue"].endswith("gradient"):
            continue
        weights = 2 if case["epilogue"].endswith("gate") else 1
        moved = 2 * (m * k + weights * k * n + m * n * (2 if case["epilogue"] == "residual" else 1))
        peers = {name: ms[name] / 1e3 for name in ("XLA", "torch.compile") if name in ms}
        yield Point("linear layer", 2 * weights * m * k * n, moved, {"zenith": ms["zenith.ops"] / 1e3, **peers})


def linear_cross_entropy() -> Iterator[Point]:
    for case in read("linear_cross_entropy")["rows"]:
        tokens, features, classes = map(int, case["shape"].split("x"))
        seconds = {n.removesuffix(".jit").replace("jax", "XLA"): t / 1e3 for n, t in case["milliseconds"].items()}
        del seconds["one product"]
        moved = 2 * 2 * (tokens + classes) * features
        yield Point("linear layer and cross entropy", 6 * tokens * features * classes, moved, seconds)


def rows() -> Iterator[Point]:
    results = read("rows")
    for case in results["cases"]:
        seconds = {name: us / 1e6 for name, us in case["us"]["forward"].items()}
        moved = case["of_copy"]["forward"]["zenith"] * seconds["zenith"] * results["copy_bytes_per_second"]
        yield Point("along rows", OF_AN_ELEMENT[case["op"]] * results["elements"], moved, seconds)


def draw(points: list[Point], path: pathlib.Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "zenith"  # the same file from the same results
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 5.5), layout="constrained")
    reach = [0.8, 20000.0]
    for top, style, label in ((PRODUCTS, "-", "a copy's bandwidth; large products"), (PEAK, ":", "data sheet, 989")):
        bend = top / COPY
        axes.plot([reach[0], bend, reach[1]], [reach[0] * COPY / 1e12, top / 1e12, top / 1e12], style, color="0.4",
                  label=label, zorder=1)  # fmt: skip
    by_family: dict[str, list[Point]] = collections.defaultdict(list)
    for point in points:
        by_family[point.family].append(point)
    for number, (family, members) in enumerate(by_family.items()):
        color = f"C{number}"
        ours = [p.at("zenith") for p in members]
        theirs = [p.at(peer) for p in members if (peer := p.best_peer())]
        axes.scatter([x for x, _ in ours], [y / 1e12 for _, y in ours], s=24, color=color, label=family, zorder=3)
        axes.scatter([x for x, _ in theirs], [y / 1e12 for _, y in theirs], s=30, facecolors="none", edgecolors=color,
                     linewidths=0.9, zorder=2)  # fmt: skip
    axes.scatter([], [], s=30, facecolors="none", edgecolors="0.3", label="the best peer: XLA, cuDNN, torch.compile")
    axes.set(xscale="log", yscale="log", xlim=reach, xlabel="operations a byte", ylabel="TFLOP/s")
    axes.grid(which="both", linewidth=0.3)
    axes.legend(loc="lower right", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", type=pathlib.Path, help="an .svg or .png file")
    draw([*rows(), *decoding(), *linear(), *linear_cross_entropy(), *attention()], parser.parse_args().picture)


if __name__ == "__main__":
    main()
