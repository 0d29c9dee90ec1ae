"""Where a kernel of ours beats XLA: measured rules, per platform.

A matched site that a rule refuses stays XLA's, with the rule's reason in the report. Figures: docs/performance.md.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp

from zenith_jax import native
from zenith_jax.errors import Refusal, refuse
from zenith_jax.ops._op import check_kernel_dtype
from zenith_jax.ops.attention_kernels import unsupported as attention_unsupported
from zenith_jax.ops.conv import unsupported as conv_unsupported
from zenith_jax.ops.gated_linear import unsupported as gated_linear_unsupported
from zenith_jax.ops.group_norm import unsupported as group_norm_unsupported
from zenith_jax.ops.linear import HOPPER, compute_capability
from zenith_jax.ops.linear import unsupported as linear_unsupported
from zenith_jax.ops.paged_attention import unsupported as paged_attention_unsupported
from zenith_jax.ops.quantized_linear import unsupported as quantized_linear_unsupported
from zenith_jax.passes.match import Match


def _cpu_attention(case: dict[str, Any], differentiated: bool) -> Refusal | None:
    # 12 heads of 32 x 32 and d32 of an encoder that takes 2.3 ms: 0.06 ms less than XLA's (2 EPYC cores, 2026-11-26);
    # gradients are not measured below 64 x 64.
    if case["t"] * case["s"] < (64 * 64 if differentiated else 32 * 32):
        return refuse("XLA is as fast for {t} x {s} logits on the CPU", t=case["t"], s=case["s"])
    return None


def _cpu_activation(case: dict[str, Any], differentiated: bool) -> Refusal | None:
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
_CPU_NORM_COLUMNS = 32768


def _cpu_norm(case: dict[str, Any], differentiated: bool) -> Refusal | None:
    if case["cols"] > _CPU_NORM_COLUMNS and not differentiated:
        return refuse("XLA is as fast for rows of {n} on the CPU", n=case["cols"])
    return _small_rows(case, differentiated)


def _cpu_cross_entropy(case: dict[str, Any], differentiated: bool) -> Refusal | None:
    del differentiated
    # Four times softmax's limit: not measured yet.
    if case["size"] < 65536:
        return refuse("XLA is as fast for {n} logits on the CPU", n=case["size"])
    return None


def _each_loss(case: dict[str, Any], differentiated: bool) -> Refusal | None:
    if differentiated and not case["summed"]:
        return refuse(
            "the gradient of each loss would cost a fourth product",
            advice="sum the losses, weighted or not, in the function that is differentiated",
        )
    return None


def _cpu_linear_cross_entropy(case: dict[str, Any], differentiated: bool) -> Refusal | None:
    # Value and gradients in ms, XLA / ours, float32: 256x64x4096 3.2 / 3.6, 512x256x8192 91 / 82, 1024x384x32000
    # 544 / 541 (tokens x features x classes; 2 Xeon cores, 2026-11-26).
    if case["size"] < 1 << 22:
        return refuse("XLA is as fast for {n} logits on the CPU", n=case["size"])
    return _each_loss(case, differentiated)


def _cuda_linear_cross_entropy(case: dict[str, Any], differentiated: bool) -> Refusal | None:
    # Value and gradients in ms, XLA / ours, bfloat16: 8192x768x50304 4.88 / 3.99, 8192x4096x128256 44.2 / 43.2
    # (tokens x features x classes; H100, 2026-11-26). Smaller ones are not measured.
    if case["size"] < 1 << 27:
        return refuse("{n} logits are little on a GPU, and not measured", n=case["size"])
    return _each_loss(case, differentiated) or _unaligned(case)


# Loss, and with its gradient of logits that the program makes, XLA / ours in us (rows x classes, H100, 2026-11-26):
# bfloat16 8192x1024 52/47, 103/54; 8192x8192 154/65, 825/371; 8192x50304 611/387, 3818/2057; float32 127/33, 134/82;
# 196/109, 1085/649; 1086/628, 5930/3935. Of smaller ones most of the time is the host's.
_CUDA_CROSS_ENTROPY_LOGITS = 1 << 23


def _cuda_cross_entropy(case: dict[str, Any], differentiated: bool) -> Refusal | None:
    del differentiated
    if case["size"] < _CUDA_CROSS_ENTROPY_LOGITS:
        return refuse("{n} logits are little on a GPU, and not measured without the host's part", n=case["size"])
    return _unaligned(case)


# Logits below which launching is what a GPU's attention costs: bfloat16 d64, XLA / ours in us, forward and forward with
# backward: 0.2 M logits (b1 h12 s128) 5.9/6.7, 17/21; 1.6 M 12.3/10.9, 37/27; 3.1 M 13.8/13.2, 49/42; 25 M 93/30,
# 287/114 (H100, 2026-11-26).
_CUDA_LOGITS = 2**20
# Decoding is bound by reading keys and values: b1 h32/8 d128 of 16384 keys, half a million logits, XLA 37, ours 28;
# fewer are not measured.
_CUDA_DECODED_QUERIES, _CUDA_DECODED_LOGITS = 16, 2**19
# float32 is exact in our kernels, by three TensorFloat-32 products for each of XLA's one (errors 1e-6 and 6e-4). d64:
# 6 M logits 25/74, 80/269; 17 M 111/144, 315/602; 25 M 176/166, 497/833; 268 M 1530/1444, 4473/8075; d128: 25 M
# 205/358, 601/1892. Where logits take gigabytes, being able to run at all counts more.
_CUDA_FLOAT32_LOGITS = 24_000_000
_CUDA_FLOAT32_D = 64
_CUDA_LARGE_BYTES = 2**32


def _cuda_attention(case: dict[str, Any], differentiated: bool) -> Refusal | None:
    logits = case["batch"] * case["t"] * case["s"]
    decodes = case["t"] <= _CUDA_DECODED_QUERIES and case["dtype"] != "float32"
    if logits < (_CUDA_DECODED_LOGITS if decodes else _CUDA_LOGITS):
        return refuse("XLA is as fast for {n} logits on a GPU", n=logits)
    if case["dtype"] != "float32" or case["exact"] or 4 * logits >= _CUDA_LARGE_BYTES:
        return None
    if differentiated or max(case["d"], case["e"]) > _CUDA_FLOAT32_D or logits < _CUDA_FLOAT32_LOGITS:
        return refuse(
            "the kernel's float32 products are exact, and XLA's TensorFloat-32 ones of default precision faster here",
            advice="compute in bfloat16, or ask for exact products: jax.default_matmul_precision('highest')",
        )
    return None


# One query each, pages of 16, h32/8 d128 in bfloat16, XLA / ours in us: b1 s16384 92/35, s131072 611/213, b64 s8192
# 2492/771 (H100, 2026-11-26). Fewer logits are not measured.
def _cuda_paged_attention(case: dict[str, Any], differentiated: bool) -> Refusal | None:
    if differentiated:
        return refuse("the gradient gathers the pages anyway")
    if case["logits"] < _CUDA_DECODED_LOGITS:
        return refuse("{n} logits are few on a GPU, and not measured", n=case["logits"])
    return None


# float32, XLA / ours in ms: b1 s512 h8/2 d64 0.23/0.040, b8 s1024 h8/8 d64 25/3.4, b4 s4096 h8/2 d128 22/3.9, b1 s16384
# h8/8 d64 65/8.1 (two EPYC cores, 2026-11-26).
def _cpu_paged_attention(case: dict[str, Any], differentiated: bool) -> Refusal | None:
    if differentiated:
        return refuse("the gradient gathers the pages anyway")
    return None


# float32, ms, XLA with channels last / ours, with bias and relu: 1 x 8 x 8, 8 to 8 by 3 x 3 0.037 / 0.012; 28 x 28, 64
# to 8 by 3 x 3 0.121 / 0.096; 56 x 56, 64 to 3 0.29 / 0.35; 224 x 224, 3 to 32, stride 2, 1.70 / 0.16; 7 x 7, 64 to 128
# by 1 x 1 0.029 / 0.018; 64 x 28 x 28, 1 to 32 by 3 x 3 0.93 / 0.29; more, ResNet-50's too, in
# docs/kernels/convolution_cpu.md. With a maximum of 2 x 2: 64 x 28 x 28, 1 to 32, 0.93 / 0.37, 1024 of them 10.4 / 6.8;
# 64 x 14 x 14, 32 to 64, 2.46 / 2.24, 1024 41.1 / 35.8; 28 x 28, 1 to 32, 0.047 / 0.015; 224 x 224, 64 to 64, 22.1 /
# 17.0; of 4 x 4: 64 x 28 x 28, 1 to 32, 0.49 / 0.35. XLA computes other windows along, too, without an array between:
# where the kernel does not, 1024 x 14 x 14, 32 to 64, take 77 / 95 (AMD EPYC, AVX-512, two cores, jax 0.10.2,
# 2026-11-26).
_CPU_CONV_PRODUCTS, _CPU_CONV_DEPTH, _CPU_CONV_FEATURES = 1 << 18, 9, 8
_CPU_CONV_POOL = 16  # pixels of a window
_CPU_CONV_WINDOW_RESULTS = 1 << 21  # 8 MiB


def _cpu_linear(case: dict[str, Any], differentiated: bool) -> Refusal | None:
    if differentiated:
        return refuse("XLA keeps what the gradient needs as it is on the CPU")
    if not 1 < case["rows"] <= CPU_LINEAR_ROWS:
        return refuse("XLA's product of {rows} rows is as fast on the CPU", rows=case["rows"])
    return None


def _cpu_conv(case: dict[str, Any], differentiated: bool) -> Refusal | None:
    if differentiated:
        return refuse("XLA keeps what the gradient needs as it is on the CPU")
    if native.instruction_set() != "avx512":
        return refuse("the kernel is measured with AVX-512 only, which this CPU has not")
    if case["k"] < _CPU_CONV_DEPTH or case["n"] < _CPU_CONV_FEATURES:
        return refuse("XLA's convolution is as fast for sums of {k} terms to {n} features", k=case["k"], n=case["n"])
    results = case["pixels"] * case["n"]
    if case["in_window"] and results > _CPU_CONV_WINDOW_RESULTS:
        return refuse("XLA computes the window behind it along, and never writes these {n} numbers", n=results)
    window = math.prod(case["pool"])
    if window > _CPU_CONV_POOL:
        return refuse("a maximum of {n} pixels is not measured", n=window)
    products = case["pixels"] * case["k"] * case["n"]
    if products < _CPU_CONV_PRODUCTS:
        return refuse("XLA's convolution is as fast for {n} products on the CPU", n=products)
    return None


# bfloat16, XLA / ours in us (rows x k x n; H100, jax 0.11.2, 2026-11-26; all of them in benchmarks/h100/results):
#                     16384x768x3072  4096x1024x4096  8192x3072x768  8192x4096x4096
# bias alone              127/125         61/58          63/66           414/428
# residual                170/151         71/67          70/71           449/440; in another run 405/433
# silu                    216/135         81/57          71/65           458/419
# gelu_erf                311/141        108/61          80/68           548/424
# with gradient, silu     571/513        252/206        212/215        1404/1334
#                erf      723/527        252/223        232/219        1469/1321
#                tanh     618/503        225/214        219/216        1408/1332
# A layer of a chain of square weights, gelu_erf, tanh, silu: 512x4096x4096 36/32, 32/32, 32/31; 2048x1024x1024 17/12,
# 14/12, 14/12; but 1024x1024x1024 12/12, 10/12, 10/11, 512x1024x1024 11/12, 10/11, 10/11; 128 rows and fewer 1.1 to
# 2.4 times XLA's.
_LINEAR_ACTIVATIONS = ("gelu_erf", "gelu_tanh", "silu")
_LINEAR_ROWS, _LINEAR_RESULTS = 512, 1 << 21  # results: 128 tiles, one for each multiprocessor
_MEASURED_ROWS = 4096  # with a residual, and in training
_RESIDUAL_FEATURES = 1024  # up to which the product is short enough for XLA's to wait for the residual
_GATED_LINEAR_ROWS = 2048


def _cuda_linear(case: dict[str, Any], differentiated: bool) -> Refusal | None:
    rows, parts = case["rows"], case["parts"].split(", ")
    if "residual" in parts:
        if case["activation"] != "none" or differentiated or rows < _MEASURED_ROWS:
            return refuse("the kernel is not measured for {what}, {rows} rows", what=case["parts"], rows=rows)
        if case["k"] > _RESIDUAL_FEATURES:
            return refuse("XLA's product is as fast with a residual for {k} features", k=case["k"])
        return None
    if case["activation"] not in _LINEAR_ACTIVATIONS:
        return refuse("XLA's product is as fast with {what}", what=case["parts"])
    if rows < _LINEAR_ROWS or rows * case["n"] < _LINEAR_RESULTS:
        return refuse("XLA's product is as fast for {rows} x {n} results", rows=rows, n=case["n"])
    if case["in_loop"]:
        return refuse("XLA computes the activation inside the loop that follows, without a pass of memory")
    if differentiated and rows < _MEASURED_ROWS:
        return refuse("with its gradient the kernel is not measured for {rows} rows", rows=rows)
    if differentiated and case["activation"] == "silu" and case["k"] > case["n"]:
        return refuse("XLA's gradient of silu is as fast where {k} features become {n}", k=case["k"], n=case["n"])
    return None


def _cuda_gated_linear(case: dict[str, Any], differentiated: bool) -> Refusal | None:
    # bfloat16, XLA / ours in us, silu, forward and with its gradient: 16384x768x3072 347/235, 1049/966; 8192x3072x768
    # 135/124, 465/452; 8192x4096x4096 921/834, 2759/2690; 2048x768x3072 70/46, 156/142 (rows x k x n; H100,
    # jax 0.11.2, 2026-11-26). Fewer rows are not measured.
    del differentiated
    if case["rows"] < _GATED_LINEAR_ROWS:
        return refuse("the kernel is not measured for {rows} rows", rows=case["rows"])
    return None


# Columns up to which a row stays in registers, by bytes of an element: forward, backward. Past them the kernels read
# rows twice: layer_norm float32 512x65536 forward 1.45 TB/s, bfloat16 128x4x65536 backward 0.53 (H100, 2026-11-22).
_ROW_LIMIT = {2: (65536, 16384), 4: (32768, 8192)}
_VECTOR_BYTES = 16


def _cuda_rows(case: dict[str, Any], differentiated: bool) -> Refusal | None:
    itemsize = jnp.dtype(case["dtype"]).itemsize
    limit = _ROW_LIMIT[itemsize][differentiated]
    if case["cols"] > limit:
        return refuse(
            "rows of {cols} {dtype} do not fit the registers of a block; XLA is faster past {limit}",
            cols=case["cols"],
            dtype=case["dtype"],
            limit=limit,
        )
    return _unaligned(case)


# A custom call in a graph of launches costs a microsecond more than XLA's own loop. A layer of one product and one
# norm, pre-norm / post-norm, speed against XLA: bfloat16 512 x 768 0.93 / 0.99, 128 x 2048 0.90, 512 x 2048 0.94,
# 256 x 4096 0.91, 2048 x 768 1.00 / 0.99; float32 512 x 768 0.93 / 0.91, 1024 x 768 1.16 / 1.08, 128 x 4096 0.97,
# 512 x 4096 1.06. One row before a product, which XLA fuses badly: 768 columns 1.5 (bfloat16), 1.1 to 1.3 (float32),
# 4096 0.87 (H100, jax 0.11.2, 2026-11-26).
_CUDA_NORM_BYTES = 1 << 21
_ONE_ROW = 2048


def _cuda_norm(case: dict[str, Any], differentiated: bool) -> Refusal | None:
    is_one_row = case["size"] == case["cols"] <= _ONE_ROW
    if case["size"] * jnp.dtype(case["dtype"]).itemsize <= _CUDA_NORM_BYTES and not is_one_row:
        return refuse("XLA's loop is as fast for {n} elements on a GPU", n=case["size"])
    return _cuda_rows(case, differentiated)


def _unaligned(case: dict[str, Any]) -> Refusal | None:
    if case["cols"] * jnp.dtype(case["dtype"]).itemsize % _VECTOR_BYTES == 0:
        return None
    return refuse(
        "rows of {cols} {dtype} are no multiple of 16 bytes",
        cols=case["cols"],
        dtype=case["dtype"],
        advice="pad the axis: unaligned rows run at a third of the bandwidth",
    )


def _cuda_softmax(case: dict[str, Any], differentiated: bool) -> Refusal | None:
    # bfloat16 forward, XLA / ours in us, 2^25 elements: cols 128 101/57, 1024 to 8192 52-56/52-54, 16384 65/53,
    # 32768 110/55. With its gradient XLA fuses what is around it: 92-182/190-196 (H100, 2026-11-23).
    if differentiated or 128 < case["cols"] < 16384:
        return refuse(
            "XLA's softmax of rows of {cols} is as fast on a GPU, and fuses with what is around it", cols=case["cols"]
        )
    return _cuda_rows(case, differentiated)


def _cuda_activation(case: dict[str, Any], differentiated: bool) -> Refusal | None:
    del case, differentiated
    return refuse("on a GPU XLA computes elementwise functions inside the loops around them, without a pass of memory")


# Milliseconds of processor time of a 3-layer encoder of 384, XLA's products / ours, at 32, 256 and 512 rows: 6.6/4.8,
# 32.7/30.2, 62.6/58.7 (AMD EPYC, AVX-512, jax 0.10.2, 2026-11-26). XLA packs the weights in each call, which costs most
# where rows are few; more are not measured. One row is a product by a vector, of which XLA packs nothing: 12 layers of
# 384 x 1536, 1, 2 and 16 rows: 2.1/3.1, 2.8/2.1, 4.6/3.7.
CPU_LINEAR_ROWS = 512
# Gated activations on an H100, XLA / ours in us (jax 0.11.2, 2026-11-26), 16384 x 3072:
#                          bfloat16                                    float32
#              of two          of halves           of two          of halves
#             fwd     bwd      fwd      bwd        fwd     bwd     fwd     bwd
# silu      104/105 173/173  104/105  172/173    204/205 340/340 204/204 340/340
# gelu_tanh 104/105 173/172  104/105  278/173    205/205 342/342 204/204 340/341
# gelu_erf  156/105 194/173  155/105  348/173    203/203 342/341 204/203 556/340
# 2048 x 3072 is 0.93 to 1.13 x but for gelu_erf's gradient of halves, 1.5 x: launches.
_CUDA_GATED_ELEMENTS = 1 << 24
_AT_BANDWIDTH = "on a GPU XLA's loop for it is at the speed of a copy"


def _cuda_gated_silu(case: dict[str, Any], differentiated: bool) -> Refusal | None:
    del case, differentiated
    return refuse(_AT_BANDWIDTH)


def _cuda_gated_gelu_tanh(case: dict[str, Any], differentiated: bool) -> Refusal | None:
    if jnp.dtype(case["dtype"]).itemsize == 2 and case["halves"] and differentiated:
        return _cuda_small_gated(case)
    return refuse(_AT_BANDWIDTH)


def _cuda_gated_gelu_erf(case: dict[str, Any], differentiated: bool) -> Refusal | None:
    if jnp.dtype(case["dtype"]).itemsize == 2 or (case["halves"] and differentiated):
        return _cuda_small_gated(case)
    return refuse(_AT_BANDWIDTH)


def _cuda_small_gated(case: dict[str, Any]) -> Refusal | None:
    if case["size"] < _CUDA_GATED_ELEMENTS:
        return refuse("XLA's loop is as fast for {n} elements on a GPU", n=case["size"])
    return None


def _cpu_batch_norm(case: dict[str, Any], differentiated: bool) -> Refusal | None:
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


# cuDNN adds a vector and applies relu in its epilogue, which XLA finds when nothing else stands between. us,
# convolution / with batch norm and relu / folded, 32 images: 56 x 56 of 64 to 256 by 1 x 1 float32 61 / 131 / 60,
# bfloat16 46 / 68 / 50; of 64 to 64 by 3 x 3 53 / 67 / 53, 68 / 72 / 72; 14 x 14 of 256 to 256 by 3 x 3
# 110 / 125 / 116, 73 / 82 / 80 (H100, jax 0.11.2, 2026-11-26). So there is no rule against a convolution.


def _cuda_batch_norm(case: dict[str, Any], differentiated: bool) -> Refusal | None:
    del differentiated
    if case["of"] == "product":
        return refuse(
            "folded into a product's weights it is not measured on a GPU yet",
            advice="zenith.configure(use_cost=False) takes it",
        )
    return None


# bfloat16, XLA / ours in us, forward and backward, through JAX: 8x64x64x320 76/56, 144/100, with silu 68/46, 302/131;
# 16x128x128x128 98/80, 153/237; float32 8x64x64x320 58/52, 108/135 (32 groups, H100, jax 0.11.2, 2026-11-26). Of
# smaller images most of the time was the host's: 8x32x32x640 72/56, 74/106; 8x16x16x1280 48/55, 49/76.
_GROUP_NORM_ELEMENTS = 1 << 23


def _cuda_group_norm(case: dict[str, Any], differentiated: bool) -> Refusal | None:
    if case["size"] < _GROUP_NORM_ELEMENTS:
        return refuse(
            "groups of {n} elements in all are not measured on a GPU without the host's part in the time",
            n=case["size"],
            advice="zenith.configure(use_cost=False) takes it",
        )
    if differentiated and not case["silu"]:
        return refuse("XLA's gradient of a group norm without silu takes 153 us where the kernel takes 237, on an H100")
    return None


# us, XLA / ours, of (1, 512, 32, 128): halves put together 3055 / 500, x * cos + rotate_half(x) * sin 3784 / 500,
# neighbours 869 / 621; backward 2504 / 529, 783 / 529, 705 / 669. bfloat16 2532 / 190, 3044 / 190, 700 / 353; backward
# 2829 / 196, 7579 / 196, 6884 / 599. One token of 32 heads 7 to 8 / 8; (1, 64, 8, 64) float32 13 to 72 / 12 to 20,
# bfloat16 26 to 275 / 12 to 17 (two cores, AVX-512, jax 0.10.2, 2026-11-26).
def _cpu_rope(case: dict[str, Any], differentiated: bool) -> Refusal | None:
    del differentiated
    if case["size"] < 16384:
        return refuse("XLA is as fast for {n} elements on the CPU", n=case["size"])
    return None


# us, a copy / XLA / ours, query and key in one program (H100, jax 0.11.2, 2026-11-26), 4x4096x(32+8)x128: bfloat16
# neighbours 125/210/128, backward 125/133/128, halves 125/126/130; float32 235/256/248, 235/243/246.
# 1x4096x(32+8)x128 neighbours 43/60/45, 8x1024x(16+16)x64 38/49/40; of 1x512x(32+8)x128 most is the host's.
_CUDA_ROPE_ELEMENTS = 1 << 22


def _cuda_rope(case: dict[str, Any], differentiated: bool) -> Refusal | None:
    del differentiated
    if not case["interleaved"] or jnp.dtype(case["dtype"]).itemsize > 2:
        return refuse(_AT_BANDWIDTH)
    if case["size"] < _CUDA_ROPE_ELEMENTS:
        return refuse("XLA's loop is as fast for {n} elements on a GPU", n=case["size"])
    return None


def _cuda_grouped_conv(case: dict[str, Any], differentiated: bool) -> Refusal | None:
    del case, differentiated
    return refuse("a loop of products is faster than XLA's convolution on the CPU; on a GPU that is cuDNN's")


# float32, ms, XLA / ours, at 1, 8, 16 and 32 rows (AMD EPYC, AVX-512, two cores, jax 0.10.2, 2026-11-26):
#                   int8, one scale a feature                       int4, groups of 128
# 512 x 512    0.085/0.019 0.188/0.088 0.222/0.099 0.275/0.221   0.191/0.022 0.257/0.062 0.323/0.115 0.389/0.250
# 1024 x 1024  0.238/0.096 0.381/0.221 0.518/0.404 0.554/0.437   0.657/0.105 0.772/0.254 0.952/0.493 0.975/0.962
# 2048 x 2048  1.52/0.51   1.98/0.48   4.10/1.12   4.97/1.95     2.44/0.27   3.29/0.60   3.58/1.10   4.26/2.19
# More rows of float32 by int8, one scale a feature, take the tiles of linear.h. 12 layers 768 x 3072 and 3072 x 768,
# ms, XLA / ours / XLA with float32 weights (same machine, alone on it): 17 rows 65/13/27, 32 76/19/35, 64 83/32/54,
# 128 70/36/47, 256 102/70/82, 512 180/141/153, 1024 333/284/295; weights as (n, k) 86/14, 96/21, 106/33, 79/36, 115/70,
# 193/142, 346/286. Smaller weights and more rows are not measured.
_CPU_QUANTIZED_ROWS, _CPU_QUANTIZED_WEIGHTS = 16, 1 << 18
_CPU_TILED_ROWS = 1024


def _cpu_quantized_linear(case: dict[str, Any], differentiated: bool) -> Refusal | None:
    del differentiated  # the gradient's product is XLA's in any case
    is_tiled = case["dtype"] == "float32" and case["w_dtype"] == "int8" and case["groups"] == 1
    if case["rows"] > (_CPU_TILED_ROWS if is_tiled else _CPU_QUANTIZED_ROWS):
        return refuse("XLA's product of {rows} rows is as fast on the CPU", rows=case["rows"])
    if case["k"] * case["n"] < _CPU_QUANTIZED_WEIGHTS:
        return refuse("XLA is as fast for {k} x {n} weights on the CPU", k=case["k"], n=case["n"])
    return None


# bfloat16, XLA / ours in us, weights from memory (H100, jax 0.11.2, 2026-11-26):
#                  int8, 1 row  16 rows    int8 (n, k), 1 row  16 rows    int4 in groups of 128, 1 row  16 rows
# 4096 x 4096      11.0/9.2     12.2/10.5  9.2/9.6             11.8/11.0  26/7.0                        30/9.2
# 4096 x 14336     45.7/23.4    33.1/26.8  28.3/25.0           31.6/28.2  111/14                        117/17
# 14336 x 4096     30.6/24.8    28.7/26.3  26.5/25.5           29.3/26.2  112/16                        113/19
# 8192 x 8192      31.3/27.1    33.6/29.5  28.7/28.4           35.0/30.8  126/17                        132/19
# 4096 x 4096 of int8 (n, k): 4 rows 9.5/9.6, 8 rows 10.2/9.9. Before Hopper the kernel is another, which for 16 rows of
# int8 was slower than XLA's (on an H100). Smaller weights, int4 of one scale a feature and more rows of int8 in groups
# are not measured.
_CUDA_QUANTIZED_WEIGHTS = 1 << 24
_CUDA_INT8_COLUMNS_WEIGHTS = 1 << 25


def _cuda_quantized_linear(case: dict[str, Any], differentiated: bool) -> Refusal | None:
    del differentiated  # the gradient's product is XLA's in any case
    is_4_bit = jnp.dtype(case["w_dtype"]) == jnp.int4
    weights = case["k"] * case["n"]
    if weights < _CUDA_QUANTIZED_WEIGHTS or (is_4_bit and case["groups"] == 1):
        return refuse(
            "measured on a GPU are weights from 4096 x 4096 on, int4 ones in groups",
            advice="zenith.configure(use_cost=False) takes the kernel",
        )
    if is_4_bit or (case["rows"] == 1 and not case["transposed"]):
        return None
    if case["groups"] > 1 or compute_capability() != HOPPER:
        return refuse("int8 of more than a row, or (n, k), is measured on Hopper, with one scale a feature")
    if case["transposed"] and case["rows"] < 8 and weights <= _CUDA_INT8_COLUMNS_WEIGHTS:
        return refuse(
            "XLA's product of int8 weights stored (n, k) is as fast for {rows} rows by {k} x {n}",
            rows=case["rows"], k=case["k"], n=case["n"],
        )  # fmt: skip
    return None


RULES: dict[tuple[str, str], Callable[[dict[str, Any], bool], Refusal | None]] = {
    ("cpu", "attention"): _cpu_attention,
    ("cpu", "paged_attention"): _cpu_paged_attention,
    ("cpu", "conv"): _cpu_conv,
    ("cpu", "linear"): _cpu_linear,
    ("cpu", "quantized_linear"): _cpu_quantized_linear,
    ("cpu", "gelu_erf"): _cpu_activation,
    ("cpu", "gelu_tanh"): _cpu_activation,
    ("cpu", "silu"): _cpu_activation,
    ("cpu", "gated_gelu_erf"): _cpu_activation,
    ("cpu", "gated_gelu_tanh"): _cpu_activation,
    ("cpu", "gated_silu"): _cpu_activation,
    ("cpu", "batch_norm"): _cpu_batch_norm,
    ("cpu", "rope"): _cpu_rope,
    ("cpu", "softmax"): _small_rows,
    ("cpu", "cross_entropy"): _cpu_cross_entropy,
    ("cpu", "linear_cross_entropy"): _cpu_linear_cross_entropy,
    ("cpu", "layer_norm"): _cpu_norm,
    ("cpu", "rms_norm"): _cpu_norm,
    ("cpu", "add_layer_norm"): _cpu_norm,
    ("cpu", "add_rms_norm"): _cpu_norm,
    ("cuda", "attention"): _cuda_attention,
    ("cuda", "paged_attention"): _cuda_paged_attention,
    ("cuda", "linear"): _cuda_linear,
    ("cuda", "gated_linear"): _cuda_gated_linear,
    ("cuda", "quantized_linear"): _cuda_quantized_linear,
    ("cuda", "batch_norm"): _cuda_batch_norm,
    ("cuda", "grouped_conv"): _cuda_grouped_conv,
    ("cuda", "group_norm"): _cuda_group_norm,
    ("cuda", "rope"): _cuda_rope,
    ("cuda", "layer_norm"): _cuda_norm,
    ("cuda", "rms_norm"): _cuda_norm,
    ("cuda", "add_layer_norm"): _cuda_norm,
    ("cuda", "add_rms_norm"): _cuda_norm,
    ("cuda", "softmax"): _cuda_softmax,
    ("cuda", "cross_entropy"): _cuda_cross_entropy,
    ("cuda", "linear_cross_entropy"): _cuda_linear_cross_entropy,
    ("cuda", "gelu_erf"): _cuda_activation,
    ("cuda", "gelu_tanh"): _cuda_activation,
    ("cuda", "silu"): _cuda_activation,
    ("cuda", "gated_gelu_erf"): _cuda_gated_gelu_erf,
    ("cuda", "gated_gelu_tanh"): _cuda_gated_gelu_tanh,
    ("cuda", "gated_silu"): _cuda_gated_silu,
}


@dataclasses.dataclass(frozen=True, eq=False)  # by identity: JAX's caches hold it
class Choices:
    """Times measured for sites, by `Site.key`: microseconds of Zenith's kernel and of XLA's code."""

    times: Mapping[str, tuple[float, float]]

    def declined(self, key: str) -> Refusal | None:
        fused_us, xla_us = self.times.get(key, (0.0, 1.0))
        if fused_us < xla_us:
            return None
        return refuse("XLA was faster here, {xla:.3g} us against {fused:.3g}", xla=xla_us, fused=fused_us)


def declined(match: Match, platform: str, *, differentiated: bool, use_cost: bool) -> Refusal | None:
    """Why the match is left to XLA on this platform, or None."""
    if match.declined is not None:
        return match.declined(platform)
    case = dict(match.case)
    if platform not in ("cpu", "cuda"):
        return refuse("there are no kernels for {platform}", platform=platform)
    unsupported = check_kernel_dtype(match.op, case["dtype"])
    if unsupported is not None:
        return unsupported
    if any(n == 0 for v in match.leaves for n in v.aval.shape):
        return refuse("an operand is empty")
    if match.op == "attention":
        unsupported = attention_unsupported(platform, head_size=max(case["d"], case["e"]))
        if unsupported is not None:
            return unsupported
    if match.op == "paged_attention":
        names = ("dtype", "sequences", "groups", "t", "page_size", "d", "e")
        unsupported = paged_attention_unsupported(platform, **{name: case[name] for name in names})
        if unsupported is not None:
            return unsupported
    if match.op == "group_norm":
        unsupported = group_norm_unsupported(
            platform, **{name: case[name] for name in ("dtype", "channels_last", "width", "groups")}
        )
        if unsupported is not None:
            return unsupported
    if match.op in ("linear", "gated_linear"):
        of_op = linear_unsupported if match.op == "linear" else gated_linear_unsupported
        unsupported = of_op(platform, dtype=case["dtype"], w_dtype=case["dtype"], k=case["k"], n=case["n"])
        if unsupported is not None:
            return unsupported
    if match.op == "conv":
        unsupported = conv_unsupported(platform, case["dtype"])
        if unsupported is not None:
            return unsupported
    if match.op == "quantized_linear":
        unsupported = quantized_linear_unsupported(platform, **case)
        if unsupported is not None:
            return unsupported
    rule = RULES.get((platform, match.op))
    if use_cost and any(not isinstance(n, int) for v in match.leaves for n in v.aval.shape):
        return refuse("a dimension is symbolic, and what is faster depends on it")
    return rule(case, differentiated) if rule is not None and use_cost else None
