"""On a GPU XLA chooses in what order filters lie, and convolutions are in CUDA graphs where host time counts."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import zenith_jax as zenith
from zenith_jax.ir import _compat

FILTERS = (jnp.cos(jnp.arange(3 * 3 * 8 * 16.0)).reshape(3, 3, 8, 16), jnp.sin(jnp.arange(64 * 16.0)).reshape(64, 16))
X = np.sin(np.arange(2 * 8 * 8 * 8, dtype=np.float32)).reshape(2, 8, 8, 8)
CONVOLUTIONS = "xla_gpu_enable_command_buffer"


def convolved(params, x):
    y = jax.lax.conv_general_dilated(x, params[0], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return jnp.max(y, axis=(1, 2)) @ params[1].T


def filters_lie(form):
    """What stands in for _compat.free_layouts: `form(array)` is the format of a filter."""
    return lambda structs, _: [form(x) if x.ndim == 4 else None for x in structs]


def test_programs_with_convolutions_have_them_in_graphs(monkeypatch):
    lowered = jax.jit(lambda p, x: jax.jit(convolved)(p, x)).lower(FILTERS, X)  # inside of a function that is called
    without = jax.jit(lambda x: x @ x).lower(X)
    assert _compat.least_launches(lowered, "cpu") is None
    assert "CONVOLUTION" in _compat.least_launches(lowered, "cuda")[CONVOLUTIONS].split(",")
    assert CONVOLUTIONS not in _compat.least_launches(without, "cuda")
    monkeypatch.setenv("XLA_FLAGS", f"--{CONVOLUTIONS}=FUSION")  # the user knows better
    assert CONVOLUTIONS not in _compat.least_launches(lowered, "cuda")


def test_only_filters_of_a_gpu_are_free():
    large = jax.ShapeDtypeStruct((3, 3, 2048, 2048), np.float32)
    assert _compat.free_layouts([*FILTERS, large], "cpu") is None
    assert _compat.free_layouts(FILTERS[1:], "cuda") is None
    integers = FILTERS[0].astype(jnp.int8)
    free, *others = _compat.free_layouts([*FILTERS, large, integers], "cuda")
    assert free.layout is Layout.AUTO and others == [None, None, None]


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_answers_and_parameters_stay_whatever_order_is_chosen(mode, monkeypatch, tmp_path):
    """An order that no CPU chooses by itself."""
    order = Layout((2, 3, 0, 1))
    seen = []

    def free_layouts(structs, platform):
        seen.append([x.ndim for x in structs])
        return filters_lie(lambda x: Format(order, x.sharding))(structs, platform)

    monkeypatch.setattr(_compat, "free_layouts", free_layouts)
    monkeypatch.setattr("zenith_jax.compiled.program.CONSTANT_BYTES", 0)
    compiled = zenith.compile((convolved, FILTERS), X, mode=mode)
    assert any(4 in ranks for ranks in seen)
    if mode == "default":
        (program,) = compiled.programs.values()
        assert [a.format.layout.major_to_minor for a in program.args[0] if a.ndim == 4] == [order.major_to_minor]
    want = convolved(FILTERS, X)
    np.testing.assert_allclose(compiled(X), want, rtol=1e-5, atol=1e-5)  # sums of 72 terms of size 1
    np.testing.assert_array_equal(compiled.params[0], FILTERS[0])
    loaded = zenith.load(compiled.save(tmp_path / "m.zenith"))
    np.testing.assert_allclose(loaded(X), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_programs_of_all_sizes_read_the_same_copy(mode, monkeypatch):
    order = Layout((2, 3, 0, 1))
    monkeypatch.setattr(_compat, "free_layouts", filters_lie(lambda x: Format(order, x.sharding)))
    shape = (3, 3, 8, 96)  # of no other array in this process, and more than is made a constant
    last = jnp.ones((4, 96))
    model = zenith.compile((convolved, (jnp.ones(shape), last)), X, mode=mode, dynamic={"batch": (1, 2, 4)})
    # A GPU takes TensorFloat-32, and another order of summation for each batch.
    np.testing.assert_allclose(model(X)[0], model(X[:1])[0], rtol=1e-3)
    assert sum(a.shape == shape for a in jax.live_arrays()) == 2  # the parameter and one copy


def test_parameters_may_lie_anywhere(monkeypatch):
    """A filter over two devices, a bias that is nowhere in particular."""
    monkeypatch.setattr(_compat, "free_layouts", filters_lie(lambda _: Format(Layout.AUTO)))
    mesh = Mesh(np.array(jax.devices("cpu")[:2]), ("d",))
    spread = jax.device_put(FILTERS[0], NamedSharding(mesh, PartitionSpec(None, None, None, "d")))
    compiled = zenith.compile((convolved, (spread, FILTERS[1])), X)
    want = convolved(jax.device_put(FILTERS, jax.devices("cpu")[0]), X)
    np.testing.assert_allclose(compiled(X), want, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="JAX has no NVIDIA GPU")
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_gpu_reads_filters_as_they_lie(mode):
    rng = np.random.default_rng(0)
    filters = [jnp.asarray(rng.normal(size=(3, 3, 64, 64)).astype(np.float32) / 24) for _ in range(4)]
    x = rng.normal(size=(8, 16, 16, 64)).astype(np.float32)

    def deep(params, x):
        for p in params:
            x = jax.lax.conv_general_dilated(x, p, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return x

    compiled = zenith.compile((deep, filters), x, mode=mode)
    with jax.default_matmul_precision("highest"):
        want = jax.jit(deep)(filters, x)
    for _ in range(3):  # a graph is captured, then started, then updated
        # TensorFloat-32, 2^-11 a product, four layers one behind the other.
        np.testing.assert_allclose(compiled(jnp.array(x)), want, rtol=5e-3, atol=5e-3)
    if mode == "default":
        (program,) = compiled.programs.values()
        assert all(a is not b for a, b in zip(program.args[0], filters, strict=True)), "XLA copies them in each call"
        np.testing.assert_array_equal(program.args[0][0], filters[0])
