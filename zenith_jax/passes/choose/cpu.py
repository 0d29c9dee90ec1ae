"""Rules for the CPU's kernels."""

from __future__ import annotations

import math
from typing import Any

from zenith_jax import native
from zenith_jax.errors import Refusal, refuse
from zenith_jax.passes.choose._rule import Rule, each_loss


def _attention(case: dict[str, Any], differentiated: bool) -> Refusal | None:
    # 12 heads of 32 x 32 and d32 of an encoder that takes 2.3 ms: 0.06 ms less than XLA's (2 EPYC cores, 2026-11-26);
    # gradients are not measured below 64 x 64.
    if case["t"] * case["s"] < (64 * 64 if differentiated else 32 * 32):
        return refuse("XLA is as fast for {t} x {s} logits on the CPU", t=case["t"], s=case["s"])
    return None


# float32, XLA / ours in ms: b1 s512 h8/2 d64 0.23/0.040, b8 s1024 h8/8 d64 25/3.4, b4 s4096 h8/2 d128 22/3.9, b1 s16384
# h8/8 d64 65/8.1 (two EPYC cores, 2026-11-26).
def _paged_attention(case: dict[str, Any], differentiated: bool) -> Refusal | None:
    if differentiated:
        return refuse("the gradient gathers the pages anyway")
    return None


def _activation(case: dict[str, Any], differentiated: bool) -> Refusal | None:
    del differentiated
    if case["size"] < 4096:
        return refuse("XLA is as fast for {n} elements on the CPU", n=case["size"])
    return None


def _small_rows(case: dict[str, Any], differentiated: bool) -> Refusal | None:
    del differentiated
    if case["size"] < 12288:
        return refuse("XLA is as fast for {n} elements on the CPU", n=case["size"])
    return None


# Forward with scale and bias outside, as groups of channels are normalised, XLA / ours in ms: 256 rows of 20480
# 4.50 / 3.77, of 40960 28.4 / 26.6, 32 of 40960 0.64 / 0.86, 128 of 65536 13.3 / 18.2; with the gradient 81 / 36,
# 203 / 85, 22.2 / 7.2, 137 / 55 (float32, two cores, 2026-11-26).
_NORM_COLUMNS = 32768


def _norm(case: dict[str, Any], differentiated: bool) -> Refusal | None:
    if case["cols"] > _NORM_COLUMNS and not differentiated:
        return refuse("XLA is as fast for rows of {n} on the CPU", n=case["cols"])
    return _small_rows(case, differentiated)


def _norm_in_two_passes(case: dict[str, Any], differentiated: bool) -> Refusal | None:
    del case, differentiated
    return refuse("another form of XLA's is not measured on the CPU")


def _cross_entropy(case: dict[str, Any], differentiated: bool) -> Refusal | None:
    del differentiated
    # Four times softmax's limit: not measured yet.
    if case["size"] < 65536:
        return refuse("XLA is as fast for {n} logits on the CPU", n=case["size"])
    return None


def _linear_cross_entropy(case: dict[str, Any], differentiated: bool) -> Refusal | None:
    # Value and gradients in ms, XLA / ours, float32: 256x64x4096 3.2 / 3.6, 512x256x8192 91 / 82, 1024x384x32000
    # 544 / 541 (tokens x features x classes; 2 Xeon cores, 2026-11-26).
    if case["size"] < 1 << 22:
        return refuse("XLA is as fast for {n} logits on the CPU", n=case["size"])
    return each_loss(case, differentiated)


# Milliseconds of processor time of a 3-layer encoder of 384, XLA's products / ours, at 32, 256 and 512 rows: 6.6/4.8,
# 32.7/30.2, 62.6/58.7 (AMD EPYC, AVX-512, jax 0.10.2, 2026-11-26). XLA packs the weights in each call, which costs most
# where rows are few; more are not measured. One row is a product by a vector, of which XLA packs nothing: 12 layers of
# 384 x 1536, 1, 2 and 16 rows: 2.1/3.1, 2.8/2.1, 4.6/3.7.
LINEAR_ROWS = 512


def _linear(case: dict[str, Any], differentiated: bool) -> Refusal | None:
    if differentiated:
        return refuse("XLA keeps what the gradient needs as it is on the CPU")
    if not 1 < case["rows"] <= LINEAR_ROWS:
        return refuse("XLA's product of {rows} rows is as fast on the CPU", rows=case["rows"])
    return None


# float32, ms, XLA / ours, at 1, 8, 16 and 32 rows (AMD EPYC, AVX-512, two cores, jax 0.10.2, 2026-11-26):
#                   int8, one scale a feature                       int4, groups of 128
# 512 x 512    0.085/0.019 0.188/0.088 0.222/0.099 0.275/0.221   0.191/0.022 0.257/0.062 0.323/0.115 0.389/0.250
# 1024 x 1024  0.238/0.096 0.381/0.221 0.518/0.404 0.554/0.437   0.657/0.105 0.772/0.254 0.952/0.493 0.975/0.962
# 2048 x 2048  1.52/0.51   1.98/0.48   4.10/1.12   4.97/1.95     2.44/0.27   3.29/0.60   3.58/1.10   4.26/2.19
# More rows of float32 by int8, one scale a feature, take the tiles of linear.h. 12 layers 768 x 3072 and 3072 x 768,
# ms, XLA / ours / XLA with float32 weights (same machine, alone on it): 17 rows 65/13/27, 32 76/19/35, 64 83/32/54,
# 128 70/36/47, 256 102/70/82, 512 180/141/153, 1024 333/284/295; weights as (n, k) 86/14, 96/21, 106/33, 79/36, 115/70,
# 193/142, 346/286. Smaller weights and more rows are not measured.
_QUANTIZED_ROWS, _QUANTIZED_WEIGHTS = 16, 1 << 18
_TILED_ROWS = 1024


def _quantized_linear(case: dict[str, Any], differentiated: bool) -> Refusal | None:
    del differentiated  # the gradient's product is XLA's in any case
    is_tiled = case["dtype"] == "float32" and case["w_dtype"] == "int8" and case["groups"] == 1
    if case["rows"] > (_TILED_ROWS if is_tiled else _QUANTIZED_ROWS):
        return refuse("XLA's product of {rows} rows is as fast on the CPU", rows=case["rows"])
    if case["k"] * case["n"] < _QUANTIZED_WEIGHTS:
        return refuse("XLA is as fast for {k} x {n} weights on the CPU", k=case["k"], n=case["n"])
    return None


# float32, ms, XLA with channels last / ours, with bias and relu: 1 x 8 x 8, 8 to 8 by 3 x 3 0.037 / 0.012; 28 x 28, 64
# to 8 by 3 x 3 0.121 / 0.096; 56 x 56, 64 to 3 0.29 / 0.35; 224 x 224, 3 to 32, stride 2, 1.70 / 0.16; 7 x 7, 64 to 128
# by 1 x 1 0.029 / 0.018; 64 x 28 x 28, 1 to 32 by 3 x 3 0.93 / 0.29; more, ResNet-50's too, in
# docs/kernels/convolution_cpu.md. With a maximum of 2 x 2: 64 x 28 x 28, 1 to 32, 0.93 / 0.37, 1024 of them 10.4 / 6.8;
# 64 x 14 x 14, 32 to 64, 2.46 / 2.24, 1024 41.1 / 35.8; 28 x 28, 1 to 32, 0.047 / 0.015; 224 x 224, 64 to 64, 22.1 /
# 17.0; of 4 x 4: 64 x 28 x 28, 1 to 32, 0.49 / 0.35. XLA computes means of windows side by
# side along, too, without an array between, and the kernel does not: 1024 x 14 x 14, 32 to 64, 39 / 45, 256 x 28 x 28,
# 1 to 32, 2.4 / 3.0, 8 x 224 x 224, 3 to 64 by 7 x 7, stride 2, 11.2 / 11.7. Of windows that overlap XLA computes
# the convolution again: a maximum of 3 x 3 with stride 2 139 / 49, 8.3 / 5.9 and 29 / 14 (AMD EPYC, AVX-512, two
# cores, jax 0.10.2, 2026-11-26).
_CONV_PRODUCTS, _CONV_DEPTH, _CONV_FEATURES = 1 << 18, 9, 8
_CONV_POOL = 16  # pixels of a window
_CONV_WINDOW_RESULTS = 1 << 21  # 8 MiB


def _conv(case: dict[str, Any], differentiated: bool) -> Refusal | None:
    if differentiated:
        return refuse("XLA keeps what the gradient needs as it is on the CPU")
    if native.instruction_set() != "avx512":
        return refuse("the kernel is measured with AVX-512 only, which this CPU has not")
    if case["k"] < _CONV_DEPTH or case["n"] < _CONV_FEATURES:
        return refuse("XLA's convolution is as fast for sums of {k} terms to {n} features", k=case["k"], n=case["n"])
    results = case["pixels"] * case["n"]
    if case["in_window"] and results > _CONV_WINDOW_RESULTS:
        return refuse("XLA computes the windows behind it along, and never writes these {n} numbers", n=results)
    window = math.prod(case["pool"])
    if window > _CONV_POOL:
        return refuse("a maximum of {n} pixels is not measured", n=window)
    products = case["pixels"] * case["k"] * case["n"]
    if products < _CONV_PRODUCTS:
        return refuse("XLA's convolution is as fast for {n} products on the CPU", n=products)
    return None


def _batch_norm(case: dict[str, Any], differentiated: bool) -> Refusal | None:
    del differentiated
    # ms, product / with bias, batch norm and relu / folded: 64 x 512 x 512 0.43 / 0.45 / 0.51, 512 x 1024 x 1024
    # 32.9 / 31.6 / 34.3, 4096 x 256 x 1024 60 / 68 / 72, 8192 x 64 x 256 9.5 / 13.7 / 12.9 (two cores, 2026-11-26).
    if case["of"] == "product":
        return refuse("XLA's pass over a product takes as long as multiplying the weights and a pass for the sum")
    # ms, convolution / with batch norm and relu / folded: 64 to 256 channels of 56 x 56 by 1 x 1 1.07 / 1.18 / 1.19,
    # 64 to 64 by 3 x 3 2.25 / 2.30 / 2.32, 8 x 28 x 28 of 512 to 128 9.47 / 9.66 / 9.65 (two cores, 2026-11-26). One
    # pass is left for the activation in any case.
    return refuse(
        "XLA's pass over a convolution's result takes as long without the product: 1.18 ms with, 1.19 folded",
        advice="weights that stay as they are can be folded once, outside of the model",
    )


# us, XLA / ours, of (1, 512, 32, 128): halves put together 3055 / 500, x * cos + rotate_half(x) * sin 3784 / 500,
# neighbours 869 / 621; backward 2504 / 529, 783 / 529, 705 / 669. bfloat16 2532 / 190, 3044 / 190, 700 / 353; backward
# 2829 / 196, 7579 / 196, 6884 / 599. One token of 32 heads 7 to 8 / 8; (1, 64, 8, 64) float32 13 to 72 / 12 to 20,
# bfloat16 26 to 275 / 12 to 17 (two cores, AVX-512, jax 0.10.2, 2026-11-26).
def _rope(case: dict[str, Any], differentiated: bool) -> Refusal | None:
    del differentiated
    if case["size"] < 16384:
        return refuse("XLA is as fast for {n} elements on the CPU", n=case["size"])
    return None


RULES: dict[str, Rule] = {
    "attention": _attention,
    "paged_attention": _paged_attention,
    "conv": _conv,
    "linear": _linear,
    "quantized_linear": _quantized_linear,
    "gelu_erf": _activation,
    "gelu_tanh": _activation,
    "silu": _activation,
    "gated_gelu_erf": _activation,
    "gated_gelu_tanh": _activation,
    "gated_silu": _activation,
    "batch_norm": _batch_norm,
    "rope": _rope,
    "softmax": _small_rows,
    "cross_entropy": _cross_entropy,
    "linear_cross_entropy": _linear_cross_entropy,
    "layer_norm": _norm,
    "layer_norm_in_two_passes": _norm_in_two_passes,
    "rms_norm": _norm,
    "add_layer_norm": _norm,
    "add_rms_norm": _norm,
}
