// What every attention kernel asks of a problem: which keys a query may see, where a row starts,
// what a mask or bias says. Axes as in ffi/kernels/attention.h: t query, s key.
#pragma once

#include <cmath>
#include <cstdint>

#include "cuda/core/convert.cuh"
#include "cuda/core/reduce.cuh"
#include "ffi/kernels/attention.h"

namespace zenith::attention {

inline constexpr unsigned kAllLanes = 0xffffffffu;

/// Half-open interval of rows or keys.
struct Range {
  int64_t begin, end;
};

/// Query head `head` = kv_head * groups + group of batch element `batch`.
struct HeadIndex {
  int64_t batch, head, kv_head, group;

  /// `index` counts (batch, head) pairs, head fastest.
  static __host__ __device__ HeadIndex Of(const AttentionProblem& p, int64_t index) {
    const int64_t heads = p.kv_heads * p.groups;
    const int64_t head = index % heads;
    return {index / heads, head, head / p.groups, head % p.groups};
  }
};

/// Keys inside the band of at least one query in [t_first, t_last]; may be empty.
__host__ __device__ inline Range KeysInBand(const AttentionProblem& p, int64_t t_first,
                                            int64_t t_last) {
  const int64_t begin = t_first - p.left, end = t_last + p.right + 1;
  return {begin > 0 ? begin : 0, end < p.kv_len ? end : p.kv_len};
}

/// Queries whose band holds at least one key in [s_first, s_last]; may be empty.
__host__ __device__ inline Range QueriesInBand(const AttentionProblem& p, int64_t s_first,
                                               int64_t s_last) {
  const int64_t begin = s_first - p.right, end = s_last + p.left + 1;
  return {begin > 0 ? begin : 0, end < p.q_len ? end : p.q_len};
}

/// Where row `length` of a head starts.
template <typename T>
__host__ __device__ T* RowPointer(T* base, const HeadStrides& strides, int64_t batch, int64_t head,
                                  int64_t length) {
  return base + batch * strides.batch + head * strides.head + length * strides.length;
}

/// Where the rows of a query head start in the dense (batch, head, t) arrays.
__host__ __device__ inline int64_t FirstRow(const AttentionProblem& p, const HeadIndex& i) {
  return (i.batch * p.kv_heads * p.groups + i.head) * p.q_len;
}

/// lse and lse_rest of a row from its largest logit and the logarithm of its sum after that was
/// subtracted. The difference is exact: of two numbers of about the same size.
__device__ inline void WriteLse(const AttentionForwardArgs& args, int64_t row, bool dead, float max,
                                float log_sum) {
  const float lse = __fadd_rn(max, log_sum);
  args.lse[row] = dead ? -INFINITY : lse;
  args.lse_rest[row] = dead ? 0.f : __fadd_rn(max, -lse) + log_sum;
}

/// Offset of score (t = 0, s = 0) of a head in a broadcast tensor.
__host__ __device__ inline int64_t ScoreOffset(const ScoreStrides& strides, const HeadIndex& i) {
  return i.batch * strides.batch + i.kv_head * strides.kv_head + i.group * strides.group;
}

/// Whether a problem needs the kernels' kModified: then scores are brought to their final value
/// before a maximum is taken, otherwise scale is folded into the exponent.
inline bool IsModified(const AttentionProblem& p) {
  return p.mask || p.bias || p.interval || p.query_segments || p.softcap > 0 || !(p.scale > 0);
}

/// Whether some query may have no allowed key. Where nothing else forbids keys the band decides:
/// the first query must not look before the keys, the last not behind them.
inline bool MayHaveDeadRows(const AttentionProblem& p) {
  return p.mask || p.bias || p.interval || p.query_segments || p.kv_len == 0 ||
         p.left + p.right < 0 || p.right < 0 || p.q_len - 1 - p.left >= p.kv_len;
}

/// The interval of query t; its bounds lie side by side. `offset`: ScoreOffset of the head.
__device__ inline int2 LoadInterval(const AttentionProblem& p, int64_t offset, int64_t t) {
  return *reinterpret_cast<const int2*>(p.interval + offset + t * p.interval_strides.query);
}

/// Whether mask, interval and segments let query t of a head see key s.
__device__ inline bool IsAllowed(const AttentionProblem& p, const HeadIndex& i, int64_t t,
                                 int64_t s) {
  if (p.mask &&
      !p.mask[ScoreOffset(p.mask_strides, i) + t * p.mask_strides.query + s * p.mask_strides.key])
    return false;
  if (p.interval) {
    const int2 keys = LoadInterval(p, ScoreOffset(p.interval_strides, i), t);
    if (s < keys.x || s >= keys.y) return false;
  }
  return !p.query_segments || p.query_segments[ScoreOffset(p.query_segments_strides, i) +
                                               t * p.query_segments_strides.query] ==
                                  p.key_segments[ScoreOffset(p.key_segments_strides, i) +
                                                 s * p.key_segments_strides.key];
}

/// A scaled product under the cap, and the derivative by it.
struct Capped {
  float logit, slope;
};
__device__ inline Capped Cap(const AttentionProblem& p, float product) {
  if (!(p.softcap > 0)) return {product, 1};
  const float tanh = tanhf(product / p.softcap);
  return {p.softcap * tanh, 1 - tanh * tanh};
}

__device__ inline float LoadBias(const AttentionProblem& p, int64_t offset) {
  switch (p.bias_dtype) {
    case DType::kF16:
      return ToFloat(static_cast<const __half*>(p.bias)[offset]);
    case DType::kBF16:
      return ToFloat(static_cast<const __nv_bfloat16*>(p.bias)[offset]);
    default:
      return static_cast<const float*>(p.bias)[offset];
  }
}

}  // namespace zenith::attention
