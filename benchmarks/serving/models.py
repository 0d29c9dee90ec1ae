"""An encoder of the size of MiniLM-L3 as an ONNX file, and a Triton repository with it by Zenith and by ONNX Runtime.

Both are in Triton's Python backend, with the same dimensions, dynamic batching and DLPack crossing.
"""

from __future__ import annotations

import json
import pathlib
import shutil

import numpy as np

import zenith_jax as zenith
from zenith_jax.serving import TritonModelRepository

LENGTH, LAYERS, HIDDEN, VOCABULARY = 32, 3, 384, 30522
BATCHES = (1, 2, 3, 4, 6, 8, 12, 16)
NAMES = ("zenith", "onnxruntime")

_ONNXRUNTIME_MODEL = """
import ctypes, json, pathlib
import numpy as np
import onnxruntime
import triton_python_backend_utils as pb

LENGTH = @LENGTH@
# NumPy prints a traceback for each capsule that Triton renamed.
set_name = ctypes.pythonapi.PyCapsule_SetName
set_name.argtypes, set_name.restype = [ctypes.py_object, ctypes.c_char_p], ctypes.c_int
CONSUMED = b"used_dltensor"


class TritonPythonModel:
    def initialize(self, args):
        folder = pathlib.Path(args["model_repository"]) / args["model_version"]
        self.session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
        for n in json.loads((folder / "batches.json").read_text()):
            self.session.run(None, {"input_ids": np.zeros((n, LENGTH), np.int64)})

    def execute(self, requests):
        parts = [np.from_dlpack(pb.get_input_tensor_by_name(r, "input_ids")) for r in requests]
        (out,) = self.session.run(None, {"input_ids": parts[0] if len(parts) == 1 else np.concatenate(parts)})
        answers, start = [], 0
        for part in parts:
            rows = out[start : start + len(part)]
            start += len(part)
            capsule = rows.__dlpack__()
            tensor = pb.Tensor.from_dlpack("vectors", capsule)
            set_name(capsule, CONSUMED)
            answers.append(pb.InferenceResponse(output_tensors=[tensor]))
        return answers
""".replace("@LENGTH@", str(LENGTH))


def export(path: pathlib.Path) -> None:
    """A BERT encoder, random weights, mean over tokens: int64 (batch, LENGTH) -> float32 (batch, HIDDEN)."""
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=12,
        intermediate_size=4 * HIDDEN,
        max_position_embeddings=512,
        attn_implementation="eager",
    )

    class Encoder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.bert = BertModel(config, add_pooling_layer=False).eval()

        def forward(self, input_ids):
            return self.bert(input_ids).last_hidden_state.mean(1)

    ids = torch.randint(0, VOCABULARY, (2, LENGTH))
    torch.onnx.export(
        Encoder().eval(),
        (ids,),
        str(path),
        input_names=["input_ids"],
        output_names=["vectors"],
        dynamic_shapes={"input_ids": {0: torch.export.Dim("batch", min=1, max=64)}},
        dynamo=True,
        external_data=False,
        verbose=False,
    )


def sentences(n: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, VOCABULARY, (n, LENGTH), np.int64)


def write(root: pathlib.Path, onnx_file: pathlib.Path, *, ahead_of_time: bool = True) -> TritonModelRepository:
    """The repository with both models."""
    repository = TritonModelRepository(root)
    compiled = zenith.compile(str(onnx_file), dynamic={"batch": BATCHES})
    repository.add(compiled, name="zenith", dtypes={"input_ids": "int64"}, ahead_of_time=ahead_of_time)
    config = (root / "zenith" / "config.pbtxt").read_text()
    folder = root / "onnxruntime" / "1"
    folder.mkdir(parents=True)
    (folder.parent / "config.pbtxt").write_text(config.replace('name: "zenith"', 'name: "onnxruntime"', 1))
    (folder / "model.py").write_text(_ONNXRUNTIME_MODEL)
    (folder / "batches.json").write_text(json.dumps(BATCHES))
    shutil.copyfile(onnx_file, folder / "model.onnx")
    return repository
