// From the products of query and key to logits: scale, bias, mask and band, on a warp's tile of
// scores as mma.sync leaves it. The same for both directions of walking: rows may be queries and
// columns keys, or the other way round.
#pragma once

#include "cuda/attention/tile.cuh"

namespace zenith::attention {

/// The band in 32 bits. Bounds are clamped to the largest distance there is, which keeps meaning.
struct Band {
  int left, right;

  __device__ explicit Band(const AttentionProblem& p)
      : left(Clamp(p.left, p.q_len + p.kv_len)), right(Clamp(p.right, p.q_len + p.kv_len)) {}

  /// Whether all of queries [t, t + queries) may see all of keys [s, s + keys).
  __device__ bool HoldsAll(int t, int queries, int s, int keys) const {
    return s - (t + queries - 1) >= -left && s + keys - 1 - t <= right;
  }
  /// Whether any of those queries may see any of those keys.
  __device__ bool HoldsAny(int t, int queries, int s, int keys) const {
    return s + keys - 1 - t >= -left && s - (t + queries - 1) <= right;
  }
  __device__ bool Holds(int t, int s) const { return s - t >= -left && s - t <= right; }
  /// Keys that at least one of queries [t, t + queries) may see; empty if end <= begin.
  __device__ int KeysBegin(int t) const { return max(0, t - left); }
  __device__ int KeysEnd(int t, int queries, int kv_len) const {
    return min(kv_len, t + queries + right);
  }
  /// Queries that may see at least one of keys [s, s + keys).
  __device__ int QueriesBegin(int s) const { return max(0, s - right); }
  __device__ int QueriesEnd(int s, int keys, int q_len) const {
    return min(q_len, s + keys + left);
  }

 private:
  static __device__ int Clamp(int64_t x, int64_t bound) {
    return static_cast<int>(x < -bound ? -bound : x > bound ? bound : x);
  }
};

/// A broadcast (query, key) tensor of one head, seen as rows and columns of the score tile.
struct ScoreTensor {
  int64_t row_stride, col_stride;  // elements
  int rows, cols;                  // of the problem; reads beyond them are clamped to the last
};

/// Where this lane's elements of a tile are: element (r, n, i) is row `row` + 16 r + 8 (i / 2),
/// column `col` + 8 n + i % 2.
struct LaneOrigin {
  int row, col;
};

template <typename E>
struct alignas(2 * sizeof(E)) Pair {
  E elements[2];
};

/// Calls f(score, value) for each of the lane's scores with the value of `tensor` there. All reads
/// of a kind are issued without a branch between them: with a test per element the latency of each
/// was exposed, and a key mask made the forward five times slower.
template <typename E, int kRowTiles, int kColTiles, typename F>
__device__ __forceinline__ void ForEachScore(float (&scores)[kRowTiles][kColTiles][4],
                                             const E* base, const ScoreTensor& tensor,
                                             LaneOrigin lane, F f) {
  const auto row_base = [&](int r, int half) {
    return base + min(lane.row + 16 * r + 8 * half, tensor.rows - 1) * tensor.row_stride;
  };
  const auto col_offset = [&](int n, int j) {
    return min(lane.col + 8 * n + j, tensor.cols - 1) * tensor.col_stride;
  };
  if (tensor.row_stride == 0) {  // one read for all rows
#pragma unroll
    for (int n = 0; n < kColTiles; ++n) {
      const E values[2] = {base[col_offset(n, 0)], base[col_offset(n, 1)]};
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
        for (int i = 0; i < 4; ++i) f(scores[r][n][i], values[i % 2]);
    }
  } else if (tensor.col_stride == 0) {  // one read for all columns
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
      const E values[2] = {*row_base(r, 0), *row_base(r, 1)};
#pragma unroll
      for (int n = 0; n < kColTiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) f(scores[r][n][i], values[i / 2]);
    }
  } else if (tensor.col_stride == 1 && (tensor.cols | tensor.row_stride) % 2 == 0 &&
             reinterpret_cast<uintptr_t>(base) % (2 * sizeof(E)) == 0) {  // two columns a read
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const E* row = row_base(r, half);
#pragma unroll
        for (int n = 0; n < kColTiles; ++n) {
          const auto pair =
              *reinterpret_cast<const Pair<E>*>(row + min(lane.col + 8 * n, tensor.cols - 2));
          f(scores[r][n][2 * half], pair.elements[0]);
          f(scores[r][n][2 * half + 1], pair.elements[1]);
        }
      }
  } else {
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const E* row = row_base(r, half);
#pragma unroll
        for (int n = 0; n < kColTiles; ++n) {
          f(scores[r][n][2 * half], row[col_offset(n, 0)]);
          f(scores[r][n][2 * half + 1], row[col_offset(n, 1)]);
        }
      }
  }
}

/// The unit of a logit once scale and bias are applied. For 16-bit types log2, so that 2^x follows
/// with nothing between. float32 keeps the natural logarithm and multiplies after the maximum or
/// lse is subtracted: at logits of 100, rounding before costs 1e-5 of p, ten times float32's rest.
template <typename T>
inline constexpr bool kSubtractFirst = sizeof(T) == 4;
template <typename T>
inline constexpr float kLogitsPerUnit = kSubtractFirst<T> ? 1.f : kLog2E;

/// Scores become logits in T's unit, -inf where not allowed. Without kModified (no mask, no
/// bias, scale > 0) the scale is left to the caller's exponent, and only the band is applied.
/// `row0`, `col0`: of the warp's tile. `whole`: every score of the tile is inside the band and the
/// tensors. `mask_offset`, `bias_offset`: of the head.
template <typename T, bool kByQuery, bool kModified, int kRowTiles, int kColTiles>
__device__ __forceinline__ void ApplyBandMaskBias(float (&scores)[kRowTiles][kColTiles][4],
                                                  const AttentionProblem& p, const Band& band,
                                                  int64_t mask_offset, int64_t bias_offset,
                                                  int row0, int col0, bool whole) {
  const int lane = threadIdx.x % kWarpSize;
  const LaneOrigin origin{row0 + lane / 4, col0 + lane % 4 * 2};
  const int q_len = static_cast<int>(p.q_len), kv_len = static_cast<int>(p.kv_len);
  if constexpr (kModified) {
    const auto tensor = [&](const ScoreStrides& strides) {
      return kByQuery ? ScoreTensor{strides.query, strides.key, q_len, kv_len}
                      : ScoreTensor{strides.key, strides.query, kv_len, q_len};
    };
    const float scale = p.scale * kLogitsPerUnit<T>;
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
      for (int n = 0; n < kColTiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) scores[r][n][i] *= scale;
    if (p.bias) {
      const auto add = [&]<typename E>(const E* bias) {
        ForEachScore(scores, bias + bias_offset, tensor(p.bias_strides), origin,
                     [](float& score, E value) { score += kLogitsPerUnit<T> * ToFloat(value); });
      };
      if (p.bias_dtype == DType::kF16)
        add(static_cast<const __half*>(p.bias));
      else if (p.bias_dtype == DType::kBF16)
        add(static_cast<const __nv_bfloat16*>(p.bias));
      else
        add(static_cast<const float*>(p.bias));
    }
    if (p.mask)
      ForEachScore(scores, reinterpret_cast<const uint8_t*>(p.mask) + mask_offset,
                   tensor(p.mask_strides), origin,
                   [](float& score, uint8_t allowed) { score = allowed ? score : -INFINITY; });
  }
  if (whole) return;
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
    for (int n = 0; n < kColTiles; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = origin.row + 16 * r + 8 * (i / 2), col = origin.col + 8 * n + i % 2;
        const int t = kByQuery ? row : col, s = kByQuery ? col : row;
        if (s >= kv_len || t >= q_len || !band.Holds(t, s)) scores[r][n][i] = -INFINITY;
      }
}

}  // namespace zenith::attention
