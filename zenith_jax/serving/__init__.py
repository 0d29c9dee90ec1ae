"""Compiled models behind NVIDIA's Triton Inference Server. See docs/serving.md.

`TritonModelRepository(path).add(compiled, name=...)` writes what a Triton server loads; `TritonServer(path)` runs one
here, as `zenith serve` does. Triton itself is never imported: models run in its Python backend, by backend.py.
"""

from zenith_jax.serving.repository import TritonModelRepository
from zenith_jax.serving.server import Installation, TritonServer, find_triton

__all__ = ["Installation", "TritonModelRepository", "TritonServer", "find_triton"]
