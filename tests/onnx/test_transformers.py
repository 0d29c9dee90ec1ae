"""Transformers with random weights, exported by PyTorch: the same results, and each part found by the rewriter.

An export takes 5 to 30 s; without torch, transformers and onnxscript these are skipped.
"""

import jax
import numpy as np
import pytest

import zenith_jax as zenith
from zenith_jax.frontends.onnx import load

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("onnxscript")
pytestmark = pytest.mark.filterwarnings("ignore")  # of the exporter

SIZES = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128)
BATCH, LENGTH = 2, 24


def bert():
    model = transformers.BertModel(transformers.BertConfig(vocab_size=100, **SIZES))
    mask = torch.ones(BATCH, LENGTH, dtype=torch.int64)
    mask[1, 20:] = 0
    return model, dict(input_ids=torch.randint(0, 100, (BATCH, LENGTH)), attention_mask=mask), "last_hidden_state"


def llama():
    config = transformers.LlamaConfig(vocab_size=100, num_key_value_heads=2, use_cache=False, **SIZES)
    inputs = dict(
        input_ids=torch.randint(0, 100, (BATCH, LENGTH)),
        attention_mask=torch.ones(BATCH, LENGTH, dtype=torch.int64),
    )
    return transformers.LlamaForCausalLM(config), inputs, "logits"


class Positional(torch.nn.Module):
    """`model` with positional inputs and one output, as the exporter names them best."""

    def __init__(self, model, names, output):
        super().__init__()
        self.model, self.names, self.output = model, names, output

    def forward(self, *inputs):
        return getattr(self.model(**dict(zip(self.names, inputs, strict=True))), self.output)


@pytest.mark.parametrize(
    "make, opset, found",
    [
        (bert, 23, {"layer_norm": 1, "add_layer_norm": 4, "attention": 2, "gelu_erf": 2}),
        (llama, 23, {"rms_norm": 1, "add_rms_norm": 4, "attention": 2, "silu": 2}),
        # With Softmax -> IsNaN -> Where(0) in it, torch's guard for queries without a key.
        (llama, 20, {"rms_norm": 1, "add_rms_norm": 4, "attention": 2, "silu": 2}),
    ],
    ids=["bert-23", "llama-23", "llama-20"],
)
def test_exported_transformer(make, opset, found, tmp_path):
    torch.manual_seed(0)
    model, inputs, output = make()
    module = Positional(model, list(inputs), output).eval()
    with torch.no_grad():
        expected = module(*inputs.values()).numpy()
    path = tmp_path / "model.onnx"
    dynamic = dict.fromkeys(range(2), torch.export.Dim.DYNAMIC)
    torch.onnx.export(
        module,
        tuple(inputs.values()),
        path,
        dynamo=True,
        opset_version=opset,
        input_names=list(inputs),
        dynamic_shapes=((dynamic,) * len(inputs),),
        verbose=False,
    )
    imported = load(path)
    arrays = {name: x.numpy() for name, x in inputs.items()}
    function = lambda params, inputs: imported.apply(params, **inputs)[0]  # noqa: E731
    tolerance = dict(rtol=1e-4, atol=1e-5)  # a few hundred float32 roundings of values of size 1
    np.testing.assert_allclose(jax.jit(function)(imported.params, arrays), expected, **tolerance)
    with zenith.configured(use_cost=False):
        np.testing.assert_allclose(zenith.jit(function)(imported.params, arrays), expected, **tolerance)
        report = zenith.explain(function)(imported.params, arrays)
    assert report.counts() == found
    # Other lengths and batches than at export; causal attention does not look ahead.
    shorter = {name: x[:1, :7] for name, x in arrays.items()}
    if make is llama:
        np.testing.assert_allclose(function(imported.params, shorter), expected[:1, :7], **tolerance)
