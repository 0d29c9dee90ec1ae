"""These tests need torch, transformers and onnxscript and are skipped without. CONTRIBUTING.md says how to run them."""

import warnings

import pytest


@pytest.fixture(autouse=True)
def warnings_of_torch_about_itself():
    """torch's export checks its tree specifications in a way that it deprecates; 2.11's compile imports torch.jit's."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`torch\.jit\.script_method` is deprecated", DeprecationWarning)
        warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)`", FutureWarning)
        yield


@pytest.fixture(autouse=True)
def every_kernel():
    """Kernels wherever they are right, at these sizes too."""
    import zenith_jax as zenith

    with zenith.configured(use_cost=False):
        yield
