"""Time and memory to load an ONNX model and call it once: zenith.onnx.load against ONNX Runtime's session.

    python benchmarks/onnx_load.py                        an encoder with 113 MB of random weights, made here
    python benchmarks/onnx_load.py model.onnx --dim batch=1
    python benchmarks/onnx_load.py --external             the same, its weights in a file beside it
    python benchmarks/onnx_load.py --json loads.json

Each runs in a process of its own, three times; the median is shown. Memory is the most that was resident while loading
and calling (VmHWM, mapped files included), less what was resident before: Python, the libraries, JAX's backend. The
page cache is warm: the file was read once before.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile

import numpy as np

HIDDEN, HEADS, LAYERS, LENGTH = 768, 12, 4, 128

CHILD = """
import gc, json, pathlib, sys, time
def status(key):
    line = next(x for x in pathlib.Path("/proc/self/status").read_text().splitlines() if x.startswith(key))
    return int(line.split()[1]) * 1024
inputs = dict(__import__("numpy").load(sys.argv[2]))
if {runtime}:
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
else:
    import jax, onnx
    import zenith_jax as zenith
    jax.block_until_ready(jax.jit(lambda x: x + 1)(1.0))
gc.collect()
pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
before, start = status("VmRSS"), time.perf_counter()
if {runtime}:
    session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
    loaded, peak = time.perf_counter(), status("VmHWM")
    session.run(None, inputs)
else:
    model = zenith.onnx.load(sys.argv[1])
    jax.block_until_ready(model.params)
    loaded, peak = time.perf_counter(), status("VmHWM")
    jax.block_until_ready(model(**inputs))
called, peak_called = time.perf_counter(), status("VmHWM")
again = []
for _ in range(3):
    begin = time.perf_counter()
    session.run(None, inputs) if {runtime} else jax.block_until_ready(model(**inputs))
    again.append(time.perf_counter() - begin)
print(json.dumps(dict(load_s=loaded - start, first_call_s=called - loaded, next_call_s=min(again),
    load_bytes=peak - before, peak_bytes=peak_called - before)))
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=pathlib.Path)
    parser.add_argument("--dim", action="append", default=[], metavar="NAME=N", help="a symbolic dimension, else 1")
    parser.add_argument("--external", action="store_true", help="the encoder's weights in a file of their own")
    parser.add_argument("--tiny", action="store_true", help="a small encoder, once: whether this script runs")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = arguments.model or encoder(pathlib.Path(folder), external=arguments.external, tiny=arguments.tiny)
        inputs, weights = prepared(path, dict(d.rsplit("=", 1) for d in arguments.dim))
        np.savez(pathlib.Path(folder, "inputs.npz"), **inputs)
        runs = 1 if arguments.tiny else 3
        found = {}
        for name in ("zenith.onnx", "ONNX Runtime"):
            script = CHILD.format(runtime=name == "ONNX Runtime")
            command = [sys.executable, "-c", script, str(path), f"{folder}/inputs.npz"]
            outputs = [subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout for _ in range(runs)]
            each = [json.loads(output.splitlines()[-1]) for output in outputs]
            found[name] = {key: statistics.median(e[key] for e in each) for key in each[0]}
    show(path, weights, found)
    if arguments.json is not None:
        figures = dict(weights_bytes=weights, machine=platform.platform(), **found)
        arguments.json.write_text(json.dumps(figures, indent=1))
    return 0


def show(path: pathlib.Path, weights: int, found: dict[str, dict[str, float]]) -> None:
    print(f"{path.name}: {weights / 1e6:.0f} MB of weights")
    print(f"{'':14}{'load':>9}{'first call':>12}{'next call':>11}{'memory to load':>21}{'and called':>17}")
    for name, row in found.items():
        memory = (f"{row[k] / 1e6:6.0f} MB ({row[k] / weights:.2f} x)" for k in ("load_bytes", "peak_bytes"))
        load, first, following = (row[f"{k}_s"] for k in ("load", "first_call", "next_call"))
        times = [f"{load * 1e3:6.0f} ms", f"{first:8.2f} s", f"{following * 1e3:7.0f} ms"]
        print(f"{name:14}" + "".join(f"{t:>10}" for t in times) + "".join(f"{m:>20}" for m in memory))


def prepared(path: pathlib.Path, dims: dict[str, str]) -> tuple[dict[str, np.ndarray], int]:
    """Inputs of the declared shapes, and the bytes of all initializers."""
    import onnx

    proto = onnx.load(path, load_external_data=False)
    known = {i.name for i in proto.graph.initializer}
    inputs = {}
    for info in proto.graph.input:
        if info.name not in known:
            kind = onnx.helper.tensor_dtype_to_np_dtype(info.type.tensor_type.elem_type)
            sizes = info.type.tensor_type.shape.dim
            shape = [d.dim_value if d.HasField("dim_value") else int(dims.get(d.dim_param, 1)) for d in sizes]
            ones = np.ones(shape) if kind.kind in "iu" else np.random.default_rng(0).normal(size=shape)
            inputs[info.name] = ones.astype(kind)
    dtype = onnx.helper.tensor_dtype_to_np_dtype
    for file in (path, *path.parent.glob(f"{path.stem}*data")):
        file.read_bytes()  # into the page cache
    return inputs, int(sum(np.prod(i.dims) * dtype(i.data_type).itemsize for i in proto.graph.initializer))


def encoder(folder: pathlib.Path, *, external: bool, tiny: bool) -> pathlib.Path:
    """Layers of a transformer's encoder after the norm, as exporters write them at opset 17, with random weights."""
    import onnx
    from onnx import helper, numpy_helper

    hidden, heads, layers = (32, 2, 1) if tiny else (HIDDEN, HEADS, LAYERS)
    rng = np.random.default_rng(0)
    nodes, tensors = [], []

    def weight(name: str, array: np.ndarray) -> str:
        tensors.append(numpy_helper.from_array(array, name))
        return name

    def add(op_type: str, inputs: list[str], name: str, **attributes: object) -> str:
        nodes.append(helper.make_node(op_type, inputs, [name], name, **attributes))
        return name

    def linear(x: str, name: str, n: int, m: int) -> str:
        w = weight(f"{name}.weight", rng.normal(0, 0.02, (n, m)).astype(np.float32))
        product = add("MatMul", [x, w], f"{name}.product")
        return add("Add", [product, weight(f"{name}.bias", np.zeros(m, np.float32))], f"{name}.sum")

    def norm(x: str, name: str) -> str:
        scale, bias = (weight(f"{name}.{k}", np.full(hidden, v, np.float32)) for k, v in (("scale", 1), ("bias", 0)))
        return add("LayerNormalization", [x, scale, bias], name, axis=-1, epsilon=1e-5)

    shapes = dict(split=[0, 0, heads, hidden // heads], join=[0, 0, hidden])
    for name, shape in shapes.items():
        weight(name, np.array(shape, np.int64))
    scalars = dict(scale=(hidden // heads) ** -0.5, root_half=2**-0.5, one=1.0, half=0.5)
    for name, value in scalars.items():
        weight(name, np.array(value, np.float32))
    x = "x"
    for layer in (f"layer{i}" for i in range(layers)):
        parts = {}
        for part, perm in (("query", [0, 2, 1, 3]), ("key", [0, 2, 3, 1]), ("value", [0, 2, 1, 3])):
            projected = linear(x, f"{layer}.{part}", hidden, hidden)
            heads_apart = add("Reshape", [projected, "split"], f"{layer}.{part}.heads")
            parts[part] = add("Transpose", [heads_apart], f"{layer}.{part}.transposed", perm=perm)
        logits = add("MatMul", [parts["query"], parts["key"]], f"{layer}.logits")
        scaled = add("Mul", [logits, "scale"], f"{layer}.scaled")
        weights = add("Softmax", [scaled], f"{layer}.weights", axis=-1)
        mixed = add("MatMul", [weights, parts["value"]], f"{layer}.mixed")
        back = add("Transpose", [mixed], f"{layer}.back", perm=[0, 2, 1, 3])
        joined = add("Reshape", [back, "join"], f"{layer}.joined")
        x = norm(add("Add", [x, linear(joined, f"{layer}.out", hidden, hidden)], f"{layer}.first"), f"{layer}.norm1")
        inner = linear(x, f"{layer}.up", hidden, 4 * hidden)
        root = add("Mul", [inner, "root_half"], f"{layer}.root")
        one_more = add("Add", [add("Erf", [root], f"{layer}.erf"), "one"], f"{layer}.one_more")
        gelu = add("Mul", [add("Mul", [inner, one_more], f"{layer}.twice"), "half"], f"{layer}.gelu")
        down = linear(gelu, f"{layer}.down", 4 * hidden, hidden)
        x = norm(add("Add", [x, down], f"{layer}.second"), f"{layer}.norm2")
    infos = [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [1, LENGTH, hidden]) for n in ("x", x)]
    graph = helper.make_graph(nodes, "encoder", infos[:1], infos[1:], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path = folder / "encoder.onnx"
    onnx.save(model, path, save_as_external_data=external, location="encoder.data")
    return path


if __name__ == "__main__":
    sys.exit(main())
