"""Lowering for CUDA on any host: the custom calls are in the StableHLO, with layouts, attributes and sharding rules.

Whether they compute the right thing is seen where a GPU is (tests/test_targets.py and the rest of this folder there).
"""

import functools as ft
import itertools
import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import zenith_jax as zenith
from zenith_jax import native, ops


def stablehlo(function, *args) -> str:
    """The text of `function` lowered for CUDA, as it would be on a GPU machine; kernels at these sizes too."""
    with zenith.configured(platform="cuda", use_cost=False):
        return zenith.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


def calls(text: str) -> list[str]:
    """Stems of Zenith's custom calls, in order."""
    version = f"_v{native.KERNEL_VERSION}"
    found = re.findall(r"custom_call @zenith_(\w+)\(", text)
    assert all(name.endswith(version) for name in found)
    return [name.removesuffix(version) for name in found]


def normal(*shape, dtype=jnp.bfloat16):
    return jax.random.normal(jax.random.key(len(shape)), shape).astype(dtype)


def total(function):
    """A scalar of all results, whose gradient needs all backward kernels."""
    return lambda *args: sum(jnp.sum(jnp.sin(x.astype(jnp.float32))) for x in jax.tree.leaves(function(*args)))


X, SCALE = normal(2, 64, 128), normal(128, dtype=jnp.float32)
QKV = [normal(2, 64, 4, 64) for _ in range(3)]
CASES = {
    "layer_norm": (lambda x, s, b: ops.layer_norm(x, s, b), [X, SCALE, SCALE]),
    "rms_norm": (lambda x, s: ops.rms_norm(x, s), [X, SCALE]),
    "add_layer_norm": (lambda x, r, s, b: ops.add_layer_norm(x, r, s, b), [X, X, SCALE, SCALE]),
    "add_rms_norm": (lambda x, r, s: ops.add_rms_norm(x, r, s), [X, X, SCALE]),
    "group_norm": (ft.partial(ops.group_norm, groups=8, activation="silu"), [X, SCALE, SCALE]),
    "softmax": (ops.softmax, [X]),
    "gelu_erf": (lambda x: ops.gelu(x, approximate=False), [X]),
    "gelu_tanh": (ops.gelu, [X]),
    "silu": (ops.silu, [X]),
    "gated_silu": (ops.gated_activation, [X, X]),
    "gated_silu_halves": (ops.gated_activation_of_halves, [X]),
    "attention": (lambda q, k, v: ops.attention(q, k, v, is_causal=True), QKV),
}


@pytest.mark.parametrize("name", CASES)
def test_op_and_its_gradient_are_one_custom_call_each(name):
    function, args = CASES[name]
    assert calls(stablehlo(function, *args)) == [f"{name}_fwd"]
    gradient = calls(stablehlo(jax.grad(total(function), argnums=tuple(range(len(args)))), *args))
    assert gradient == [f"{name}_fwd", f"{name}_bwd"]


@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
def test_a_sum_that_only_its_norm_uses_has_no_cotangent_to_be_read(name):
    function, args = CASES[f"add_{name}"]
    gradient = jax.grad(total(lambda *args: function(*args)[0]), argnums=(0, 1, 2))
    assert calls(stablehlo(gradient, *args)) == [f"add_{name}_fwd", f"{name}_bwd"]


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "neighbours"])
def test_a_rotation_and_the_rotation_back_are_one_custom_call_each(interleaved):
    x, cos = normal(2, 64, 4, 128), normal(64, 1, 64, dtype=jnp.float32)
    function = ft.partial(ops.rope, interleaved=interleaved)
    assert calls(stablehlo(function, x, cos, cos)) == ["rope"]
    assert calls(stablehlo(jax.grad(total(function)), x, cos, cos)) == ["rope", "rope"]


@pytest.mark.parametrize(
    ("heads", "dtype", "interleaved", "refusal"),
    [
        (32, jnp.bfloat16, True, None),
        (32, jnp.float32, True, "at the speed of a copy"),
        (32, jnp.bfloat16, False, "at the speed of a copy"),
        (1, jnp.bfloat16, True, "XLA's loop is as fast for 131072 elements"),
    ],
)
def test_rotations_on_a_gpu_are_chosen_where_they_were_measured_to_win(heads, dtype, interleaved, refusal):
    x, cos = jax.ShapeDtypeStruct((1, 1024, heads, 128), dtype), jax.ShapeDtypeStruct((1024, 1, 64), jnp.float32)

    def rotated(x, cos, sin):
        if interleaved:
            pairs = x.reshape(*x.shape[:-1], 64, 2)
            first, second = pairs[..., 0], pairs[..., 1]
            joined = jnp.stack((first * cos - second * sin, second * cos + first * sin), -1).reshape(x.shape)
        else:
            first, second = jnp.split(x, 2, axis=-1)
            joined = jnp.concatenate((first * cos - second * sin, second * cos + first * sin), -1)
        return joined.astype(x.dtype)

    with zenith.configured(platform="cuda"):
        report = zenith.explain(rotated)(x, cos, cos)
    assert report.counts().get("rope", 0) == (refusal is None), str(report)
    if refusal is not None:
        assert any(refusal in site.reason for site in report.refused), str(report)


@pytest.mark.parametrize(
    ("page", "dtype", "call"),
    [
        (16, jnp.bfloat16, "paged_attention_fwd"),
        (24, jnp.bfloat16, "attention_fwd"),
        (16, jnp.float32, "attention_fwd"),
    ],
)
def test_pages_are_looked_up_by_the_kernel_that_takes_them_or_gathered(page, dtype, call):
    q, pages = (jax.ShapeDtypeStruct(shape, dtype) for shape in ((2, 1, 8, 128), (9, page, 2, 128)))
    tables, lengths = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((2, 512), (2,)))
    assert calls(stablehlo(ops.paged_attention, q, pages, pages, tables, lengths)) == [call]


def test_a_gather_of_pages_is_a_site_on_a_gpu_where_it_was_measured():
    def step(q, k, v, tables, lengths):
        k, v = (x[tables].reshape(2, -1, 8, 128) for x in (k, v))
        return jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=lengths)

    for page, expected in ((16, {"paged_attention": 1}), (24, {"attention": 1})):
        q, pages = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((2, 1, 32, 128), (9, page, 8, 128)))
        tables, lengths = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((2, 1024), (2,)))
        with zenith.configured(platform="cuda"):
            report = zenith.explain(step)(q, pages, pages, tables, lengths)
        assert report.counts() == expected, str(report)
        assert page == 16 or "power of two" in str(report)


def test_dtype_without_a_kernel_lowers_to_xla_code():
    with jax.enable_x64(True):
        assert calls(stablehlo(ops.softmax, X.astype(jnp.float64))) == []


def test_stock_model_is_fused_with_its_gradient_inside():
    class Block(nnx.Module):
        def __init__(self):
            rngs = nnx.Rngs(0)
            self.norm = nnx.LayerNorm(128, dtype=jnp.bfloat16, rngs=rngs)
            self.attention = nnx.MultiHeadAttention(4, 128, dtype=jnp.bfloat16, decode=False, rngs=rngs)

        def __call__(self, x):
            return x + self.attention(self.norm(x), mask=nnx.make_causal_mask(x[..., 0]))

    graph, state = nnx.split(Block())
    step = jax.value_and_grad(lambda s, x: total(nnx.merge(graph, s))(x))
    found = sorted(calls(stablehlo(step, state, X)))
    # Query, key, value and result.
    assert found == [
        "attention_bwd", "attention_fwd", "layer_norm_bwd", "layer_norm_fwd", *4 * ["linear_fwd"],
    ]  # fmt: skip


def test_causal_mask_is_passed_as_a_band_and_not_as_a_tensor():
    text = stablehlo(lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=True), *QKV)
    assert calls(text) == ["attention_fwd"]
    assert "mask_axes = -1 : i64" in text
    assert "right = 0 : i64" in text


def test_lengths_are_numbers_and_segments_give_an_interval_for_each_query():
    lengths, segments = jnp.array([3, 64]), jnp.arange(128).reshape(2, 64) // 5
    structure = dict(key_lengths=lengths, query_segments=segments, key_segments=segments)
    text = stablehlo(jax.grad(total(lambda q: ops.attention(q, *QKV[1:], **structure))), QKV[0])
    assert calls(text) == ["attention_fwd", "attention_bwd"]
    assert "mask_axes = -1 : i64" in text
    assert "interval_axes = 25 : i64" in text  # batch, query, and the bounds along the key's bit
    assert "key_segments_axes = 17 : i64" in text  # batch and key
    padded = stablehlo(lambda q: ops.attention(q, *QKV[1:], key_lengths=lengths), QKV[0])
    assert "interval_axes = 17 : i64" in padded and "mask_axes = -1 : i64" in padded


def test_caps_sinks_and_biases_are_custom_calls_with_their_gradients():
    bias = jnp.zeros((64, 64))
    for options in (dict(softcap=5.0), dict(sinks=jnp.ones(4)), dict(bias=bias), dict(bias=bias, softcap=5.0)):
        function = lambda *x, options=options: ops.attention(*x, **options)  # noqa: E731
        assert calls(stablehlo(jax.grad(total(function)), *QKV)) == ["attention_fwd", "attention_bwd"]
    with_dbias = jax.grad(total(lambda bias: ops.attention(*QKV, bias=bias)))
    assert calls(stablehlo(with_dbias, bias)) == ["attention_fwd", "attention_bias_bwd"]


def test_caps_and_sinks_by_hand_are_fused():
    capped = lambda q, k, v: jax.nn.softmax(5 * jnp.tanh(q @ k.swapaxes(-1, -2) / 5)) @ v  # noqa: E731

    def beside_sink(q, k, v):
        logits = q @ k.swapaxes(-1, -2)
        column = jnp.ones((*logits.shape[:-1], 1), logits.dtype)
        return jax.nn.softmax(jnp.concatenate([logits, column], -1))[..., :-1] @ v

    biased = lambda q, k, v: jax.nn.softmax(q @ k.swapaxes(-1, -2) + jnp.sin(q[..., :1])) @ v  # noqa: E731
    with zenith.configured(platform="cuda", use_cost=False):
        for function in (capped, beside_sink, biased):
            assert "attention" in zenith.explain(jax.grad(total(function)))(*QKV).counts()


ATTENTION = lambda q, k, v: jax.nn.dot_product_attention(q, k, v)  # noqa: E731


@pytest.mark.parametrize(
    ("shape", "dtype", "precision", "function", "refusal"),
    [
        ((1, 128, 12, 64), "bfloat16", None, ATTENTION, "as fast for 196608 logits"),
        ((8, 512, 12, 64), "bfloat16", None, ATTENTION, None),
        ((1, 128, 12, 64), "float32", None, ATTENTION, "as fast for 196608 logits"),
        ((1, 512, 12, 64), "float32", None, ATTENTION, None),
        ((1, 512, 12, 64), "float32", "highest", ATTENTION, None),
        ((8, 512, 12, 128), "float32", None, ATTENTION, None),
        ((8, 512, 12, 256), "float32", None, ATTENTION, "256 features a head"),
        ((8, 512, 12, 256), "float32", "highest", ATTENTION, None),
        ((8, 512, 12, 64), "float32", None, jax.grad(total(ATTENTION)), None),
        ((8, 512, 12, 128), "float32", None, jax.grad(total(ATTENTION)), "128 features a head"),
        ((1, 8192, 16, 128), "float32", None, jax.grad(total(ATTENTION)), None),
    ],
)
def test_attention_on_a_gpu_is_chosen_where_it_was_measured_to_win(shape, dtype, precision, function, refusal):
    x = jax.ShapeDtypeStruct(shape, dtype)
    with zenith.configured(platform="cuda"), jax.default_matmul_precision(precision):
        report = zenith.explain(function)(x, x, x)
    assert report.counts().get("attention", 0) == (refusal is None), str(report)
    if refusal is not None:
        assert any(refusal in site.reason for site in report.refused), str(report)


def test_products_of_float32_are_rounded_where_the_program_lets_them():
    def written(first, second):
        def function(q, k, v):
            weights = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k, precision=first))
            return jnp.einsum("bhts,bshd->bthd", weights, v, precision=second)

        return function

    x = jax.ShapeDtypeStruct((2, 64, 4, 64), jnp.float32)
    exact = jax.lax.DotAlgorithmPreset.F32_F32_F32
    precisions = [None, "highest", exact]
    for first, second in itertools.product(precisions, precisions):
        text = stablehlo(written(first, second), x, x, x)
        assert f"allow_tf32 = {int(first is second is None)} : i32" in text, (first, second)
    assert "allow_tf32 = 0 : i32" in stablehlo(ops.attention, x, x, x)
    assert "allow_tf32 = 1 : i32" in stablehlo(lambda *qkv: ops.attention(*qkv, allow_tf32=True), x, x, x)


@pytest.mark.parametrize("what", ["mask", "bias"])
def test_gradients_in_float32_of_what_is_masked_are_chosen_where_they_were_measured(what):
    def function(q, k, v, x):
        return jax.nn.dot_product_attention(q, k, v, **{what: x})

    for batch, is_fused in ((8, False), (128, True)):
        qkv = [jax.ShapeDtypeStruct((batch, 128, 12, 64), jnp.float32)] * 3
        x = jax.ShapeDtypeStruct((batch, 1, 128, 128), jnp.bool_ if what == "mask" else jnp.float32)
        with zenith.configured(platform="cuda"):
            assert zenith.explain(function)(*qkv, x).counts().get("attention") == 1
            report = zenith.explain(jax.grad(total(function)))(*qkv, x)
        assert report.counts().get("attention", 0) == is_fused, str(report)
        assert is_fused or "as fast with a mask or bias" in str(report)


def test_few_queries_in_float32_are_not_measured():
    q, kv = (jax.ShapeDtypeStruct((8, t, 16, 64), jnp.float32) for t in (4, 8192))
    with zenith.configured(platform="cuda"):
        report = zenith.explain(ATTENTION)(q, kv, kv)
    assert "4 queries in float32 are not measured" in str(report)


def test_batch_dimensions_may_be_sharded_and_others_may_not():
    text = stablehlo(*[CASES["rms_norm"][0], *CASES["rms_norm"][1]])
    rule = re.search(r"sharding_rule = #sdy.op_sharding_rule<(.*?), custom>", text)
    assert rule is not None
    # x is (batch, row, feature) and scale (feature,): features must be whole.
    assert rule[1].startswith("([i, j, k], [k])->([i, j, k])")
    assert "need_replication={k}" in rule[1]
    assert 'num_batch_dims = "2"' in text


def test_length_major_arrays_are_read_where_they_lie():
    text = stablehlo(CASES["attention"][0], *QKV)
    # Logical (b, k, g, t, d), physical b, t, k, g, d: minor to major 4, 2, 1, 3, 0.
    assert "dense<[4, 2, 1, 3, 0]>" in text
    assert "layout = 1 : i32" in text


@pytest.mark.parametrize("w_dtype", [jnp.int8, jnp.int4])
def test_a_layer_of_integer_weights_is_one_call_for_few_rows(w_dtype):
    def layer(x, w, scale, bias):
        return x @ (w.astype(x.dtype) * scale) + bias

    w, scale = jnp.ones((128, 32), w_dtype), normal(32)
    text = stablehlo(layer, X[0, :16], w, scale, scale)
    assert calls(text) == ["quantized_linear_fwd"]
    assert f"tensor<4096xi{8 if w_dtype == jnp.int8 else 4}>" in text  # as it is stored
    assert calls(stablehlo(ops.quantized_linear, X[0, :17], w, scale)) == []
