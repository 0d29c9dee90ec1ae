"""Torch modules through zenith.compile, saved, and loaded where there is no torch."""

import subprocess
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")

import zenith_jax as zenith
from zenith_jax.errors import FrontendError

CLOSE = dict(rtol=1e-5, atol=1e-6)


class Embedded(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.norm, self.out = torch.nn.Embedding(20, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 3)

    def forward(self, tokens):
        hidden = self.norm(self.table(tokens))
        return {"logits": self.out(hidden), "best": self.out(hidden).argmax(-1)}


LOAD = """
import sys
sys.modules["torch"] = None  # an import of it raises
import jax, numpy as np, zenith_jax as zenith
path, tokens, logits = sys.argv[1:]
model = zenith.load(path)
results = model(np.load(tokens))
close = dict(rtol=1e-5, atol=1e-6)
if jax.default_backend() == "gpu":  # there the file holds a program for it, whose products have 10 bits
    close = dict(rtol=5e-3, atol=1e-3)
np.testing.assert_allclose(results[0], np.load(logits), **close)
print("loaded", model.framework)
"""


def test_compiled_saved_and_loaded_without_torch(tmp_path):
    torch.manual_seed(0)
    module, tokens = Embedded().eval(), torch.randint(0, 20, (2, 5))
    model = zenith.compile(module, tokens)
    with torch.no_grad():
        expected = module(tokens)
        actual = model(tokens)
    assert type(actual) is dict and actual["best"].dtype == torch.int64
    torch.testing.assert_close(actual, expected, **CLOSE)
    shared = {a.unsafe_buffer_pointer() for a in model.parameters.values()}
    assert module.table.weight.data_ptr() in shared
    path = model.save(tmp_path / "model.zenith")
    np.save(tmp_path / "tokens.npy", tokens.numpy().astype(np.int32))
    np.save(tmp_path / "logits.npy", expected["logits"].numpy())
    files = [str(tmp_path / "tokens.npy"), str(tmp_path / "logits.npy")]
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(path), *files], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "loaded torch"


class Same(torch.nn.Module):
    def forward(self, x, y):
        return x + 0, x - y


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_inputs_are_read_where_they_lie_and_outputs_are_new(mode):
    """Memory of an input may be used again when a call has returned, by torch for the next input."""
    shape = 64, 64
    model = zenith.compile(Same(), torch.randn(shape), torch.randn(shape), mode=mode)
    results, expected = [], []
    for i in range(100):
        x = torch.randn(shape)
        y = x.t() if i % 3 else x * 2
        results.append(model(x, y))
        expected.append((x.clone(), x - y))
        assert results[-1][0].data_ptr() != x.data_ptr()
        x.zero_()
    for actual, wanted in zip(results, expected, strict=True):
        torch.testing.assert_close(actual, wanted)


def test_what_is_no_pure_function_is_refused():
    module = torch.nn.BatchNorm1d(4)
    with pytest.raises(FrontendError, match=r"BatchNorm1d does not run in JAX: .*module.eval\(\)"):
        zenith.compile(module, torch.randn(3, 4))
