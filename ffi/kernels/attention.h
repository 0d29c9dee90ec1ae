// Contract of the attention kernels, the same for every back end.
//
//   logits[b,h,t,s] = cap(scale * sum_d query[b,h,t,d] * key[b,h/groups,s,d]) + bias[b,h,t,s]
//   cap(x) = softcap * tanh(x / softcap), or x where softcap is 0
//   allowed[b,h,t,s] = (-left <= s - t <= right) and mask[b,h,t,s]
//                      and first[b,h,t] <= s < last[b,h,t]
//                      and query_segments[b,h,t] == key_segments[b,h,s]
//   out[b,h,t,e]    = sum_s softmax_s(logits where allowed)[b,h,t,s] * value[b,h/groups,s,e]
//
// Axes: b batch, h = kv_head * groups + group query heads, t query length, s key length,
// d query/key features, e value features. Dao et al. 2022, arXiv:2205.14135; Dao 2023,
// arXiv:2307.08691.
#pragma once

#include <cstdint>

#include "ffi/kernels/types.h"

namespace zenith {

/// `left` and `right` of a band that has no bound on that side.
inline constexpr int64_t kUnbounded = int64_t{1} << 40;

/// What a row without any allowed key returns.
enum class MaskedRow : int32_t {
  kNan = 0,   // softmax over -inf only: the row is NaN
  kMean = 1,  // softmax over equal finite fills: the mean of `value` over all kv_len keys
};

/// Element strides of a (batch, head, length, feature) tensor; the feature stride is 1.
struct HeadStrides {
  int64_t batch = 0, head = 0, length = 0;
};

/// Element strides of a tensor broadcast to (batch, kv_head, group, query, key) or to some of these
/// axes; 0 where its size is 1.
struct ScoreStrides {
  int64_t batch = 0, kv_head = 0, group = 0, query = 0, key = 0;
};

struct AttentionProblem {
  DType dtype;  // of query, key, value, out and their cotangents
  /// Whether products may round float32 factors to TensorFloat-32, 10 bits of mantissa; a kernel
  /// need not. Without effect on other types.
  bool allow_tf32 = false;
  int64_t batch, kv_heads, groups, q_len, kv_len, qk_dim, v_dim;  // any may be 0
  float scale;
  float softcap = 0;    // 0: none; never negative
  int64_t left, right;  // band of allowed s - t; kUnbounded where open. Causal: left open, right 0
  MaskedRow masked_row;

  const void *query, *key, *value;
  HeadStrides query_strides, key_strides, value_strides, out_strides;

  const bool* mask = nullptr;  // true = attend; null when absent
  ScoreStrides mask_strides;
  const void* bias = nullptr;  // null when absent
  DType bias_dtype = DType::kF32;
  ScoreStrides bias_strides;

  /// `first` and `last` of each query, side by side; any values. Null when absent. Keys outside of
  /// all of a block's intervals are not read.
  const int32_t* interval = nullptr;
  ScoreStrides interval_strides;                                     // key: 1, from first to last
  const int32_t *query_segments = nullptr, *key_segments = nullptr;  // both or none
  ScoreStrides query_segments_strides, key_segments_strides;

  /// Scratch in which a kernel may keep what it makes of mask, interval and segments, 16-byte
  /// aligned: with at least MaskScratchWords of it, Hopper's leave out what is masked. With less,
  /// or null, they do without.
  uint32_t* mask_scratch = nullptr;
  int64_t mask_scratch_words = 0;
};

/// The axes along which mask, interval and segments vary, but for the key axis.
struct ScoreAxes {
  bool batch, kv_head, group, query;
};
inline ScoreAxes MaskAxes(const AttentionProblem& p) {
  const ScoreStrides *m = &p.mask_strides, *i = &p.interval_strides;
  const ScoreStrides *q = &p.query_segments_strides, *k = &p.key_segments_strides;
  return {.batch = (m->batch | i->batch | q->batch | k->batch) != 0,
          .kv_head = (m->kv_head | i->kv_head | q->kv_head | k->kv_head) != 0,
          .group = (m->group | i->group) != 0,
          .query = (m->query | i->query | q->query) != 0};
}

/// A byte for each 64 x 32 scores of every matrix that differs in what is masked; and with a mask
/// the bits by query and by key, in rows of whole 16 bytes. `_scratch_words` of
/// zenith_jax/ops/attention_kernels.py.
inline int64_t MaskScratchWords(const AttentionProblem& p) {
  const auto round_up = [](int64_t x, int64_t step) { return (x + step - 1) / step * step; };
  const ScoreAxes axes = MaskAxes(p);
  const int64_t matrices =
      (axes.batch ? p.batch : 1) * (axes.kv_head ? p.kv_heads : 1) * (axes.group ? p.groups : 1);
  const int64_t queries = axes.query ? p.q_len : 1, row_words = round_up(p.kv_len, 128) / 32;
  const int64_t column_words = round_up(queries, 128) / 32;
  const int64_t bits = p.mask ? queries * row_words + p.kv_len * column_words : 0;
  return matrices * bits + round_up(matrices * (round_up(queries, 64) / 64) * row_words / 4, 4);
}

/// Softmax and products accumulate in float32 whatever `dtype`.
/// out: `out_strides`, dtype. lse: dense (batch, head, t), float32: log-sum-exp of the allowed
/// logits (natural logarithm), -inf for a row without an allowed key, whatever `masked_row`. kv_len
/// == 0 counts as rows without an allowed key; kMean is then NaN too. Fully overwrites its results.
/// Bit-reproducible.
///
/// lse_rest: what lse lacks of the log-sum-exp, dense (batch, head, t), float32. A finite bias that
/// masks all keys of a row moves their logits to -1e9, say, where float32 has no digits left for
/// the logarithm of their number: it is here. Kernels that take no bias write 0, and so do the
/// CPU's, whose backward pass sums such rows again.
struct AttentionForwardArgs : AttentionProblem {
  void* out;
  float *lse, *lse_rest;
};
Status AttentionForward(const AttentionForwardArgs& args, const Launch& launch);

/// Cotangents of the above. dout and out use `out_strides`, dquery `query_strides`, and so on; lse
/// and lse_rest as above.
///   delta[b,h,t] = sum_e dout * out - dlse;  p = exp(logits - lse - lse_rest);  dp = dout . value
///   dlogits = p * (dp - delta);  dbias = dlogits;  dproducts = scale * dlogits * cap'
///   dquery = dproducts . key;  dkey = dproducts^T . query;  dvalue = p^T . dout, the last two
///   summed over the group of query heads that share a kv head
/// A row without an allowed key (lse == -inf): kMean gives p = 1/kv_len for dvalue and dlogits = 0;
/// kNan gives NaN. delta: scratch, dense (batch, head, t), float32. dbias: dense (batch, kv_head,
/// group, t, s), float32, every element written (0 where not allowed); null when not wanted.
/// Deterministic: no atomics.
struct AttentionBackwardArgs : AttentionProblem {
  const void *out, *dout;
  const float *lse, *lse_rest;  // null for a rest of 0
  const float* dlse;            // dense (batch, head, t); null for 0. Finite
  float* delta;
  void *dquery, *dkey, *dvalue;
  float* dbias = nullptr;
};
Status AttentionBackward(const AttentionBackwardArgs& args, const Launch& launch);

}  // namespace zenith
