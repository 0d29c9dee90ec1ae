"""zenith.compile: every kind of model through one door, the same answers; what a wrong call is told."""

from __future__ import annotations

import copy
import functools as ft
import pickle

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import zenith_jax as zenith
from zenith_jax.errors import FrontendError, InputError

X = np.sin(np.arange(3 * 8, dtype=np.float32)).reshape(3, 8)


def apply(params, x):
    return {"p": jax.nn.softmax(x @ params["w"] + params["b"]), "sums": (x.sum(-1),)}


PARAMS = {"w": jnp.cos(jnp.arange(8 * 4.0)).reshape(8, 4), "b": jnp.arange(4.0)}


class Nnx(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.linear = nnx.Linear(8, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return jax.nn.softmax(self.dropout(self.norm(self.linear(x))))


class Linen(linen.Module):
    @linen.compact
    def __call__(self, x, train=False):
        x = linen.BatchNorm(use_running_average=not train)(linen.Dense(4)(x))
        return jax.nn.softmax(linen.Dropout(0.5, deterministic=not train)(x))


def onnx_model():
    onnx = pytest.importorskip("onnx", reason="the extra onnx is not installed")
    helper, numpy_helper = onnx.helper, onnx.numpy_helper
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Softmax", ["h"], ["y"])],
        "net",
        [helper.make_tensor_value_info("x", 1, ["batch", 8])],
        [helper.make_tensor_value_info("y", 1, ["batch", 4])],
        [numpy_helper.from_array(np.asarray(PARAMS["w"]), "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])


def linen_pair():
    module = Linen()
    return module, module.init(jax.random.key(0), X)


def nnx_module():
    module = Nnx()
    module.eval()
    return module, module


def linen_applied(x):
    module, variables = linen_pair()
    return module.apply(variables, x)


def onnx_applied(x):
    return (jax.nn.softmax(x @ PARAMS["w"]),)


# kind: (framework, () -> (what is compiled, what it must answer as))
MODELS = {
    "function": ("jax", lambda: (lambda x: jnp.tanh(x) @ PARAMS["w"],) * 2),
    "function and parameters": ("jax", lambda: ((apply, PARAMS), lambda x: apply(PARAMS, x))),
    "partial": ("jax", lambda: (jax.tree_util.Partial(apply, PARAMS),) * 2),
    "nnx": ("flax.nnx", nnx_module),
    "linen": ("flax.linen", lambda: (linen_pair(), linen_applied)),
    "linen, bound": ("flax.linen", lambda: (linen_pair()[0].bind(linen_pair()[1]), linen_applied)),
    "linen, partial": ("jax", lambda: ((ft.partial(Linen().apply, train=False), linen_pair()[1]), linen_applied)),
    "onnx": ("onnx", lambda: (onnx_model(), onnx_applied)),
    "onnx, bytes": ("onnx", lambda: (onnx_model().SerializeToString(), onnx_applied)),
}


@pytest.mark.parametrize("kind", MODELS)
def test_every_kind_of_model_answers_as_the_original(kind):
    framework, make = MODELS[kind]
    model, original = make()
    compiled = zenith.compile(model, X)
    jax.tree.map(ft.partial(np.testing.assert_allclose, atol=1e-6), compiled(X), original(X))
    assert compiled.framework == framework
    assert [s.shape for s in compiled.inputs] == [(3, 8)]


def test_an_equinox_module_keeps_its_functions_and_shares_its_parameters():
    mlp = eqx.nn.MLP(8, 4, 16, 1, key=jax.random.key(0))
    compiled = zenith.compile(mlp, X[0])
    np.testing.assert_allclose(compiled(X[0]), mlp(X[0]), atol=1e-6)
    assert compiled.framework == "equinox"
    assert compiled.params.layers[0].weight is mlp.layers[0].weight


def test_parameters_are_shared_and_keep_their_structure():
    compiled = zenith.compile((apply, PARAMS), X)
    assert compiled.params["w"] is PARAMS["w"]
    assert list(compiled.parameters) == ["b", "w"]


def test_inputs_and_outputs_have_names():
    compiled = zenith.compile((lambda p, tokens, batch: {"out": batch["mask"] * tokens}, {}), X, {"mask": X})
    assert [str(s) for s in compiled.inputs] == ["tokens: float32[3, 8]", "batch.mask: float32[3, 8]"]
    assert [str(s) for s in compiled.outputs] == ["out: float32[3, 8]"]
    np.testing.assert_allclose(compiled(tokens=X, batch={"mask": X})["out"], X * X)
    assert str(zenith.compile(onnx_model(), X).outputs[0]) == "y: float32[3, 4]"


def test_the_report_says_what_is_fused():
    with zenith.configured(use_cost=False):
        compiled = zenith.compile(jax.nn.softmax, jnp.ones((64, 512)))
    assert compiled.report.counts() == {"softmax": 1}


def test_shapes_do_for_example_inputs():
    compiled = zenith.compile((apply, PARAMS), jax.ShapeDtypeStruct((3, 8), "float32"))
    np.testing.assert_allclose(compiled(X)["p"], apply(PARAMS, X)["p"], atol=1e-6)


def test_python_values_among_the_inputs_are_bound():
    compiled = zenith.compile(lambda x, scale, flag: x * scale if flag else x, X, 2.0, True)
    np.testing.assert_allclose(compiled(X, 2.0, True), X * 2)
    with pytest.raises(InputError, match=r"the value 2.0 was bound .*, got 3.0: compile for that value"):
        compiled(X, 3.0, True)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_compiled_model_is_called_and_saved_and_nothing_else(mode):
    compiled = zenith.compile((apply, PARAMS), X, mode=mode)
    for transformed in (
        jax.jit(lambda x: compiled(x)["p"]),
        jax.vmap(lambda x: compiled(x)["p"]),
        jax.grad(lambda x: compiled(x)["p"].sum()),
    ):
        with pytest.raises(InputError, match="call the function that it was compiled from"):
            transformed(X)
    with pytest.raises(InputError, match="got 1 arguments with 0 JAX or NumPy arrays"):
        compiled([[1.0]])
    with pytest.raises(TypeError, match=r"model.save\(path\)"):
        pickle.dumps(compiled)
    assert copy.deepcopy(compiled) is compiled


def test_benchmark_times_calls():
    found = zenith.compile((apply, PARAMS), X).benchmark(seconds=0.02)
    assert 0 < found.fastest_ms <= found.median_ms
    assert found.calls >= 1
    assert "ms" in str(found)


# --- dynamic dimensions -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_jax", [False, True])
def test_a_dynamic_batch_is_padded_and_cut(as_jax):
    compiled = zenith.compile((apply, PARAMS), X, dynamic={"batch": (4, 1, 8)})
    assert compiled.inputs[0].shape == ("batch", 8)
    assert [s.shape for s in compiled.outputs] == [("batch", 4), ("batch",)]
    assert sorted(compiled.programs) == [(1,), (4,), (8,)]
    for n in (1, 2, 4, 7, 8):
        x = np.cos(np.arange(n * 8, dtype=np.float32)).reshape(n, 8)
        got = compiled(jnp.asarray(x) if as_jax else x)
        jax.tree.map(ft.partial(np.testing.assert_allclose, atol=1e-6), got, apply(PARAMS, x))
    with pytest.raises(InputError, match=r"x: batch is 9, the model is compiled for up to 8: split the call"):
        compiled(np.ones((9, 8), np.float32))


def test_dimensions_are_named_by_symbolic_examples():
    struct = jax.ShapeDtypeStruct(jax.export.symbolic_shape("rows, length, 2"), "float32")
    compiled = zenith.compile(lambda x: jnp.tanh(x) * 2, struct, dynamic={"rows": (2,), "length": (4, 8)})
    x = np.ones((1, 5, 2), np.float32)
    np.testing.assert_allclose(compiled(x), np.tanh(x) * 2, rtol=1e-6)
    assert compiled.outputs[0].shape == ("rows", "length", 2)


def test_an_onnx_file_names_its_dimensions_and_needs_no_examples():
    compiled = zenith.compile(onnx_model(), dynamic={"batch": (2, 4)})
    np.testing.assert_allclose(compiled(X)[0], jax.nn.softmax(X @ PARAMS["w"]), atol=1e-6)
    with pytest.raises(FrontendError, match="input 'x' has no fixed shape"):
        zenith.compile(onnx_model())


def test_a_dimension_whose_positions_depend_on_each_other_is_refused():
    with pytest.raises(FrontendError, match="at one position of 'batch' depends on the others"):
        zenith.compile(lambda x: x - x.mean(0), X, dynamic={"batch": (4, 8)})


def test_an_output_that_is_no_bucket_long_is_refused():
    with pytest.raises(FrontendError, match="output 0 has size 16 along axis 0 where batch is 8"):
        zenith.compile(lambda x: jnp.concatenate([x, x]), X, dynamic={"batch": (4, 8)})


def test_dynamic_dimensions_that_no_input_has_are_refused():
    with pytest.raises(FrontendError, match=r"dynamic names the dimensions \['length'\], the inputs have \[\]"):
        zenith.compile(lambda x: x, X, dynamic={"length": (4, 8)})
    with pytest.raises(FrontendError, match="must have sizes to compile for"):
        zenith.compile(lambda x: x, X, dynamic={"batch": ()})
    with pytest.raises(FrontendError, match=r"dynamic must name dimensions .* got True"):
        zenith.compile(lambda x: x, X, dynamic=True)


# --- wrong calls ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (42, "cannot compile an object of type builtins.int. A model is one of: a torch.nn.Module; "),
        (Nnx, "cannot compile the class Nnx: give an instance of it"),
        ("model.zenith", "'model.zenith', which is compiled already: zenith.load"),
        ("model.txt", "the path 'model.txt', where there is no file"),
        ((1, 2), "cannot compile a tuple of int, int"),
        (Linen(), r"Linen has no variables: give \(module, variables\)"),
        (Nnx(), r"Nnx changes its state when it is called .*: call its .eval\(\) first"),
    ],
)
def test_what_is_no_model_is_refused(model, message):
    with pytest.raises(FrontendError, match=message):
        zenith.compile(model, X)


def test_a_missing_onnx_file_is_named():
    with pytest.raises(zenith.onnx.OnnxError, match=r"there is no file nowhere.onnx"):
        zenith.compile("nowhere.onnx", X)


def test_wrong_example_inputs_are_told():
    with pytest.raises(FrontendError, match=r"apply cannot be traced with the example inputs float32\[3, 7\]: "):
        zenith.compile((apply, PARAMS), np.ones((3, 7), np.float32))
    with pytest.raises(FrontendError, match=r"x is a random key: give jax.random.key_data"):
        zenith.compile(lambda x: x, jax.random.key(0))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((np.ones((2, 8), np.float32),), r"x has shape \(2, 8\). Compile for that shape, or with dynamic="),
        ((np.ones((3, 8), np.int32),), "x is int32, convert it first"),
        ((X, X), "got 2 arguments"),
        ((), "got 0 arguments"),
        (([X],), "must have the structure"),
        ((X.tolist(),), "got 1 arguments"),
    ],
)
def test_calls_with_other_inputs_are_told_what_the_model_takes(args, message):
    compiled = zenith.compile((apply, PARAMS), X)
    with pytest.raises(InputError, match=r"apply was compiled for x: float32\[3, 8\]; .*" + message):
        compiled(*args)


def test_unknown_argument_names_are_told():
    with pytest.raises(InputError, match=r"apply takes the arguments \['x'\], got 0 positional and \['y'\] by name"):
        zenith.compile((apply, PARAMS), X)(y=X)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_telemetry_knows_the_model_by_its_name(mode):
    def the_model(x):
        return jnp.tanh(x) + 1

    zenith.compile(the_model, jnp.ones(3), mode=mode)
    assert zenith.telemetry.records()[-1].function.endswith("the_model")


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_for_the_device_that_its_arrays_are_committed_to(mode):
    first, second = jax.devices()[:2]
    x = jax.device_put(np.ones((4, 8), np.float32), second)
    by_example = zenith.compile(lambda x: jnp.exp(x) + 1, x, mode=mode)
    assert by_example(x).devices() == {second}
    with_params = zenith.compile((lambda p, x: x @ p, np.ones((8, 8), np.float32)), x, mode=mode)
    assert with_params(np.asarray(x)).devices() == {second}
    assert with_params.params.devices() == {second}
    with jax.default_device(second):
        chosen = zenith.compile(lambda x: jnp.exp(x) + 1, np.asarray(x), mode=mode)
    assert chosen(np.asarray(x)).devices() == {second}
    assert zenith.compile(lambda x: jnp.exp(x) + 1, np.asarray(x), mode=mode)(np.asarray(x)).devices() == {first}
