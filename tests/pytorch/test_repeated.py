"""Calls like an earlier one take a short way, and only these: whatever has changed is seen."""

import gc
import threading
import weakref

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")

import zenith_jax as zenith
from zenith_jax.frontends.torch import dynamo, exchange
from zenith_jax.frontends.torch.errors import FallbackWarning, TorchError
from zenith_jax.frontends.torch.repeated import MISSED

CPU = jax.devices("cpu")[0]

pytestmark = pytest.mark.skipif(exchange.watch() is None, reason="torch before 2.10 has no C exchange API")


@pytest.fixture(autouse=True)
def inference():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


class Small(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(8, 8)
        self.norm = torch.nn.LayerNorm(8)

    def forward(self, x):
        return self.norm(self.linear(x)) * 2


@pytest.fixture(scope="module")
def fast():
    return zenith.torch.compile(Small().eval(), dynamic=False, strict=True)


def is_repeated(fast, *args):
    repeated = fast._engine.repeated
    return repeated is not None and repeated.call(args) is not MISSED


def check(fast, x):
    torch.testing.assert_close(fast(x), fast.module(x), rtol=1e-4, atol=1e-5)


def test_the_second_call_is_short_whatever_tensors_come_in_turn(fast):
    tensors = [torch.randn(4, 8) for _ in range(5)]
    for x in tensors * 2:
        check(fast, x)
    assert all(is_repeated(fast, x) for x in tensors)
    tensors[0].mul_(3)  # the same memory, other values
    check(fast, tensors[0])


def test_other_inputs_take_the_usual_way(fast):
    x = torch.randn(8, 8)
    check(fast, x)
    assert is_repeated(fast, x)
    for other in (x.t(), torch._neg_view(x), x[:4], x.double(), torch.nn.Parameter(x.clone()), x.to_sparse(), x[None]):
        assert not is_repeated(fast, other)
    assert not is_repeated(fast) and not is_repeated(fast, x, x) and not is_repeated(fast, 3)
    check(fast, x.t())
    check(fast, torch._neg_view(x))
    check(fast, x)
    with torch.autocast("cpu", torch.bfloat16):
        assert not is_repeated(fast, x)
        assert fast(x).dtype == fast.module(x).dtype
    check(fast, x)


@pytest.mark.parametrize("frozen", [False, True])
def test_weights_that_change_are_seen(frozen):
    module = Small().eval()
    fast = zenith.torch.compile(module, dynamic=False, strict=True, frozen=frozen)
    x = torch.randn(4, 8)
    check(fast, x)
    assert is_repeated(fast, x)
    module.linear.weight.mul_(2)
    check(fast, x)
    if frozen:
        return
    for change in (
        lambda: setattr(module.linear, "weight", torch.nn.Parameter(torch.randn(8, 8))),
        lambda: setattr(module.norm.bias, "data", torch.randn(8)),
        lambda: module.load_state_dict({k: torch.randn_like(v) for k, v in module.state_dict().items()}, assign=True),
    ):
        change()
        assert not is_repeated(fast, x)
        check(fast, x)
        check(fast, x)
        assert is_repeated(fast, x)
    module.norm.train()
    assert not is_repeated(fast, x)


def test_the_backend_repeats_and_sees_replaced_weights(monkeypatch):
    module = Small().eval()
    seen = []

    def backend(graph_module, inputs):
        seen.append(dynamo.zenith(graph_module, inputs, options=dict(strict=True)))
        return seen[-1]

    fast = torch.compile(module, backend=backend)
    x = torch.randn(4, 8)
    for _ in range(3):
        torch.testing.assert_close(fast(x), module(x), rtol=1e-4, atol=1e-5)
    (graph,) = seen
    assert len(graph.weight_positions) == 4 and graph.repeated.count == 5
    with monkeypatch.context() as patch:  # what the usual way begins with
        patch.setattr(graph, "module", None)
        patch.setattr(dynamo, "_WithWeights", None)
        torch.testing.assert_close(fast(x), module(x), rtol=1e-4, atol=1e-5)
    module.linear.weight = torch.nn.Parameter(torch.randn(8, 8))
    module.norm.bias.add_(1)
    for _ in range(3):
        torch.testing.assert_close(fast(x), module(x), rtol=1e-4, atol=1e-5)


def test_results_keep_their_memory(fast):
    x = torch.randn(4, 8)
    kept = [fast(x * i) for i in range(8)]
    views = [k[1:] for k in kept]
    expected = [fast.module(x * i)[1:] for i in range(8)]
    del kept
    gc.collect()
    for _ in range(8):
        fast(torch.randn(4, 8))
    torch.testing.assert_close(views, expected, rtol=1e-4, atol=1e-5)
    thread = threading.Thread(target=views.clear)  # results die on any thread
    thread.start()
    thread.join()


def test_a_module_that_holds_what_was_compiled_of_it_is_collected():
    module = Small().eval()
    x = torch.randn(4, 8)
    module.__dict__["fast"] = fast = zenith.torch.compile(module, dynamic=False, strict=True)
    fast(x)
    assert is_repeated(fast, x)
    dead = weakref.ref(module.linear)
    del module, fast
    gc.collect()
    assert dead() is None


def test_without_the_interface_every_call_takes_the_usual_way(monkeypatch):
    monkeypatch.setattr(exchange, "_exchange", lambda: None)
    fast = zenith.torch.compile(Small().eval(), dynamic=False, strict=True)
    x = torch.randn(4, 8)
    for _ in range(3):
        check(fast, x)
    assert fast._engine.repeated is None


def test_another_version_of_the_interface_is_refused():
    from zenith_jax import native

    with pytest.raises(ValueError, match="version 1 of DLPack"):
        native.module("cpu").Exchange(torch.Tensor, _capsule_of_version(7))


def _capsule_of_version(major):
    import ctypes

    memory = (ctypes.c_uint64 * 8)(major)
    new = ctypes.pythonapi.PyCapsule_New
    new.restype, new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    capsule = new(ctypes.addressof(memory), b"dlpack_exchange_api", None)
    _capsule_of_version.kept = memory
    return capsule


def test_a_weight_that_is_turned_in_place_is_seen():
    fast = zenith.torch.compile(Small().eval(), dynamic=False, strict=True)
    x, weight = torch.randn(4, 8), fast.module.linear.weight
    for _ in range(3):
        check(fast, x)
    weight.data = weight.data.t()  # the same address, and no write that torch counts
    check(fast, x)
    weight.t_()
    check(fast, x)


def test_counters_of_batch_norms_are_not_looked_at():
    module = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.BatchNorm1d(8)).eval()
    fast = zenith.torch.compile(module, dynamic=False, strict=True)
    x = torch.randn(4, 8)
    for _ in range(3):
        check(fast, x)
    module[1].num_batches_tracked.add_(1)
    module[1].num_batches_tracked = torch.zeros(3)
    assert is_repeated(fast, x)
    module[1].running_mean.add_(1)
    check(fast, x)


class OfShapes(torch.nn.Module):
    """Its results depend on tensors that no operation reads."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(8, 8)
        self.register_buffer("table", torch.zeros(3))
        self.register_buffer("like", torch.zeros(1))

    def forward(self, x):
        return (self.linear(x) * self.table.shape[0]).to(self.like.dtype)


def test_shapes_and_dtypes_of_tensors_that_nothing_reads_are_seen():
    fast = zenith.torch.compile(OfShapes().eval(), dynamic=False)
    x = torch.randn(4, 8)
    for _ in range(3):
        check(fast, x)
    fast.module.table = torch.zeros(5)
    check(fast, x)
    fast.module.like = torch.zeros(1, dtype=torch.float64)
    check(fast, x)


def test_a_submodule_that_is_replaced_is_seen():
    fast = zenith.torch.compile(Small().eval(), dynamic=False, strict=True)
    x = torch.randn(4, 8)
    for _ in range(3):
        check(fast, x)
    fast.module.linear = torch.nn.Linear(8, 8)
    check(fast, x)
    fast.module.linear = torch.nn.Linear(8, 8, bias=False)
    check(fast, x)


@pytest.mark.parametrize("frozen", [False, True])
def test_modules_of_one_class_that_share_a_graph_keep_their_weights(frozen):
    torch._dynamo.reset()
    modules = [Small().eval() for _ in range(3)]
    options = {"frozen": frozen, "strict": True}
    compiled = [torch.compile(m, backend=dynamo.zenith, options=options, dynamic=False) for m in modules]
    x = torch.randn(4, 8)
    for _ in range(3):
        for fast, module in zip(compiled, modules, strict=True):
            torch.testing.assert_close(fast(x), module(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float8_e5m2", "float8_e4m3fn"])
def test_results_of_types_that_numpy_does_not_know(dtype):
    class Narrow(torch.nn.Module):
        def forward(self, x):
            return (x * 2).to(getattr(torch, dtype))

    fast, x = zenith.torch.compile(Narrow().eval(), dynamic=False), torch.randn(4, 8)
    for _ in range(3):
        torch.testing.assert_close(fast(x).float(), Narrow()(x).float(), rtol=0, atol=0)


def test_tensors_without_memory_are_left_to_torch():
    module = Small().eval()
    fast, x = zenith.torch.compile(module, dynamic=False), torch.randn(4, 8)
    check(fast, x)
    with pytest.warns(FallbackWarning, match="torch.func"):
        found = torch.func.functionalize(fast)(x)
    torch.testing.assert_close(found, module(x))
    with pytest.warns(FallbackWarning, match="without memory"):
        found = fast(torch._efficientzerotensor((4, 8)))
    torch.testing.assert_close(found, module(torch.zeros(4, 8)))


def test_results_in_any_structure():
    class Structured(torch.nn.Module):
        def forward(self, x):
            a, b = torch.relu(x), torch.tanh(x)
            return self.form(a, b)

    x = torch.randn(4, 8)
    for form in (
        lambda a, b: (a, b),
        lambda a, b: (b, a),
        lambda a, b: (a,),
        lambda a, b: [a, b],
        lambda a, b: {"b": b, "a": (a, b + 1)},
    ):
        module = Structured()
        module.form = form
        fast = zenith.torch.compile(module, dynamic=False, strict=True)
        for _ in range(3):
            actual, expected = fast(x), module(x)
            assert type(actual) is type(expected)
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
        assert is_repeated(fast, x)


@pytest.mark.filterwarnings("ignore:`torch.jit.trace` is deprecated")
def test_what_torch_is_doing_is_looked_at(fast):
    x = torch.randn(4, 8)
    for _ in range(2):
        check(fast, x)
    assert is_repeated(fast, x)
    with torch.autograd.forward_ad.dual_level():
        assert not is_repeated(fast, x)
        with pytest.raises(TorchError, match="forward-mode"):
            fast(x)
    is_short = []
    torch.func.vmap(lambda y: is_short.append(is_repeated(fast, x)) or y)(x)
    torch.jit.trace(lambda y: is_short.append(is_repeated(fast, x)) or y, (x,), check_trace=False)
    assert is_short[:2] == [False, False]
    assert is_repeated(fast, x)


def test_the_order_around_a_program_of_a_gpu():
    """In place of a GPU: what orders the streams comes before and after the program, whose results nobody waits for."""

    class Result:
        def unsafe_buffer_pointer(self):
            done.append("pointer")
            return y.unsafe_buffer_pointer()

    x, y = torch.zeros(4, 8), jax.device_put(np.arange(32.0, dtype=np.float32).reshape(4, 8), CPU)
    inlet = exchange.inlet(0, np.dtype("float32"), CPU, (4, 8))
    inlet.keep(x.data_ptr(), y)
    done, refusing = [], [False]
    holder = {"weight": torch.zeros(4)}
    weight, watch = holder["weight"], exchange.watch()
    watch.tensor(holder, "weight", weight, weight.data_ptr())
    watch.version(weight, weight._version)

    def before():
        done.append("before")
        return refusing[0]

    call = exchange.repeated(
        inlets=[inlet],
        outlets=[exchange.outlet(y)],
        watch=watch,
        count=1,
        refusals=(lambda: done.append("refusals"),),
        run=lambda inputs: done.append("run") or [Result() for x in inputs if x is y],
        before=before,
        after=lambda: done.append("after"),
        packed=None,
        missed=MISSED,
    )
    np.testing.assert_array_equal(call((x,)).numpy(), y)
    assert done == ["refusals", "before", "run", "after", "pointer"]
    done.clear()
    refusing[0] = True
    assert call((x,)) is MISSED and done == ["refusals", "before"]
    refusing[0] = False
    done.clear()
    weight.add_(1)  # what is written is found while the device computes, and the results are dropped
    assert call((x,)) is MISSED and done == ["refusals", "before", "run"]
    done.clear()
    holder["weight"] = torch.zeros(4)  # another object is found before
    assert call((x,)) is MISSED and done == ["refusals"]
    assert call((torch.zeros(4, 8),)) is MISSED and call(()) is MISSED and call((x, x)) is MISSED


@pytest.mark.parametrize("count", [0, 1, 3])
def test_another_number_of_results_is_refused(count):
    x, y = torch.zeros(4, 8), jax.device_put(np.ones((4, 8), np.float32), CPU)
    inlet = exchange.inlet(0, np.dtype("float32"), CPU, (4, 8))
    inlet.keep(x.data_ptr(), y)
    call = exchange.repeated(
        inlets=[inlet],
        outlets=[exchange.outlet(y)] * 2,
        watch=exchange.watch(),
        count=1,
        refusals=(),
        run=lambda inputs: [y] * count,
        before=None,
        after=None,
        packed=tuple,
        missed=MISSED,
    )
    with pytest.raises(ValueError, match="results than before"):
        call((x,))
