"""torch.compile(module, backend="zenith")."""

import pathlib
import tomllib
import warnings

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("onnxscript")

from zenith_jax.frontends.torch.dynamo import zenith as backend
from zenith_jax.frontends.torch.errors import FallbackWarning, TorchError

CLOSE = dict(rtol=1e-4, atol=1e-5)


@pytest.fixture(autouse=True)
def inference():
    torch._dynamo.reset()
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def compiled(function, **options):
    return torch.compile(function, backend=backend, options={"strict": True}, **options)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, **CLOSE)


def test_torch_finds_the_backend_by_its_name(tmp_path, monkeypatch):
    """By the entry point that pyproject.toml declares, as an installed package has it."""
    project = tomllib.loads((pathlib.Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    (tmp_path / "zenith_jax_entry-0.dist-info").mkdir()
    metadata = tmp_path / "zenith_jax_entry-0.dist-info"
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: zenith_jax_entry\nVersion: 0\n")
    group = project["entry-points"]["torch_dynamo_backends"]
    (metadata / "entry_points.txt").write_text(
        "[torch_dynamo_backends]\n" + "\n".join(f"{name} = {target}" for name, target in group.items()) + "\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    discover = torch._dynamo.backends.registry._discover_entrypoint_backends
    discover.cache_clear()
    discover()
    assert "zenith" in torch._dynamo.list_backends()
    module = torch.nn.Linear(4, 4).eval()
    x = torch.randn(2, 4)
    close(torch.compile(module, backend="zenith")(x), module(x))


def test_llama_with_dynamic_lengths():
    config = transformers.LlamaConfig(
        vocab_size=100, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=128, use_cache=False,
    )  # fmt: skip
    module = transformers.LlamaForCausalLM(config).eval()
    fast = compiled(module)
    for shape in ((2, 12), (2, 9), (3, 7)):
        tokens = torch.randint(0, 100, shape)
        close(fast(input_ids=tokens).logits, module(input_ids=tokens).logits)


def test_a_graph_break_gives_two_graphs():
    seen = []

    def counting(graph_module, inputs, **options):
        seen.append(graph_module)
        return backend(graph_module, inputs, **options)

    class Breaks(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)

        def forward(self, x):
            y = self.first(x)
            if y.sum() > 1000:
                return y
            return self.second(torch.relu(y)), y

    module = Breaks().eval()
    fast = torch.compile(module, backend=counting, options={"strict": True})
    x = torch.randn(3, 4)
    close(fast(x), module(x))
    assert len(seen) == 2


def test_buffers_are_weights_which_are_bound_once():
    """ResNet-50 has 106 in its batch norms, and a tensor that crosses takes tens of microseconds."""
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8)).eval()
    graphs = []
    fast = torch.compile(module, backend=lambda *args: graphs.append(backend(*args)) or graphs[-1])
    x = torch.randn(2, 3, 6, 6)
    close(fast(x), module(x))
    assert [len(graph.input_positions) for graph in graphs] == [1]
    module[1].running_mean.add_(1)
    close(fast(x), module(x))


def test_writes_to_inputs_and_buffers_are_kept():
    class Writes(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("total", torch.zeros(4))

        def forward(self, x):
            self.total += x.sum(0)
            x.add_(1)
            return x * self.total

    module, plain = Writes(), Writes()
    fast = compiled(module)
    for _ in range(2):
        x = torch.ones(3, 4)
        y = x.clone()
        close(fast(x), plain(y))
        close(x, y)
    close(module.total, plain.total)


def test_autocast_inside_and_outside():
    module = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh()).eval()
    x = torch.randn(2, 8)

    def inside(x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return module(x)

    expected = inside(x)
    fast = compiled(module)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outside = fast(x)
    for actual in (outside, compiled(inside)(x)):
        assert actual.dtype == torch.bfloat16
        torch.testing.assert_close(actual, expected, rtol=0.05, atol=0.02)
    close(fast(x), module(x))


def test_a_dynamic_batch_is_exported_once():
    module = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.GELU()).eval()
    graphs = []

    def counting(graph_module, inputs, **options):
        graphs.append(backend(graph_module, inputs, **options))
        return graphs[-1]

    fast = torch.compile(module, backend=counting, options={"strict": True}, dynamic=True)
    for batch in (2, 3, 7):
        x = torch.randn(batch, 4)
        close(fast(x), module(x))
    (graph,) = graphs
    assert sum(map(len, graph.engine.programs.values())) == 1
    assert len(graph.engine.ready) == 3


def test_python_floats_and_ints_among_the_arguments():
    def scaled(x, factor, count):
        return (x * factor)[:count] + count

    fast = compiled(scaled, dynamic=True)
    for factor, count in ((0.5, 2), (1.5, 3)):
        x = torch.randn(6, 4)
        close(fast(x, factor, count), scaled(x, factor, count))


def test_weights_are_bound_once_and_followed():
    module = torch.nn.Linear(64, 64).eval()
    fast = compiled(module)
    x = torch.randn(2, 64)
    close(fast(x), module(x))
    module.weight.mul_(2)
    close(fast(x), module(x))
    module.weight.data = torch.randn(64, 64)
    close(fast(x), module(x))


def test_training_runs_in_torch_and_says_so():
    module = torch.nn.Linear(4, 4)
    with torch.enable_grad():
        with pytest.warns(FallbackWarning, match="gradients are on"):
            torch.compile(module, backend=backend)(torch.randn(2, 4)).sum().backward()
        assert module.weight.grad is not None
        torch._dynamo.reset()
        with pytest.raises(Exception, match="gradients are on"):
            compiled(module)(torch.randn(2, 4))


def test_train_mode_falls_back():
    module = torch.nn.BatchNorm1d(4).train()
    twin = torch.nn.BatchNorm1d(4).train()
    x = torch.randn(8, 4)
    with pytest.warns(FallbackWarning, match="statistics of the batch"):
        close(torch.compile(module, backend=backend)(x), twin(x))
    close(module.running_mean, twin.running_mean)


def test_wrong_options():
    with pytest.raises(TorchError, match=r"no options \['fast'\], only \['frozen', 'strict'\]"):
        backend(None, [], options={"fast": True})
    with pytest.raises(TorchError, match="no mode 'max-autotune'"):
        backend(None, [], mode="max-autotune")


def test_silence_where_all_is_well():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.compile(torch.nn.ReLU(), backend=backend)(torch.randn(3))
