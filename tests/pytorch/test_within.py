"""A compiled module inside of what torch does with modules: derivatives, traces, graphs, copies."""

import copy
import pickle
import warnings

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")

from torch.autograd import forward_ad

import zenith_jax as zenith
from zenith_jax.frontends.torch import dynamo
from zenith_jax.frontends.torch.errors import FallbackWarning, TorchError

CLOSE = dict(rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def module():
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.GELU()).eval()
    return layers.requires_grad_(False)


@pytest.fixture
def fast(module):
    """After calls that are answered the short way."""
    fast, x = zenith.torch.compile(module), torch.randn(2, 4)
    for _ in range(3):
        torch.testing.assert_close(fast(x), module(x), **CLOSE)
    return fast


@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated:DeprecationWarning")  # torch's own, of its jvp
def test_tangents_of_forward_mode_are_not_lost(module, fast):
    backend = torch.compile(module, backend=dynamo.zenith)
    strict = torch.compile(module, backend=dynamo.zenith, options={"strict": True})
    x, t = torch.randn(2, 4), torch.randn(2, 4)
    for _ in range(2):
        fast(x)
        backend(x)
        strict(x)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, t)
        wanted = forward_ad.unpack_dual(module(dual)).tangent
        with pytest.warns(FallbackWarning, match="forward-mode derivatives"):
            actual = forward_ad.unpack_dual(fast(dual)).tangent
        with warnings.catch_warnings():  # said once for each graph's name, in whichever test comes first
            warnings.simplefilter("ignore")
            of_backend = forward_ad.unpack_dual(backend(dual)).tangent
            with pytest.raises(TorchError, match="forward-mode derivatives"):
                strict(dual)
    torch.testing.assert_close(actual, wanted)
    torch.testing.assert_close(of_backend, wanted)


@pytest.mark.filterwarnings("ignore::zenith_jax.frontends.torch.errors.FallbackWarning")
def test_torchs_function_transforms(module, fast):
    x, t = torch.randn(2, 4), torch.randn(2, 4)
    torch.testing.assert_close(torch.func.vmap(fast)(x[:, None]), torch.func.vmap(module)(x[:, None]), **CLOSE)
    torch.testing.assert_close(torch.func.jvp(fast, (x,), (t,)), torch.func.jvp(module, (x,), (t,)), **CLOSE)
    gradient = torch.func.grad(lambda x: fast(x).sum())(x)
    torch.testing.assert_close(gradient, torch.func.grad(lambda x: module(x).sum())(x), **CLOSE)


@pytest.mark.filterwarnings("ignore::zenith_jax.frontends.torch.errors.FallbackWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated:DeprecationWarning")
@pytest.mark.parametrize("record", [lambda f, x: torch.export.export(f, (x,)).module(), torch.jit.trace])
def test_a_recording_is_of_the_modules_operators(module, fast, record):
    recorded = record(fast, torch.randn(2, 4))
    x = torch.randn(2, 4)
    torch.testing.assert_close(recorded(x), module(x), **CLOSE)


@pytest.mark.parametrize("is_warm", [False, True])
def test_an_outer_compile_calls_it_between_its_graphs(module, is_warm):
    fast, x = zenith.torch.compile(module, strict=True), torch.randn(2, 4)
    if is_warm:
        for _ in range(2):
            fast(x)
    outer = torch.compile(lambda x: fast(x * 2) + 1, backend="eager")
    for _ in range(2):
        torch.testing.assert_close(outer(x), module(x * 2) + 1, **CLOSE)
    assert fast.compilations == (1, 1)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_has_weights_of_its_own_and_compiles_again(module, fast, copied):
    fast = zenith.torch.compile(copy.deepcopy(module), strict=True)
    fast.register_forward_hook(_doubled)
    other, x = copied(fast), torch.randn(2, 4)
    torch.testing.assert_close(other(x), 2 * module(x), **CLOSE)
    assert other.compilations == (1, 1)
    fast.module[0].weight.zero_()
    torch.testing.assert_close(other(x), 2 * module(x), **CLOSE)
    assert [*other.state_dict()] == [*module.state_dict()] and other.get_submodule("0") is other.module[0]


def _doubled(module, args, result):
    return 2 * result
