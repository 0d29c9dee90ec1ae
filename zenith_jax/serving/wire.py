"""What Triton calls dtypes, and a model's configuration in its format (text protobuf of model_config.proto)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

TRITON_DTYPES = {
    "bool": "BOOL", "uint8": "UINT8", "uint16": "UINT16", "uint32": "UINT32", "uint64": "UINT64",
    "int8": "INT8", "int16": "INT16", "int32": "INT32", "int64": "INT64",
    "float16": "FP16", "bfloat16": "BF16", "float32": "FP32", "float64": "FP64",
}  # fmt: skip
# What a client may send for what the model computes in: JAX without 64 bits makes an ONNX model's int64 an int32.
WIDER = {"int32": ("int64",), "uint32": ("uint64",), "float32": ("float64",)}


class Word(str):
    """A value of an enumeration, which is written without quotes."""


def text(fields: Mapping[str, Any], indent: int = 0) -> str:
    """Text protobuf: mappings are messages, sequences of mappings are repeated messages, others are lists."""
    lines = []
    for name, value in fields.items():
        if isinstance(value, Mapping):
            lines += [f"{name} {{", text(value, indent + 2), "}"]
        elif isinstance(value, Sequence) and not isinstance(value, str) and value and isinstance(value[0], Mapping):
            for item in value:
                lines += [f"{name} {{", text(item, indent + 2), "}"]
        elif isinstance(value, Sequence) and not isinstance(value, str):
            lines.append(f"{name}: [{', '.join(map(_scalar, value))}]")
        else:
            lines.append(f"{name}: {_scalar(value)}")
    return "\n".join("  " + line if indent else line for part in lines for line in part.split("\n"))


def _scalar(value: Any) -> str:
    if isinstance(value, Word):
        return str(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        escaped = value.encode().decode("latin-1")
        return '"' + "".join(c if 32 <= ord(c) < 127 and c not in '"\\' else f"\\{ord(c):03o}" for c in escaped) + '"'
    return str(value)
