"""`@zenith.onnx.operator`: operators that ONNX does not have, or another function for one that it has."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from onnx_models import FLOAT, INT, info, leaf, model, node

import zenith_jax as zenith
from zenith_jax.frontends.onnx import registry

X = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)


@pytest.fixture(autouse=True)
def registry_as_before(monkeypatch):
    monkeypatch.setattr(registry, "_operators", {k: list(v) for k, v in registry._operators.items()})


def load(*nodes, inputs=("x",), outputs=("y",), domain="my.domain", **weights):
    return zenith.onnx.load(model(nodes, inputs, outputs, domains=[domain] if domain else [], **weights))


def swish(**attributes):
    return node("Swish2", ["x"], ["y"], domain="my.domain", **attributes)


def register_swish():
    @zenith.onnx.operator("Swish2", domain="my.domain")
    def swish2(x, *, beta=1.0):
        return x * jax.nn.sigmoid(beta * x)

    return swish2


def test_unknown_operator_is_named_with_the_line_to_write():
    loaded = load(swish())
    assert loaded.unsupported() == {"my.domain.Swish2": 1}
    with pytest.raises(
        zenith.onnx.UnsupportedError,
        match=r"node my\.domain\.Swish2 'the_Swish2'.*@zenith\.onnx\.operator\('Swish2', domain='my\.domain'\)",
    ):
        loaded.apply({}, X)


@pytest.mark.parametrize("beta", [None, 0.0, 2.0])
def test_registered_operator_is_called_with_attributes_and_their_defaults(beta):
    function = register_swish()
    loaded = load(swish() if beta is None else swish(beta=beta))
    assert not loaded.unsupported()
    wanted = X / (1 + np.exp(-(1.0 if beta is None else beta) * X))
    for run in (loaded, lambda x: loaded.apply({}, x), lambda x: jax.jit(loaded.apply)({}, x)):
        np.testing.assert_allclose(run(X)[0], wanted, rtol=1e-5)
    assert function(jnp.ones(())) > 0.7, "the decorator gives the function back"


def test_registered_operator_has_the_transformations_of_jax():
    register_swish()
    loaded = load(swish(beta=2.0))
    plain = lambda x: x * jax.nn.sigmoid(2.0 * x)  # noqa: E731
    gradient = jax.grad(lambda x: loaded.apply({}, x)[0].sum())(X)
    np.testing.assert_allclose(gradient, jax.grad(lambda x: plain(x).sum())(X), rtol=1e-5)
    rows = jax.vmap(lambda x: loaded.apply({}, x[None])[0][0])(X)
    np.testing.assert_allclose(rows, plain(X), rtol=1e-5)


def test_version_in_force_is_the_largest_up_to_the_model_s():
    for since in (1, 3):
        zenith.onnx.operator("Scale", domain="my.domain", since=since)(lambda x, since=since: x * since)
    for opset, factor in ((1, 1), (2, 1), (3, 3), (7, 3)):
        proto = model([node("Scale", ["x"], ["y"], domain="my.domain")], ["x"], domains=["my.domain"])
        proto.opset_import[1].version = opset
        np.testing.assert_allclose(zenith.onnx.load(proto).apply({}, X)[0], factor * X)


def test_several_outputs_optional_inputs_and_the_node_itself():
    seen = []

    @zenith.onnx.operator("Divide", domain="my.domain")
    def divide(x, by=None, offset=None, *, node: zenith.onnx.Node):
        seen.append(node)
        y = x / 2 if by is None else x / by
        return y if offset is None else y + offset, x.sum()

    call = node("Divide", ["x", "", "b"], ["y", "s"], "halve", domain="my.domain")
    loaded = load(call, outputs=["y", "s"], b=np.ones(4, np.float32))
    y, total = loaded.apply(loaded.params, X)
    np.testing.assert_allclose(y, X / 2 + 1, rtol=1e-6)
    np.testing.assert_allclose(total, X.sum(), rtol=1e-5)
    assert seen[0] == zenith.onnx.Node("halve", "Divide", "my.domain", 1, (True, True))


def test_operand_with_a_known_value_comes_as_numpy_and_may_decide_a_shape():
    @zenith.onnx.operator("Repeat", domain="my.domain")
    def repeat(x, times):
        return jnp.tile(x, int(times))

    nodes = [
        node("Shape", ["x"], ["shape"]),
        node("ReduceProd", ["shape"], ["n"], keepdims=0),
        node("Repeat", ["x", "n"], ["y"], domain="my.domain"),
    ]
    (y,) = jax.jit(load(*nodes).apply)({}, X)
    assert y.shape == (3, 48)
    by_input = node("Repeat", ["x", "n"], ["y"], "repeat", domain="my.domain")
    inputs = [info("x", FLOAT, [3, 4]), info("n", INT, [])]
    with pytest.raises(zenith.onnx.NotStaticError, match=r"node my\.domain\.Repeat 'repeat'.*load\(static=\.\.\.\)"):
        jax.jit(load(by_input, inputs=inputs).apply)({}, X, 2)
    proto = model([by_input], inputs, domains=["my.domain"])
    assert zenith.onnx.load(proto, static=["n"])(X, np.array(2))[0].shape == (3, 8)


def test_operator_of_onnx_can_be_replaced():
    zenith.onnx.operator("Relu")(lambda x: jnp.maximum(x, 0.5))
    loaded = load(node("Relu", ["x"], ["y"]), domain="")
    np.testing.assert_allclose(loaded.apply({}, X)[0], np.maximum(X, 0.5))


def test_function_in_the_model_comes_before_an_operator():
    zenith.onnx.operator("F", domain="my")(lambda x: x + 1)
    call = node("F", ["x"], ["y"], domain="my")
    with_body = zenith.onnx.load(model([call], ["x"], functions=[leaf("F")], domains=["my"]))
    np.testing.assert_allclose(with_body.apply({}, X)[0], np.maximum(X, 0))
    np.testing.assert_allclose(load(call, domain="my").apply({}, X)[0], X + 1)


@pytest.mark.parametrize(
    ("attributes", "inputs", "text"),
    [
        ({"gamma": 1.0}, ["x"], "attributes .'gamma'. are not known"),
        ({}, ["x", "x"], "2 inputs"),
        ({}, [], "0 inputs"),
        ({"beta": "much"}, ["x"], "node my.domain.Swish2 'the_Swish2'"),
    ],
)
def test_call_that_does_not_fit_the_function_names_the_node(attributes, inputs, text):
    register_swish()
    loaded = load(node("Swish2", inputs, ["y"], domain="my.domain", **attributes))
    with pytest.raises(zenith.onnx.OnnxError, match=f"node my.domain.Swish2 'the_Swish2'.*{text}|{text}"):
        loaded.apply({}, X)


def test_exception_of_the_function_names_the_node_and_keeps_its_cause():
    @zenith.onnx.operator("Fails", domain="my.domain")
    def fails(x):
        raise KeyError("a bug")

    loaded = load(node("Fails", ["x"], ["y"], domain="my.domain"))
    with pytest.raises(zenith.onnx.OnnxError, match=r"node my\.domain\.Fails 'the_Fails'.*KeyError: 'a bug'") as caught:
        loaded.apply({}, X)
    assert isinstance(caught.value.__cause__, KeyError)


def test_registered_operator_is_seen_by_the_rewriter():
    """It is traced as any JAX code: a norm written in it is fused."""

    @zenith.onnx.operator("Norm", domain="my.domain")
    def norm(x, scale):
        return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * scale

    loaded = load(node("Norm", ["x", "s"], ["y"], domain="my.domain"), s=np.ones(4, np.float32))
    report = zenith.explain(loaded.apply)(loaded.params, X)
    assert [site.op for site in report.sites] == ["rms_norm"]


def test_example_of_the_documentation():
    page = pathlib.Path(__file__).parents[2] / "docs" / "onnx.md"
    (example,) = [b for b in page.read_text().split("```python\n") if b.startswith("@zenith.onnx.operator")]
    exec(example.partition("```")[0], {"zenith": zenith, "jnp": jnp})
    call = node("ScaledTanh", ["x", "s"], ["y"], domain="my.domain", alpha=2.0)
    loaded = load(call, s=np.full(4, 3, np.float32))
    np.testing.assert_allclose(loaded(X)[0], 3 * np.tanh(2 * X), rtol=1e-5)
