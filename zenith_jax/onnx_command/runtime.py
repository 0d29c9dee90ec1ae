"""ONNX Runtime, which is optional: what models are compared with."""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Mapping
from typing import Any

from zenith_jax.onnx_command.common import UsageError


def session(arguments: argparse.Namespace) -> Any:
    """ONNX Runtime on the CPU; its products of 8-bit integers exact on CPUs where they would saturate."""
    try:
        import onnxruntime  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UsageError(f"{arguments.action} compares with ONNX Runtime: pip install onnxruntime") from error
    path = pathlib.Path(arguments.model)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry("session.x64quantprecision", "1")
    try:
        return onnxruntime.InferenceSession(
            str(next(path.glob("*.onnx")) if path.is_dir() else path), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # its own exceptions have no public base class
        raise UsageError(f"ONNX Runtime refuses this model: {error}") from error


def reference(session: Any, inputs: Mapping[str, Any]) -> list[Any]:
    try:
        return session.run(None, dict(inputs))
    except Exception as error:
        raise UsageError(f"ONNX Runtime fails on these inputs: {error}") from error
