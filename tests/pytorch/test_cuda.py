"""zenith.torch on CUDA tensors: same answers, memory shared, work of both libraries in the order of torch's streams."""

import threading

import jax
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("onnxscript")

import zenith_jax as zenith
from zenith_jax.errors import FrontendError
from zenith_jax.frontends.torch.errors import FallbackWarning
from zenith_jax.ops._lower import compute_stream

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no NVIDIA GPU"),
]

SIZES = dict(hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=256)
# JAX multiplies float32 in TensorFloat-32 by default, 2^-11 a product; values are of size 1.
CLOSE = dict(rtol=5e-3, atol=5e-3)


@pytest.fixture(autouse=True)
def inference():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def compiled(module):
    return zenith.torch.compile(module.eval().cuda(), strict=True)


def test_bert_runs_on_the_gpu_of_its_weights():
    module = transformers.BertModel(transformers.BertConfig(vocab_size=100, **SIZES)).bfloat16()
    fast = compiled(module)
    tokens = torch.randint(0, 100, (2, 64), device="cuda")
    actual, expected = fast(tokens).last_hidden_state, module(tokens).last_hidden_state
    assert actual.device == tokens.device and actual.dtype == torch.bfloat16
    # A few bfloat16 roundings of values of up to 4, in two layers.
    torch.testing.assert_close(actual, expected, rtol=5e-2, atol=8e-2)
    counts = fast.report.counts()
    assert counts["attention"] == 2 and counts["add_layer_norm"] == 4


def test_weights_are_read_where_they_lie():
    module = torch.nn.Linear(2048, 2048)
    fast = compiled(module)
    x = torch.randn(4, 2048, device="cuda")
    torch.testing.assert_close(fast(x), module(x), **CLOSE)
    module.weight.mul_(2)
    torch.testing.assert_close(fast(x), module(x), **CLOSE)


@pytest.mark.parametrize("side", [False, True], ids=["default stream", "another stream"])
def test_calls_stay_in_the_order_of_torchs_stream(side):
    """What comes before the call takes milliseconds, and what comes after it reads the result at once."""
    module = torch.nn.Sequential(torch.nn.Linear(512, 512), torch.nn.GELU(), torch.nn.Linear(512, 512))
    fast = compiled(module)
    slow = torch.randn(4096, 4096, device="cuda") / 64
    start = torch.randn(4096, 512, device="cuda")
    fast(start)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream() if side else torch.cuda.current_stream()
    with torch.cuda.stream(stream):
        for step in range(20):
            before = start * (step + 1)
            for _ in range(4):
                before = slow @ before
            before = before / before.std()
            after = fast(before) * 2
            torch.testing.assert_close(after, module(before) * 2, **CLOSE)


def test_copies_of_inputs_stay_until_they_are_read():
    """Neither input is dense, so that both are copied, to memory that torch has for the next one when it is let go."""

    class Difference(torch.nn.Module):
        def forward(self, x, y):
            return x - y

    fast = compiled(Difference())
    x, y = torch.randn(2, 1024, 1024, device="cuda")
    slow = torch.randn(4096, 4096, device="cuda") / 64
    for step in range(20):
        x.mul_((slow @ slow).mean() * 0 + 1.1)
        torch.testing.assert_close(fast(x.t(), y.t()), x.t() - y.t(), msg=lambda m, s=step: f"step {s}: {m}")


def test_threads_on_their_own_streams():
    module = torch.nn.Linear(256, 256)
    fast = compiled(module)
    fast(torch.randn(64, 256, device="cuda"))
    torch.cuda.synchronize()
    wrong = []

    def work(seed):
        stream = torch.cuda.Stream()
        with torch.no_grad(), torch.cuda.stream(stream):
            x = torch.full((64, 256), float(seed), device="cuda")
            for _ in range(100):
                x = x + 1
                if not torch.allclose(fast(x), module(x), rtol=5e-3, atol=0.1):  # sums of 256 terms of up to 100
                    wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_jax_says_on_which_stream_it_computes():
    """One that it computes on again, and on which torch can order its work: without it the way in takes 30 us more."""
    stream = compute_stream(jax.devices("cuda")[0])
    assert stream
    module = torch.nn.Linear(8, 8)
    fast = compiled(module)
    x = torch.randn(2, 8, device="cuda")
    torch.testing.assert_close(fast(x), module(x), **CLOSE)
    (executable,) = fast._engine.ready.values()
    assert executable.stream == stream
    (inlet,) = executable.inlets
    assert list(inlet.known) == [(x.data_ptr(), x.shape)]


def test_calls_are_repeated_and_results_come_in_order():
    """Of a program that takes milliseconds: what torch does next waits for it, the caller does not."""
    module = torch.nn.Sequential(*(torch.nn.Linear(4096, 4096) for _ in range(8))).bfloat16()
    fast = compiled(module)
    inputs = [torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    expected = []
    for x in inputs:
        y = fast(x)
        torch.cuda.synchronize()
        expected.append(y.float().sum())
    assert fast._engine.repeated is not None and fast._engine.repeated.executable.outlet.stream is not None
    torch.cuda.synchronize()
    for stream in (torch.cuda.current_stream(), torch.cuda.Stream()):
        with torch.cuda.stream(stream):
            sums = [fast(x).float().sum() for x in inputs * 4]  # results are let go of while they are read
        torch.cuda.synchronize()
        assert sums == expected * 4


def test_while_a_graph_is_captured_torch_computes():
    """JAX's stream would wait for the captured one, and with it become part of the graph."""
    module = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU()).eval().cuda()
    fast, whole = zenith.torch.compile(module), zenith.compile(module, torch.randn(8, 64, device="cuda"))
    x = torch.randn(8, 64, device="cuda")
    for _ in range(3):
        fast(x), module(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with pytest.warns(FallbackWarning, match="capturing a CUDA graph"), torch.cuda.graph(graph):
        y = fast(x)
        with pytest.raises(FrontendError, match="capturing a CUDA graph"):
            whole(x)
    x.normal_()
    graph.replay()
    torch.testing.assert_close(y, module(x), **CLOSE)
    torch.testing.assert_close(fast(x), module(x), **CLOSE)
    torch.testing.assert_close(whole(x), module(x), **CLOSE)


def test_folded_filters_follow_what_is_written():
    """They lie in the order that XLA has chosen, and are made again when a batch norm or a filter changes."""
    module = torch.nn.Sequential(torch.nn.Conv2d(64, 64, 3, padding=1), torch.nn.BatchNorm2d(64), torch.nn.ReLU())
    fast = compiled(module)
    x = torch.randn(4, 64, 16, 16, device="cuda")
    for _ in range(3):
        torch.testing.assert_close(fast(x), module(x), **CLOSE)
    module[1].running_var.mul_(2)
    torch.testing.assert_close(fast(x), module(x), **CLOSE)
    module[0].weight.mul_(1.5)
    torch.testing.assert_close(fast(x), module(x), **CLOSE)


def test_the_backend_of_torch_compile():
    module = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.SiLU(), torch.nn.Linear(128, 64)).eval().cuda()
    from zenith_jax.frontends.torch import dynamo

    fast = torch.compile(module, backend=dynamo.zenith)
    x = torch.randn(8, 64, device="cuda")
    torch.testing.assert_close(fast(x), module(x), **CLOSE)
