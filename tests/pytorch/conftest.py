"""These tests need torch, transformers and onnxscript and are skipped without. CONTRIBUTING.md says how to run them."""

import pytest


@pytest.fixture(autouse=True)
def every_kernel():
    """Kernels wherever they are right, at these sizes too."""
    import zenith_jax as zenith

    with zenith.configured(use_cost=False):
        yield
