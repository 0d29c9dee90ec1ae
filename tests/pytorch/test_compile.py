"""zenith.torch.compile: the same answers as torch, for all that a call can be."""

import threading
import warnings

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("onnxscript")
from torch.multiprocessing.reductions import StorageWeakRef

import zenith_jax as zenith
from zenith_jax.errors import FrontendError
from zenith_jax.frontends.torch.errors import FallbackWarning, TorchError

SIZES = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128)
# A few hundred float32 roundings of values of size 1.
CLOSE = dict(rtol=1e-4, atol=1e-5)


@pytest.fixture(autouse=True)
def inference():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def compiled(module, **options):
    return zenith.torch.compile(module.eval(), strict=True, **options)


def same(actual, expected):
    """Equal structure, types, dtypes and values."""
    a, spec_a = torch.utils._pytree.tree_flatten(actual)
    b, spec_b = torch.utils._pytree.tree_flatten(expected)
    assert spec_a == spec_b
    for x, y in zip(a, b, strict=True):
        if isinstance(y, torch.Tensor):
            torch.testing.assert_close(x, y, **(CLOSE if y.dtype == torch.float32 else {}))
        else:
            assert x == y


def ids(batch=2, length=12):
    return torch.randint(0, 100, (batch, length))


def bert():
    return transformers.BertModel(transformers.BertConfig(vocab_size=100, **SIZES))


def test_bert_at_several_sizes_is_exported_once():
    module = bert()
    fast = compiled(module)
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[1, 9:] = 0
    tokens = ids()
    same(fast(tokens, attention_mask=mask), module(tokens, attention_mask=mask))
    assert fast.report.counts() == {"layer_norm": 1, "add_layer_norm": 4, "attention": 2, "gelu_erf": 2}
    same(fast(tokens[:, :5], attention_mask=mask[:, :5]), module(tokens[:, :5], attention_mask=mask[:, :5]))
    more = tokens.repeat(2, 1)
    same(fast(more, attention_mask=mask.repeat(2, 1)), module(more, attention_mask=mask.repeat(2, 1)))
    same(fast(tokens, attention_mask=mask), module(tokens, attention_mask=mask))
    assert fast.compilations == (1, 3)


def test_a_size_that_was_one_at_export_is_exported_again():
    module = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.GELU(), torch.nn.Linear(8, 3))
    fast = compiled(module)
    for batch in (1, 2, 5, 1):
        x = torch.randn(batch, 4)
        same(fast(x), module(x))
    assert fast.compilations == (2, 3)


def test_gpt2_and_llama():
    for module, found in (
        (
            transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=100, n_embd=64, n_layer=2, n_head=4)),
            "gelu_tanh",
        ),
        (
            transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=100, num_key_value_heads=2, **SIZES)),
            "gated_silu",
        ),
    ):
        module.config.use_cache = False
        fast = compiled(module)
        tokens = ids()
        same(fast(input_ids=tokens), module(input_ids=tokens))
        counts = fast.report.counts()
        assert counts["attention"] == 2 and counts[found] == 2, fast.report


def test_cnn_with_batch_norm_in_channels_last():
    module = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, bias=False), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.MaxPool2d(2),
        torch.nn.Flatten(), torch.nn.Linear(8 * 9, 5),
    )  # fmt: skip
    module.train()(torch.randn(16, 3, 8, 8))  # statistics that are not 0 and 1
    module.eval()
    fast = compiled(module)
    for x in (torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)):
        same(fast(x), module(x))


def test_lstm_with_its_states():
    module = torch.nn.LSTM(6, 5, num_layers=2, batch_first=True)
    fast = compiled(module)
    x, state = torch.randn(2, 4, 6), (torch.randn(2, 2, 5), torch.randn(2, 2, 5))
    same(fast(x, state), module(x, state))
    same(fast(x), module(x))


class Nested(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)

    def forward(self, x, others, *, scale=1.0, flag=True, extra=None):
        y = self.linear(x) * scale
        for key in sorted(others):
            y = y + others[key][0]
        y = y + extra if extra is not None else y
        return {"y": y, "again": [y, (None, 3, "text")], "positive": y > 0, "x": x, "first": x[0], "n": y.argmax(-1)}


def test_nested_arguments_and_results():
    module = Nested().eval()
    fast = compiled(module)
    x, others = torch.randn(3, 4), {"a": (torch.randn(3, 4),), "b": (torch.randn(3, 4),)}
    for options in (dict(), dict(scale=2.5), dict(flag=False, extra=torch.randn(3, 4))):
        result = fast(x, others, **options)
        same(result, module(x, others, **options))
        # What is one tensor stays one tensor, and what shares memory shares it.
        assert result["x"] is x and result["y"] is result["again"][0]
        assert result["first"].data_ptr() == x.data_ptr()
        assert result["n"].dtype == torch.int64


class Counting(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x):
        self.calls += 1
        self.mean = 0.5 * self.mean + 0.5 * x.mean(0)
        return self.linear(x) + self.mean + self.calls


def test_buffers_written_in_place_keep_their_values():
    module, plain = Counting().eval(), Counting().eval()
    plain.load_state_dict(module.state_dict())
    fast = compiled(module)
    for _ in range(3):
        x = torch.randn(2, 4)
        same(fast(x), plain(x))
    assert module.calls == 3
    same(dict(module.named_buffers()), dict(plain.named_buffers()))


class Writes(torch.nn.Module):
    def forward(self, x, y):
        x.mul_(2).add_(y)
        return x.sum() + y, x


def test_an_input_written_in_place_is_written():
    x, y = torch.randn(3, 4), torch.randn(4)
    expected = x.clone()
    value, _ = Writes()(expected, y)
    fast = compiled(Writes())
    actual = x.clone()
    result = fast(actual, y)
    same(actual, expected)
    same(result[0], value)
    assert result[1] is actual
    strided = torch.stack([x, x], -1)[..., 0]
    fast(strided, y)
    same(strided, expected)
    both = torch.randn(4)
    with pytest.raises(TorchError, match="shares its memory"):
        compiled(Writes())(both, both)


def test_weights_are_torchs_own_memory():
    module = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.LayerNorm(64)).eval()
    fast = compiled(module)
    x = torch.randn(2, 32)
    fast(x)
    (program,) = next(iter(fast._engine.programs.values()))
    pointers = {a.unsafe_buffer_pointer() for a in program.weights.arrays}
    assert pointers == {p.data_ptr() for p in module.parameters()}
    assert fast.copied_weights == []
    module[0].weight.mul_(3)  # in place: seen
    same(fast(x), module(x))
    module[0].weight = torch.nn.Parameter(torch.randn(64, 32))  # replaced: found
    same(fast(x), module(x))
    module.load_state_dict({k: torch.randn_like(v) for k, v in module.state_dict().items()}, assign=True)
    same(fast(x), module(x))
    assert fast.compilations == (1, 1)
    module.to(torch.bfloat16)  # other code
    # A product of 32 terms and a norm, whose results are rounded to 8 bits.
    torch.testing.assert_close(fast(x.bfloat16()), module(x.bfloat16()), rtol=0.05, atol=0.02)


def test_what_is_made_of_weights_once_is_made_again_when_they_change():
    """Filters in XLA's order, on a CPU, and batch norms."""
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.Flatten()).eval()
    x = torch.randn(2, 3, 6, 6)
    for frozen in (False, True):
        fast = compiled(module, frozen=frozen)
        same(fast(x), module(x))
        assert next(iter(fast._engine.ready.values())).folded is not None
        module[0].weight.mul_(3)
        same(fast(x), module(x))
        module.load_state_dict(
            {k: torch.rand_like(v) if v.is_floating_point() else v for k, v in module.state_dict().items()}
        )
        same(fast(x), module(x))
    fast = compiled(module)
    same(fast(x), module(x))
    module[0].weight = torch.nn.Parameter(torch.randn(8, 3, 3, 3))
    same(fast(x), module(x))


def test_a_weight_that_is_not_aligned_is_copied_and_followed():
    module = torch.nn.Linear(8, 8).eval()
    flat = torch.randn(65)
    module.weight = torch.nn.Parameter(flat[1:].view(8, 8))
    fast = compiled(module)
    x = torch.randn(2, 8)
    same(fast(x), module(x))
    assert fast.copied_weights == ["weight"]
    module.weight.mul_(2)
    same(fast(x), module(x))


def test_a_constant_buffer_that_changes_is_seen():
    class Positions(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("order", torch.tensor([2, 0, 1]))
            self.offset = torch.ones(3)

        def forward(self, x):
            return x[self.order] + self.offset

    module = Positions()
    fast = compiled(module)
    x = torch.randn(3)
    same(fast(x), module(x))
    module.order.copy_(torch.tensor([0, 1, 2]))
    module.offset.add_(1)
    same(fast(x), module(x))


def test_autocast_is_part_of_the_call():
    module = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.GELU(), torch.nn.Linear(64, 8)).eval()
    fast = compiled(module)
    x = torch.randn(4, 32)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=dtype):
            actual, expected = fast(x), module(x)
        assert actual.dtype == dtype
        # Two products of 32 and 64 terms whose operands are rounded to 8 bits.
        torch.testing.assert_close(actual, expected, rtol=0.05, atol=0.02)
    same(fast(x), module(x))


class Sums(torch.nn.Module):
    def forward(self, x):
        return x * 2 + 1, x.sum(-1)


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(4, 6).t(),
        torch.randn(4, 12)[:, ::2],
        torch.randn(5)[1:],
        torch.randn(1, 4).expand(3, 4),
        torch.randn(0, 3),
        torch.randn(2, 3, requires_grad=True),
        torch.arange(6).view(2, 3),
        torch.arange(12)[::3],
        torch.randn(2, 3, dtype=torch.float64),
        torch.randn(2, 3).half(),
        torch.randn(2, 3).bfloat16(),
        torch.arange(4, dtype=torch.uint8),
        torch.arange(4, dtype=torch.int16),
    ],
    ids=lambda x: f"{x.dtype}-{tuple(x.shape)}-{x.stride()}",
)
def test_tensors_of_any_layout_and_dtype(x):
    actual, expected = compiled(Sums())(x), Sums()(x)
    if x.is_floating_point() and x.dtype.itemsize == 2:
        # XLA rounds x*2+1 once where torch rounds twice.
        torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2)
    else:
        same(actual, expected)


def test_an_input_that_is_given_again_is_read_again():
    module = torch.nn.Linear(8, 8).eval()
    fast = compiled(module)
    x = torch.randn(2, 8)
    for _ in range(3):
        same(fast(x), module(x))
        x.mul_(2)  # the very tensor, with other values
    x.data = torch.randn(2, 8)  # with other memory
    same(fast(x), module(x))
    x.set_(torch.randn(8, 2).T)  # and other strides
    same(fast(x), module(x))


def test_a_call_that_takes_long_is_waited_for_without_pythons_lock():
    """The first result's address was asked for while it was computed: a deadlock, where that lets go of a tensor."""
    module = torch.nn.Sequential(*(torch.nn.Linear(512, 512) for _ in range(4))).eval()
    fast = compiled(module)
    for rows in (2048, 1024):
        x = torch.randn(rows, 512)
        same(fast(x), module(x))


def test_memory_of_an_input_is_not_kept():
    fast = compiled(torch.nn.Linear(8, 8))
    fast(torch.randn(2, 8))  # which the export keeps
    x = torch.randn(2, 8)
    fast(x)
    memory = StorageWeakRef(x.untyped_storage())
    del x
    assert memory.expired()


def test_memory_that_torch_gives_out_again_is_read_again():
    """Arrays are kept by address: with other values there, and other shapes and strides."""
    module = torch.nn.Linear(8, 8).eval()
    fast = compiled(module)
    flat = torch.randn(64)
    for shape in ((2, 8), (8, 8), (2, 8)):
        flat.mul_(2)
        x = flat[: shape[0] * shape[1]].view(shape)
        same(fast(x), module(x))
    square = flat.view(8, 8)
    same(fast(square), module(square))
    square.t_()  # the very tensor
    same(fast(square), module(square))
    for _ in range(100):  # more addresses than are kept
        x = torch.randn(2, 8)
        flat = [flat, x]
        same(fast(x), module(x))


def test_a_view_that_torch_negates_when_it_is_read():
    fast = compiled(Sums())
    x = torch.randn(3, 4, dtype=torch.complex64).conj().imag
    assert x.is_neg()
    for given in (x.clone(), x):
        same(fast(given), Sums()(given))


def test_scalars_cross():
    class Scalar(torch.nn.Module):
        def forward(self, x, n):
            return x * n, n + 1

    x, n = torch.tensor(1.5), torch.tensor(7)
    same(compiled(Scalar())(x, n), Scalar()(x, n))


def test_float64_is_computed_in_64_bits():
    module = torch.nn.Linear(64, 64).double().eval()
    x = torch.randn(8, 64, dtype=torch.float64)
    torch.testing.assert_close(compiled(module)(x), module(x), rtol=1e-12, atol=1e-12)


def test_integers_beyond_32_bits_are_not_cut():
    with pytest.raises(TorchError, match="jax_enable_x64"):
        compiled(Sums())(torch.tensor([1, 2**40]))


def test_new_outputs_are_new_memory():
    class Copies(torch.nn.Module):
        def forward(self, x):
            return x + 0, x * 1

    x = torch.randn(64, 64)
    fast = compiled(Copies())
    for _ in range(2):
        first, second = fast(x)
        assert len({x.data_ptr(), first.data_ptr(), second.data_ptr()}) == 3
        first.zero_()
        assert second.abs().sum() > 0


def test_a_thousand_calls_from_four_threads():
    module = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.GELU(), torch.nn.Linear(32, 4)).eval()
    fast = compiled(module)
    wrong = []

    def work(seed):
        with torch.no_grad(), zenith.configured(use_cost=False):
            generator = torch.Generator().manual_seed(seed)
            for i in range(250):
                x = torch.randn(2 + (i + seed) % 3, 16, generator=generator)
                if not torch.allclose(fast(x), module(x), **CLOSE):
                    wrong.append((seed, i))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong
    assert fast.compilations == (1, 3)


def falls_back(module, *args, match, **kwargs):
    """The module's own result and one warning, however often it is called; an error if strict."""
    torch.manual_seed(1)
    expected = module(*args, **kwargs)
    fast = zenith.torch.compile(module)
    torch.manual_seed(1)
    with pytest.warns(FallbackWarning, match=match):
        same(fast(*args, **kwargs), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fast(*args, **kwargs)
    with pytest.raises(TorchError, match=match):
        zenith.torch.compile(module, strict=True)(*args, **kwargs)


class WithBatchNorm(torch.nn.Sequential):
    """Named so that its warning is not another test's."""


class WithDropout(torch.nn.Sequential):
    pass


class WithLstm(torch.nn.Sequential):
    pass


def test_training_mode_is_not_exported_as_inference():
    x = torch.randn(8, 4)
    falls_back(WithBatchNorm(torch.nn.BatchNorm1d(4)).train(), x, match="statistics of the batch.*eval")
    falls_back(WithDropout(torch.nn.Dropout(0.5)).train(), x, match="dropout draws random numbers.*eval")
    falls_back(WithLstm(torch.nn.LSTM(4, 4, 2, dropout=0.5)).train(), x, match="lstm draws random numbers")
    module = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(0.5)).eval()
    fast = zenith.torch.compile(module)
    same(fast(x), module(x))
    module[1].train()  # a part of it, after it was compiled
    with pytest.warns(FallbackWarning, match="dropout"):
        fast(x)


def test_training_runs_in_torch_and_says_so():
    class Trained(torch.nn.Linear):
        pass

    module = Trained(4, 4)
    fast = zenith.torch.compile(module)
    x = torch.randn(2, 4)
    with torch.enable_grad(), pytest.warns(FallbackWarning, match="a parameter requires them.*inference_mode"):
        fast(x).sum().backward()
    assert module.weight.grad is not None
    with torch.enable_grad(), pytest.raises(TorchError, match="an input requires them"):
        compiled(torch.nn.GELU())(torch.randn(3, requires_grad=True))
    with torch.enable_grad():
        compiled(torch.nn.GELU())(x)  # nothing requires any


def test_a_device_without_autocast_is_torchs():
    fast = zenith.torch.compile(torch.nn.Linear(4, 4).eval())
    with (
        pytest.warns(FallbackWarning, match="runs in torch"),
        pytest.raises(RuntimeError, match="expected device meta"),
    ):
        fast(torch.ones(2, 4, device="meta"))


def test_what_cannot_be_exported_falls_back_with_the_reason():
    class Branches(torch.nn.Module):
        def forward(self, x):
            return x + 1 if x.sum() > 0 else x * 2

    class Bessel(torch.nn.Module):
        def forward(self, x):
            return torch.special.bessel_j0(x)

    class Noise(torch.nn.Module):
        def forward(self, x):
            return x + torch.randn_like(x)

    class Configured(torch.nn.Module):
        def forward(self, x, options):
            return x * options.scale

    x = torch.randn(3)
    falls_back(Branches(), x, match="cannot capture it.*data-dependent")
    falls_back(Bessel(), x, match="operator prims.bessel_j0 has no ONNX form")
    falls_back(Noise(), x, match="randn_like draws random numbers")
    falls_back(Configured(), x, type("Options", (), {"scale": 2})(), match="argument of type Options")


def test_a_wrong_call_raises_what_torch_raises():
    module = torch.nn.Linear(4, 4).eval()
    fast = zenith.torch.compile(module)
    with pytest.raises(RuntimeError, match="mat1 and mat2"), warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        fast(torch.randn(2, 5))
    assert fast(torch.randn(2, 4)).shape == (2, 4)


def test_the_compiled_module_is_the_module():
    module = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout()).eval()
    module.note = "kept"
    fast = zenith.torch.compile(module)
    assert list(fast.state_dict()) == list(module.state_dict())
    assert fast.note == "kept" and fast.get_submodule("0") is module[0]
    assert not fast.train().eval().training and not module[1].training
    outer = torch.nn.ModuleDict({"inner": fast})
    assert list(outer.state_dict()) == ["inner.0.weight", "inner.0.bias"]
    outer.load_state_dict({k: torch.zeros_like(v) for k, v in outer.state_dict().items()})
    x = torch.randn(2, 4)
    assert not fast(x).any()
    outer.double()
    assert fast(x.double()).dtype == torch.float64


def test_frozen_weights_may_still_change_in_place():
    module = torch.nn.Linear(4, 4).eval()
    fast = compiled(module, frozen=True)
    x = torch.randn(2, 4)
    same(fast(x), module(x))
    module.weight.add_(1)
    same(fast(x), module(x))


def test_inference_mode():
    module = torch.nn.Linear(4, 4).eval()
    fast = compiled(module)
    with torch.inference_mode():
        x = torch.randn(2, 4)
        same(fast(x), module(x))


def test_what_is_no_module_is_refused():
    with pytest.raises(FrontendError, match="got function"):
        zenith.torch.compile(lambda x: x)
