"""Rules for the kernels of NVIDIA GPUs."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from zenith_jax.errors import Refusal, refuse
from zenith_jax.ops.linear import HOPPER, compute_capability
from zenith_jax.passes.choose._rule import Rule, each_loss

# Logits below which launching is what a GPU's attention costs: bfloat16 d64, XLA / ours in us, forward and forward with
# backward: 0.2 M logits (b1 h12 s128) 5.9/6.7, 17/21; 1.6 M 12.3/10.9, 37/27; 3.1 M 13.8/13.2, 49/42; 25 M 93/30,
# 287/114 (H100, 2026-11-26).
_LOGITS = 2**20
# Decoding is bound by reading keys and values: b1 h32/8 d128 of 16384 keys, half a million logits, XLA 37, ours 28;
# fewer are not measured.
_DECODED_QUERIES, _DECODED_LOGITS = 16, 2**19
# float32 in TensorFloat-32, as XLA's products of default precision, forward and with its gradient. d64: 0.2 M logits
# 6.6/6.5, 18/27; 1.6 M 16/9.7, 53/44; 3.1 M (b1 h12 s512) 23/16, 78/72; 6 M 54/27, 175/142; 17 M 116/44, 336/205; 25 M
# 184/58, 502/316; 268 M 1576/489, 4521/2716; d128: 1 M 15/11, 59/58; 25 M 212/140, 594/701; 268 M 1643/1306, 4926/6248;
# d256: 34 M 283/446, 901/3893. d64 with lengths: 1.6 M 18/13, 53/55; 25 M 221/81, 548/379; with a bias 18/13, 54/58;
# 220/104, 525/433 (H100, 2026-11-27). Where logits take gigabytes, being able to run at all counts more.
_TF32_D, _TF32_D_OF_A_GRADIENT = 128, 64
_TF32_MASKED_LOGITS_OF_A_GRADIENT = 24_000_000
_LARGE_BYTES = 2**32


def _attention(case: dict[str, Any], differentiated: bool) -> Refusal | None:
    logits = case["batch"] * case["t"] * case["s"]
    decodes = case["t"] <= _DECODED_QUERIES and case["dtype"] != "float32"
    if logits < (_DECODED_LOGITS if decodes else _LOGITS):
        return refuse("XLA is as fast for {n} logits on a GPU", n=logits)
    if case["dtype"] != "float32" or case["exact"] or 4 * logits >= _LARGE_BYTES:
        return None
    if case["t"] <= _DECODED_QUERIES:
        return refuse("{t} queries in float32 are not measured", t=case["t"], advice="decode in bfloat16")
    head = max(case["d"], case["e"])
    if head > (_TF32_D_OF_A_GRADIENT if differentiated else _TF32_D):
        return refuse(
            "XLA's TensorFloat-32 products are as fast for {d} features a head in float32",
            d=head,
            advice="compute in bfloat16",
        )
    if differentiated and (case["masked"] or case["bias"]) and logits < _TF32_MASKED_LOGITS_OF_A_GRADIENT:
        return refuse("XLA's gradient in float32 is as fast with a mask or bias for {n} logits", n=logits)
    return None


# One query each, pages of 16, h32/8 d128 in bfloat16, XLA / ours in us: b1 s16384 92/35, s131072 611/213, b64 s8192
# 2492/771 (H100, 2026-11-26). Fewer logits are not measured.
def _paged_attention(case: dict[str, Any], differentiated: bool) -> Refusal | None:
    if differentiated:
        return refuse("the gradient gathers the pages anyway")
    if case["logits"] < _DECODED_LOGITS:
        return refuse("{n} logits are few on a GPU, and not measured", n=case["logits"])
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


def _linear(case: dict[str, Any], differentiated: bool) -> Refusal | None:
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


def _gated_linear(case: dict[str, Any], differentiated: bool) -> Refusal | None:
    # bfloat16, XLA / ours in us, silu, forward and with its gradient: 16384x768x3072 347/235, 1049/966; 8192x3072x768
    # 135/124, 465/452; 8192x4096x4096 921/834, 2759/2690; 2048x768x3072 70/46, 156/142 (rows x k x n; H100,
    # jax 0.11.2, 2026-11-26). Fewer rows are not measured.
    del differentiated
    if case["rows"] < _GATED_LINEAR_ROWS:
        return refuse("the kernel is not measured for {rows} rows", rows=case["rows"])
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
_QUANTIZED_WEIGHTS = 1 << 24
_INT8_COLUMNS_WEIGHTS = 1 << 25


def _quantized_linear(case: dict[str, Any], differentiated: bool) -> Refusal | None:
    del differentiated  # the gradient's product is XLA's in any case
    is_4_bit = jnp.dtype(case["w_dtype"]) == jnp.int4
    weights = case["k"] * case["n"]
    if weights < _QUANTIZED_WEIGHTS or (is_4_bit and case["groups"] == 1):
        return refuse(
            "measured on a GPU are weights from 4096 x 4096 on, int4 ones in groups",
            advice="zenith.configure(use_cost=False) takes the kernel",
        )
    if is_4_bit or (case["rows"] == 1 and not case["transposed"]):
        return None
    if case["groups"] > 1 or compute_capability() != HOPPER:
        return refuse("int8 of more than a row, or (n, k), is measured on Hopper, with one scale a feature")
    if case["transposed"] and case["rows"] < 8 and weights <= _INT8_COLUMNS_WEIGHTS:
        return refuse(
            "XLA's product of int8 weights stored (n, k) is as fast for {rows} rows by {k} x {n}",
            rows=case["rows"], k=case["k"], n=case["n"],
        )  # fmt: skip
    return None


# Bytes of a row up to which it crosses memory once: in the registers of a block, or in the blocks of a cluster. Without
# clusters a gradient holds 32 KiB: two rows and their sums. Past them the kernels read rows twice: layer_norm float32
# 512x65536 forward 1.45 TB/s (H100, 2026-11-22).
_ROW_BYTES = 1 << 17
_ROW_BYTES_OF_A_GRADIENT = 1 << 15  # without clusters
_VECTOR_BYTES = 16


def _rows(case: dict[str, Any], differentiated: bool) -> Refusal | None:
    in_a_block = differentiated and compute_capability() != HOPPER
    limit = (_ROW_BYTES_OF_A_GRADIENT if in_a_block else _ROW_BYTES) // jnp.dtype(case["dtype"]).itemsize
    if case["cols"] > limit:
        return refuse(
            "rows of {cols} {dtype} are too long to be read once; XLA is faster past {limit}",
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
_NORM_BYTES = 1 << 21
_ONE_ROW = 2048


def _norm(case: dict[str, Any], differentiated: bool) -> Refusal | None:
    is_one_row = case["size"] == case["cols"] <= _ONE_ROW
    if case["size"] * jnp.dtype(case["dtype"]).itemsize <= _NORM_BYTES and not is_one_row:
        return refuse("XLA's loop is as fast for {n} elements on a GPU", n=case["size"])
    return _rows(case, differentiated)


# An encoder as Flax writes it, mean(x^2) - mean(x)^2, and in two passes, float32, us of a queued call: 12 layers of
# 768, one sentence of 128 tokens 699 / 641, four 1047 / 989; of 384, two 604 / 537; 6 of 1024, one 427 / 406 (H100,
# 2026-11-27).
def _norm_in_two_passes(case: dict[str, Any], differentiated: bool) -> Refusal | None:
    if differentiated or case["dtype"] != "float32" or case["size"] * 4 > _NORM_BYTES:
        return refuse("another form is measured for small ones of float32, without gradients")
    return None


def _softmax(case: dict[str, Any], differentiated: bool) -> Refusal | None:
    # bfloat16 forward, XLA / ours in us, 2^25 elements: cols 128 101/57, 1024 to 8192 52-56/52-54, 16384 65/53,
    # 32768 110/55 (H100, 2026-11-23). With its gradient XLA fuses what is around it, XLA / ours: 32768 x 1024 behind a
    # scale and before a product of elements 178/232, between two matrix products 362/316; 8192 x 1024 43/60, 96/96
    # (2026-11-27).
    if differentiated or 128 < case["cols"] < 16384:
        return refuse(
            "XLA's softmax of rows of {cols} is as fast on a GPU, and fuses with what is around it", cols=case["cols"]
        )
    return _rows(case, differentiated)


# Loss, and with its gradient of logits that the program makes, XLA / ours in us (rows x classes, H100, 2026-11-26):
# bfloat16 8192x1024 52/47, 103/54; 8192x8192 154/65, 825/371; 8192x50304 611/387, 3818/2057; float32 127/33, 134/82;
# 196/109, 1085/649; 1086/628, 5930/3935. Of smaller ones most of the time is the host's.
_CROSS_ENTROPY_LOGITS = 1 << 23


def _cross_entropy(case: dict[str, Any], differentiated: bool) -> Refusal | None:
    del differentiated
    if case["size"] < _CROSS_ENTROPY_LOGITS:
        return refuse("{n} logits are little on a GPU, and not measured without the host's part", n=case["size"])
    return _unaligned(case)


def _linear_cross_entropy(case: dict[str, Any], differentiated: bool) -> Refusal | None:
    # Value and gradients in ms, XLA / ours, bfloat16: 8192x768x50304 4.88 / 3.99, 8192x4096x128256 44.2 / 43.2
    # (tokens x features x classes; H100, 2026-11-26). Smaller ones are not measured.
    if case["size"] < 1 << 27:
        return refuse("{n} logits are little on a GPU, and not measured", n=case["size"])
    return each_loss(case, differentiated) or _unaligned(case)


def _unaligned(case: dict[str, Any]) -> Refusal | None:
    if case["cols"] * jnp.dtype(case["dtype"]).itemsize % _VECTOR_BYTES == 0:
        return None
    return refuse(
        "rows of {cols} {dtype} are no multiple of 16 bytes",
        cols=case["cols"],
        dtype=case["dtype"],
        advice="pad the axis: unaligned rows run at a third of the bandwidth",
    )


def _activation(case: dict[str, Any], differentiated: bool) -> Refusal | None:
    del case, differentiated
    return refuse("on a GPU XLA computes elementwise functions inside the loops around them, without a pass of memory")


# Gated activations on an H100, XLA / ours in us (jax 0.11.2, 2026-11-26), 16384 x 3072:
#                          bfloat16                                    float32
#              of two          of halves           of two          of halves
#             fwd     bwd      fwd      bwd        fwd     bwd     fwd     bwd
# silu      104/105 173/173  104/105  172/173    204/205 340/340 204/204 340/340
# gelu_tanh 104/105 173/172  104/105  278/173    205/205 342/342 204/204 340/341
# gelu_erf  156/105 194/173  155/105  348/173    203/203 342/341 204/203 556/340
# 2048 x 3072 is 0.93 to 1.13 x but for gelu_erf's gradient of halves, 1.5 x: launches.
_GATED_ELEMENTS = 1 << 24
_AT_BANDWIDTH = "on a GPU XLA's loop for it is at the speed of a copy"


def _gated_silu(case: dict[str, Any], differentiated: bool) -> Refusal | None:
    del case, differentiated
    return refuse(_AT_BANDWIDTH)


def _gated_gelu_tanh(case: dict[str, Any], differentiated: bool) -> Refusal | None:
    if jnp.dtype(case["dtype"]).itemsize == 2 and case["halves"] and differentiated:
        return _small_gated(case)
    return refuse(_AT_BANDWIDTH)


def _gated_gelu_erf(case: dict[str, Any], differentiated: bool) -> Refusal | None:
    if jnp.dtype(case["dtype"]).itemsize == 2 or (case["halves"] and differentiated):
        return _small_gated(case)
    return refuse(_AT_BANDWIDTH)


def _small_gated(case: dict[str, Any]) -> Refusal | None:
    if case["size"] < _GATED_ELEMENTS:
        return refuse("XLA's loop is as fast for {n} elements on a GPU", n=case["size"])
    return None


# cuDNN adds a vector and applies relu in its epilogue, which XLA finds when nothing else stands between. us,
# convolution / with batch norm and relu / folded, 32 images: 56 x 56 of 64 to 256 by 1 x 1 float32 61 / 131 / 60,
# bfloat16 46 / 68 / 50; of 64 to 64 by 3 x 3 53 / 67 / 53, 68 / 72 / 72; 14 x 14 of 256 to 256 by 3 x 3
# 110 / 125 / 116, 73 / 82 / 80 (H100, jax 0.11.2, 2026-11-26). So there is no rule against a convolution.


def _batch_norm(case: dict[str, Any], differentiated: bool) -> Refusal | None:
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


def _group_norm(case: dict[str, Any], differentiated: bool) -> Refusal | None:
    if case["size"] < _GROUP_NORM_ELEMENTS:
        return refuse(
            "groups of {n} elements in all are not measured on a GPU without the host's part in the time",
            n=case["size"],
            advice="zenith.configure(use_cost=False) takes it",
        )
    if differentiated and not case["silu"]:
        return refuse("XLA's gradient of a group norm without silu takes 153 us where the kernel takes 237, on an H100")
    return None


# us, a copy / XLA / ours, query and key in one program (H100, jax 0.11.2, 2026-11-26), 4x4096x(32+8)x128: bfloat16
# neighbours 125/210/128, backward 125/133/128, halves 125/126/130; float32 235/256/248, 235/243/246.
# 1x4096x(32+8)x128 neighbours 43/60/45, 8x1024x(16+16)x64 38/49/40; of 1x512x(32+8)x128 most is the host's.
_ROPE_ELEMENTS = 1 << 22


def _rope(case: dict[str, Any], differentiated: bool) -> Refusal | None:
    del differentiated
    if not case["interleaved"] or jnp.dtype(case["dtype"]).itemsize > 2:
        return refuse(_AT_BANDWIDTH)
    if case["size"] < _ROPE_ELEMENTS:
        return refuse("XLA's loop is as fast for {n} elements on a GPU", n=case["size"])
    return None


def _grouped_conv(case: dict[str, Any], differentiated: bool) -> Refusal | None:
    del case, differentiated
    return refuse("a loop of products is faster than XLA's convolution on the CPU; on a GPU that is cuDNN's")


RULES: dict[str, Rule] = {
    "attention": _attention,
    "paged_attention": _paged_attention,
    "linear": _linear,
    "gated_linear": _gated_linear,
    "quantized_linear": _quantized_linear,
    "batch_norm": _batch_norm,
    "grouped_conv": _grouped_conv,
    "group_norm": _group_norm,
    "rope": _rope,
    "layer_norm": _norm,
    "layer_norm_in_two_passes": _norm_in_two_passes,
    "rms_norm": _norm,
    "add_layer_norm": _norm,
    "add_rms_norm": _norm,
    "softmax": _softmax,
    "cross_entropy": _cross_entropy,
    "linear_cross_entropy": _linear_cross_entropy,
    "gelu_erf": _activation,
    "gelu_tanh": _activation,
    "silu": _activation,
    "gated_gelu_erf": _gated_gelu_erf,
    "gated_gelu_tanh": _gated_gelu_tanh,
    "gated_silu": _gated_silu,
}
