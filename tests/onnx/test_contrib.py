"""Operators of com.microsoft against ONNX Runtime, which defines them."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from onnx_one_node import MICROSOFT, model, runtime, zenith

pytest.importorskip("onnxruntime")


@dataclasses.dataclass(frozen=True)
class Case:
    """static: positions of inputs that decide a shape. steps: how many steps of its result's dtype may be off, where
    that is an integer. compared: how many of the outputs are defined everywhere, if not all."""

    op_type: str
    inputs: list[Any]
    attributes: dict[str, Any] = dataclasses.field(default_factory=dict)
    outputs: int = 1
    static: tuple[int, ...] = ()
    steps: int = 0
    rtol: float = 2e-5
    compared: int | None = None
    domain: str = MICROSOFT


def f(*shape: int, seed: int = 0, scale: float = 1.0) -> np.ndarray:
    return (scale * np.random.default_rng(seed + sum(shape)).standard_normal(shape)).astype(np.float32)


def u8(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


def i8(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-127, 128, shape).astype(np.int8)


def i32(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


S, Z, SI = np.float32(0.03), np.uint8(121), np.array(3, np.int32)
IDS = np.array([[3, 1, 4, 1, 5], [0, 2, 6, 5, 3]], np.int32)
ANGLES = np.arange(16)[:, None] / 10.0 ** (np.arange(4) / 2)
COS, SIN = np.cos(ANGLES).astype(np.float32), np.sin(ANGLES).astype(np.float32)

WIDE_COS, WIDE_SIN = np.hstack([COS, COS]), np.hstack([SIN, SIN])
LSTM_SCALES = [np.full(1, 0.004, np.float32), np.zeros(1, np.int8)] * 2

CASES = {
    "gelu": Case("Gelu", [f(3, 8)]),
    "bias_gelu": Case("BiasGelu", [f(3, 8), f(8)]),
    "fast_gelu": Case("FastGelu", [f(3, 8), f(8)]),
    "quick_gelu": Case("QuickGelu", [f(3, 8)], {"alpha": 1.5}),
    "matmul_alpha_transposed": Case("FusedMatMul", [f(2, 5, 3), f(2, 4, 5)], {"alpha": 0.5, "transA": 1, "transB": 1}),
    "matmul_batch_transposed": Case("FusedMatMul", [f(4, 2, 5), f(5, 2, 3)], {"transBatchA": 1, "transBatchB": 1}),
    "gemm_leaky": Case("FusedGemm", [f(3, 4), f(4, 5), f(5)], {"activation": "LeakyRelu", "activation_alpha": 0.2}),
    "conv_relu": Case("FusedConv", [f(1, 3, 6, 6), f(4, 3, 3, 3), f(4)], {"activation": "Relu", "pads": [1, 1, 1, 1]}),
    "conv_sum_clip": Case(
        "FusedConv",
        [f(1, 2, 5, 5), f(4, 2, 3, 3), f(4), f(1, 4, 3, 3)],
        {"activation": "Clip", "activation_params": [-0.5, 0.7]},
    ),
    "conv_transpose_dynamic_pads": Case(
        "ConvTransposeWithDynamicPads",
        [f(1, 2, 4, 4), f(2, 3, 3, 3), np.array([1, 0, 1, 2]), f(3)],
        {"strides": [2, 2]},
        static=(2,),
    ),
    "matmul_transposed": Case("TransposeMatMul", [f(2, 5, 3), f(2, 4, 5)], {"alpha": 0.5, "transA": 1, "transB": 1}),
    "inverse": Case("Inverse", [f(2, 3, 3)], rtol=1e-4),
    "trilu": Case("Trilu", [f(2, 4, 5), np.array(1)], {"upper": 0}, static=(1,)),
    "pad": Case("Pad", [f(2, 3), np.array([0, 1, 2, 0]), np.float32(7)], static=(1, 2)),
    "range": Case("Range", [np.float32(1), np.float32(7), np.float32(1.5)], static=(0, 1, 2)),
    "expand_dims": Case("ExpandDims", [f(2, 3), np.array(-1, np.int32)], static=(1,)),
    "simplified_layer_norm": Case("SimplifiedLayerNormalization", [f(2, 3, 8), f(8)], domain=""),
    "skip_layer_norm": Case(
        "SkipLayerNormalization", [f(2, 3, 8), f(2, 3, 8, seed=1), f(8), f(8, seed=1), f(8, seed=2)], {}, outputs=4
    ),
    "skip_layer_norm_without_batch": Case("SkipLayerNormalization", [f(2, 3, 8), f(3, 8), f(8), f(8, seed=1)]),
    "skip_simplified": Case(
        "SkipSimplifiedLayerNormalization", [f(2, 3, 8), f(2, 3, 8, seed=1), f(8), f(8, seed=2)], {"epsilon": 1e-6}
    ),
    "embed": Case(
        "EmbedLayerNormalization",
        [IDS, IDS % 2, f(7, 8), f(9, 8), f(2, 8), f(8), f(8, seed=1), i32(1, 1, 1, 0, 0, 1, 1, 1, 1, 1).reshape(2, 5)],
        {"epsilon": 1e-5},
        outputs=3,
    ),
    "embed_without_segments": Case(
        "EmbedLayerNormalization", [IDS, None, f(7, 8), f(9, 8), None, f(8), f(8, seed=1)], outputs=2
    ),
    "attention": Case("Attention", [f(2, 5, 8), f(8, 24), f(24)], {"num_heads": 2}, outputs=2),
    "attention_causal_past": Case(
        "Attention",
        [f(2, 3, 8), f(8, 24), f(24), None, f(2, 2, 2, 4, 4)],
        {"num_heads": 2, "unidirectional": 1},
        outputs=2,
    ),
    "attention_lengths": Case("Attention", [f(2, 5, 8), f(8, 24), f(24), i32(2, 5)], {"num_heads": 2}),
    "attention_ends_and_starts": Case("Attention", [f(2, 5, 8), f(8, 24), f(24), i32(4, 5, 1, 0)], {"num_heads": 2}),
    "attention_raw_mask": Case(
        "Attention",
        # The second row allows nothing. There -10000 is added to all logits, which leaves them 13 bits after the point.
        [f(2, 5, 8), f(8, 24), f(24), i32(1, 1, 0, 1, 0, 0, 0, 0, 0, 0).reshape(2, 5)],
        {"num_heads": 2, "mask_filter_value": -1e4},
        rtol=1e-3,
    ),
    "attention_other_value_size": Case(
        "Attention", [f(2, 5, 8), f(8, 28), f(28)], {"num_heads": 2, "qkv_hidden_sizes": [8, 8, 12], "scale": 0.3}
    ),
    "multi_head": Case(
        "MultiHeadAttention",
        [f(2, 3, 8), f(2, 5, 8), f(2, 5, 12), f(28), i32(3, 5), f(1, 2, 3, 5)],
        {"num_heads": 2},
    ),
    "multi_head_past": Case(
        "MultiHeadAttention",
        [f(2, 3, 8), f(2, 3, 8, seed=1), f(2, 3, 8, seed=2), None, None, None, f(2, 2, 4, 4), f(2, 2, 4, 4, seed=1)],
        {"num_heads": 2, "unidirectional": 1},
        outputs=3,
    ),
    "multi_head_keys_by_head": Case(
        "MultiHeadAttention", [f(2, 3, 8), f(2, 2, 5, 4), f(2, 2, 5, 4, seed=1)], {"num_heads": 2}
    ),
    "rotary_3d": Case("RotaryEmbedding", [f(2, 3, 16), np.array([[0, 1, 2], [5, 6, 7]]), COS, SIN]),
    "rotary_4d_offset_interleaved": Case(
        "RotaryEmbedding", [f(2, 2, 3, 8), np.array([4]), COS, SIN], {"interleaved": 1}
    ),
    "rotary_partial": Case(
        "RotaryEmbedding",
        [f(2, 3, 24), np.array([2]), COS, SIN],
        {"rotary_embedding_dim": 8, "num_heads": 2},
    ),
    "group_query_prompt": Case(
        "GroupQueryAttention",
        [f(2, 3, 64), f(2, 3, 32), f(2, 3, 32, seed=1), None, None, i32(2, 2), SI, WIDE_COS, WIDE_SIN],
        {"num_heads": 4, "kv_num_heads": 2, "do_rotary": 1},
        outputs=3,
        static=(6,),
    ),
    "group_query_decode": Case(
        "GroupQueryAttention",
        [
            f(2, 1, 64),
            f(2, 1, 32),
            f(2, 1, 32, seed=1),
            f(2, 2, 5, 16),
            f(2, 2, 5, 16, seed=1),
            i32(5, 5),
            SI * 2,
            WIDE_COS,
            WIDE_SIN,
        ],
        {"num_heads": 4, "kv_num_heads": 2, "do_rotary": 1, "rotary_interleaved": 1},
        outputs=3,
        static=(6,),
    ),
    "group_query_shared_buffer": Case(
        "GroupQueryAttention",
        [f(2, 1, 128), None, None, f(2, 2, 9, 16), f(2, 2, 9, 16, seed=1), i32(2, 5), SI * 2],
        {"num_heads": 4, "kv_num_heads": 2},
        outputs=3,
        static=(6,),
        compared=1,  # what lies in the cache behind the last token is unspecified
    ),
    "group_query_window": Case(
        "GroupQueryAttention",
        [f(1, 6, 64), f(1, 6, 32), f(1, 6, 32, seed=1), None, None, i32(5), SI * 2],
        {"num_heads": 4, "kv_num_heads": 2, "local_window_size": 2},
        static=(6,),
    ),
    "group_query_softcap_sink": Case(
        "GroupQueryAttention",
        [f(1, 3, 64), f(1, 3, 32), f(1, 3, 32, seed=1), None, None, i32(2), SI, None, None, None, None, f(4)],
        {"num_heads": 4, "kv_num_heads": 2, "softcap": 0.7},
        static=(6,),
    ),
    "group_query_smooth": Case(
        "GroupQueryAttention",
        [f(1, 3, 64), f(1, 3, 32), f(1, 3, 32, seed=1), None, None, i32(2), SI],
        {"num_heads": 4, "kv_num_heads": 2, "smooth_softmax": 1},
        static=(6,),
    ),
    "matmul_4_bits": Case(
        "MatMulNBits", [f(3, 40), u8(5, 3, 8), f(15)], {"K": 40, "N": 5, "bits": 4, "block_size": 16}
    ),
    "matmul_4_bits_zero_points": Case(
        "MatMulNBits", [f(3, 40), u8(5, 3, 8), f(15), u8(10)], {"K": 40, "N": 5, "bits": 4, "block_size": 16}
    ),
    "matmul_8_bits": Case(
        "MatMulNBits", [f(3, 32), u8(5, 2, 16), f(10), u8(10)], {"K": 32, "N": 5, "bits": 8, "block_size": 16}
    ),
    "gather_4_bits": Case(
        "GatherBlockQuantized",
        [u8(6, 16), np.array([[1, 5], [0, 2]]), f(6, 2)],
        {"block_size": 16, "gather_axis": 0, "quantize_axis": 1, "bits": 4},
    ),
    "qlinear_add": Case("QLinearAdd", [u8(3, 5), S, Z, u8(3, 5, seed=1), S * 2, Z, S * 3, Z], steps=1),
    "qlinear_mul": Case("QLinearMul", [i8(3, 5), S, np.int8(3), i8(5, seed=1), S, np.int8(-5), S, np.int8(7)], steps=1),
    "qlinear_sigmoid": Case("QLinearSigmoid", [u8(3, 5), S, Z, np.float32(1 / 256), np.uint8(0)], steps=1),
    "qlinear_leaky_relu": Case("QLinearLeakyRelu", [i8(3, 5), S, np.int8(4), S, np.int8(4)], {"alpha": 0.2}, steps=1),
    "qlinear_softmax": Case(
        "QLinearSoftmax", [u8(3, 5), S, Z, np.float32(1 / 256), np.uint8(0)], {"axis": -1, "opset": 13}, steps=1
    ),
    "qlinear_where": Case(
        "QLinearWhere",
        [f(3, 5) > 0, u8(3, 5), S, Z, u8(3, 5, seed=1), S * 2, np.uint8(3), S * 3, Z],
        steps=1,
    ),
    "qlinear_conv_channels_last": Case(
        "QLinearConv",
        [u8(1, 6, 5, 2), S, Z, i8(3, 2, 3, 3), np.abs(f(3)) / 20, np.zeros(3, np.int8), S * 9, Z, i32(100, -2000, 30)],
        {"pads": [1, 1, 1, 1], "channels_last": 1},
    ),
    "quantize": Case("QuantizeLinear", [f(3, 5), S, Z]),
    "dequantize_by_column": Case("DequantizeLinear", [u8(3, 5), np.abs(f(5)), u8(5)], {"axis": 1}),
    "qlinear_average_pool": Case(
        "QLinearAveragePool", [u8(1, 2, 6, 6), S, Z, S * 2, Z], {"kernel_shape": [3, 3], "strides": [2, 2]}, steps=1
    ),
    "qlinear_global_average_pool": Case(
        "QLinearGlobalAveragePool", [u8(1, 6, 6, 2), S, Z, S * 2, Z], {"channels_last": 1}, steps=1
    ),
    "qlinear_concat": Case("QLinearConcat", [S, Z, u8(2, 3), S * 2, Z, u8(2, 4), S, Z], {"axis": 1}, steps=1),
    "qgemm_float": Case("QGemm", [u8(3, 4), S, Z, i8(4, 5), S, np.int8(2), i32(5, -300, 7, 9, 1000)], {"alpha": 1.0}),
    "qgemm": Case("QGemm", [u8(3, 4), S, Z, i8(5, 4), S, np.int8(2), None, S * 9, Z], {"transB": 1}, steps=1),
    "matmul_integer_to_float": Case(
        "MatMulIntegerToFloat", [u8(3, 4), i8(4, 5), S, f(5), Z, np.array([1, 2, 3, 4, 5], np.int8), f(5, seed=1)]
    ),
    "dynamic_quantize_matmul": Case("DynamicQuantizeMatMul", [f(3, 4), i8(4, 5), S, np.int8(3), f(5)]),
    "quantized_attention": Case(
        "QAttention",
        [u8(2, 5, 8), i8(8, 24), f(24), S, np.float32(0.02), i32(3, 5), Z, np.int8(0)],
        {"num_heads": 2},
        rtol=1e-4,
    ),
    "dynamic_quantize_lstm": Case(
        "DynamicQuantizeLSTM",
        # x and h stay float here; what 8 bits of them lose in ONNX Runtime is the difference
        [f(4, 2, 3), i8(1, 3, 16), i8(1, 4, 16, seed=1), f(1, 32, scale=0.1), None, None, None, None, *LSTM_SCALES],
        {"hidden_size": 4},
        outputs=3,
        rtol=0.05,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_onnx_runtime(name):
    case = CASES[name]
    inputs = [None if v is None else np.asarray(v) for v in case.inputs]
    proto = model(case.op_type, inputs, case.attributes, outputs=case.outputs, domain=case.domain, opset=17)
    expected = runtime(proto, inputs)
    results = zenith(proto, inputs, static=case.static)
    assert len(results) == len(expected)
    for got, wanted in list(zip(results, expected, strict=True))[: case.compared]:
        if not wanted.size:
            continue  # outputs for training, which ONNX Runtime leaves empty
        assert got.shape == wanted.shape and got.dtype == wanted.dtype
        if wanted.dtype.kind in "iu":
            assert np.abs(got.astype(int) - wanted.astype(int)).max() <= case.steps
        else:
            # A sum of products of magnitude m is off by a few ulps of m, not of the result.
            np.testing.assert_allclose(got, wanted, rtol=case.rtol, atol=case.rtol * np.abs(wanted).max())


def test_packed_projections_are_their_parts():
    """ONNX Runtime takes them on GPUs only, so its result for the parts is the oracle."""
    query, key, value = (f(2, 3, 2, 4, seed=i) for i in range(3))
    parts = [v.reshape(2, 3, 8) for v in (query, key, value)]
    (expected,) = runtime(_multi_head(parts), parts)
    packed = [np.stack([query, key, value], 3)]
    half_packed = [parts[0], np.stack([key, value], 3)]
    for inputs in (packed, half_packed):
        np.testing.assert_allclose(zenith(_multi_head(inputs), inputs)[0], expected, rtol=2e-5, atol=1e-6)


# Operators that ONNX Runtime has on GPUs only; by their documentation.
X, BIAS, SKIP = f(2, 3, 4, 8), f(8), f(2, 3, 4, 8, seed=1)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def _gelu(x: np.ndarray) -> np.ndarray:
    return x * (1 + np.vectorize(math.erf)(x / np.sqrt(2))) / 2


def _group_norm(x: np.ndarray, groups: int) -> np.ndarray:
    parts = x.astype(np.float64).reshape(x.shape[0], -1, groups, x.shape[-1] // groups)
    centred = parts - parts.mean((1, 3), keepdims=True)
    return (centred / np.sqrt((centred**2).mean((1, 3), keepdims=True) + 1e-5)).reshape(x.shape)


def _conv(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Channels last, a kernel of 1 x 1."""
    return np.einsum("nhwc,mc->nhwm", x, w[:, :, 0, 0])


W = f(5, 8, 1, 1)
NORM = {"groups": 2, "activation": 1, "channels_last": 1, "epsilon": 1e-5}
ON_GPUS = {
    "bias_add": (Case("BiasAdd", [X[0], BIAS, SKIP[0]]), [X[0] + BIAS + SKIP[0]]),
    "bias_split_gelu": (
        Case("BiasSplitGelu", [X[0], BIAS]),
        [(X[0] + BIAS)[..., :4] * _gelu((X[0] + BIAS)[..., 4:])],
    ),
    "group_norm": (
        Case("GroupNorm", [X, BIAS, 2 * BIAS], NORM),
        [(n := _group_norm(X, 2) * BIAS + 2 * BIAS) * _sigmoid(n)],
    ),
    "skip_group_norm": (
        Case("SkipGroupNorm", [X, BIAS, 2 * BIAS, SKIP, BIAS], {**NORM, "activation": 0}, outputs=2),
        [_group_norm(X + SKIP + BIAS, 2) * BIAS + 2 * BIAS, X + SKIP + BIAS],
    ),
    "nhwc_conv": (Case("NhwcConv", [X, W]), [_conv(X, W)]),
    "nhwc_fused_conv": (
        Case("NhwcFusedConv", [X, W, f(5), f(2, 3, 4, 5)], {"activation": "Relu"}),
        [np.maximum(_conv(X, W) + f(5) + f(2, 3, 4, 5), 0)],
    ),
    "matmul_activation": (
        Case("FusedMatMulActivation", [f(3, 4), f(4, 5)], {"activation": "Tanh", "alpha": 0.5}),
        [np.tanh(0.5 * f(3, 4) @ f(4, 5))],
    ),
    "qlinear_reduce_mean": (
        Case("QLinearReduceMean", [u8(3, 8), S, Z, S / 2, Z], {"axes": [1], "keepdims": 0}, steps=1),
        [np.clip(np.rint((u8(3, 8).astype(float) - 121).mean(1) * 2) + 121, 0, 255).astype(np.uint8)],
    ),
}


@pytest.mark.parametrize("name", ON_GPUS)
def test_operators_that_onnx_runtime_has_on_gpus_only(name):
    case, expected = ON_GPUS[name]
    proto = model(case.op_type, case.inputs, case.attributes, outputs=case.outputs, domain=case.domain, opset=17)
    for got, wanted in zip(zenith(proto, case.inputs), expected, strict=True):
        atol = case.steps or 2e-5  # the formulas are float64
        np.testing.assert_allclose(got, wanted, rtol=2e-5, atol=atol)


def _multi_head(inputs: list[Any]) -> Any:
    return model("MultiHeadAttention", inputs, {"num_heads": 2}, outputs=1, domain=MICROSOFT, opset=17)
