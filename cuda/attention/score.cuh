// From the products of query and key to logits: scale, cap, bias, mask, interval, segments and
// band, on a warp's tile of scores as mma.sync leaves it. The same for both directions of walking:
// rows may be queries and columns keys, or the other way round.
#pragma once

#include <climits>

#include "cuda/attention/tile.cuh"
#include "cuda/core/math.cuh"
#include "cuda/core/quad.cuh"

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

/// Where the scores of one head start in the tensors that are broadcast to them.
struct ScoreOffsets {
  int64_t mask, bias, interval, query_segments, key_segments;

  __device__ ScoreOffsets(const AttentionProblem& p, const HeadIndex& head)
      : mask(ScoreOffset(p.mask_strides, head)),
        bias(ScoreOffset(p.bias_strides, head)),
        interval(ScoreOffset(p.interval_strides, head)),
        query_segments(ScoreOffset(p.query_segments_strides, head)),
        key_segments(ScoreOffset(p.key_segments_strides, head)) {}

  __device__ void NextOfGroup(const AttentionProblem& p) {
    mask += p.mask_strides.group;
    bias += p.bias_strides.group;
    interval += p.interval_strides.group;
  }
};

/// Keys that band and interval allow to at least one of queries [t, t + queries); empty if y <= x.
/// The whole warp.
__device__ inline int2 KeysSeen(const AttentionProblem& p, const Band& band,
                                const ScoreOffsets& offsets, int t, int queries) {
  int2 keys{band.KeysBegin(t), band.KeysEnd(t, queries, static_cast<int>(p.kv_len))};
  if (!p.interval) return keys;
  int begin = INT_MAX, end = 0;
  const int count = p.interval_strides.query == 0 ? 1 : queries;
  for (int i = threadIdx.x % kWarpSize; i < count; i += kWarpSize) {
    const int2 interval = LoadInterval(p, offsets.interval, t + i);
    if (interval.x >= interval.y) continue;
    begin = min(begin, interval.x), end = max(end, interval.y);
  }
  return {max(keys.x, __reduce_min_sync(kAllLanes, begin)),
          min(keys.y, __reduce_max_sync(kAllLanes, end))};
}

/// Queries, of any head of the group that starts at `offsets`, to which band and interval allow at
/// least one of keys [s, s + keys), and perhaps others between them; empty if y <= x. The whole
/// warp.
__device__ inline int2 QueriesSeeing(const AttentionProblem& p, const Band& band,
                                     const ScoreOffsets& offsets, int s, int keys) {
  const int2 queries{band.QueriesBegin(s), band.QueriesEnd(s, keys, static_cast<int>(p.q_len))};
  if (!p.interval) return queries;
  int begin = INT_MAX, end = 0;
  const int groups = p.interval_strides.group == 0 ? 1 : static_cast<int>(p.groups);
  const bool all_alike = p.interval_strides.query == 0;
  for (int group = 0; group < groups; ++group) {
    const int64_t offset = offsets.interval + group * p.interval_strides.group;
#pragma unroll 4
    for (int t = queries.x + static_cast<int>(threadIdx.x) % kWarpSize; t < queries.y;
         t += all_alike ? queries.y : kWarpSize) {
      const int2 interval = LoadInterval(p, offset, t);
      if (max(interval.x, s) >= min(interval.y, s + keys)) continue;
      begin = min(begin, t), end = max(end, t + 1);
    }
  }
  begin = __reduce_min_sync(kAllLanes, begin), end = __reduce_max_sync(kAllLanes, end);
  return all_alike && begin < end ? queries : int2{begin, end};
}

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

/// The two 16-bit halves of a word, or bytes of a half, as elements.
template <typename E>
__device__ __forceinline__ E ElementOf(uint32_t word, int i) {
  if constexpr (sizeof(E) == 1) {
    return static_cast<E>(word >> 8 * i);
  } else {
    const uint16_t bits = static_cast<uint16_t>(word >> 16 * i);
    E element;
    memcpy(&element, &bits, sizeof(element));
    return element;
  }
}

/// Transposes an 8x8 matrix of 16-bit elements, in a warp as mma.sync's tiles.
__device__ __forceinline__ uint32_t MatrixTranspose(uint32_t word) {
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %0;\n" : "+r"(word));
  return word;
}

template <typename E>
struct alignas(2 * sizeof(E)) Pair {
  E elements[2];
};

/// Calls f(score, value) for each of the lane's scores with the value of `tensor` there. All reads
/// of a kind are issued without a branch between them: with a test per element the latency of each
/// was exposed, and a key mask made the forward five times slower. Narrow elements that lie side by
/// side are read eight at a time and exchanged between the lanes: a warp's read is of eight rows
/// either way, and takes as long.
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
  } else if (sizeof(E) <= 2 && kColTiles % 4 == 0 && tensor.col_stride == 1 &&
             (tensor.cols | tensor.row_stride) % 8 == 0 &&
             reinterpret_cast<uintptr_t>(base) % (8 * sizeof(E)) == 0) {  // eight columns a read
    if constexpr (sizeof(E) <= 2 && kColTiles % 4 == 0) {
      const int quad_lane = threadIdx.x % 4;
      const int first = lane.col - 2 * quad_lane;  // of the tile
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const E* row = row_base(r, half);
#pragma unroll
          for (int group = 0; group < kColTiles / 4; ++group) {  // of 32 columns
            const E* source = row + min(first + 32 * group + 8 * quad_lane, tensor.cols - 8);
            uint32_t words[4];  // pairs of columns
            if constexpr (sizeof(E) == 1) {
              const uint2 bytes = *reinterpret_cast<const uint2*>(source);
              words[0] = bytes.x, words[1] = bytes.x >> 16;
              words[2] = bytes.y, words[3] = bytes.y >> 16;
            } else {
              const uint4 eight = *reinterpret_cast<const uint4*>(source);
              words[0] = eight.x, words[1] = eight.y, words[2] = eight.z, words[3] = eight.w;
            }
            QuadTranspose(words);
#pragma unroll
            for (int j = 0; j < 4; ++j)
#pragma unroll
              for (int i = 0; i < 2; ++i)
                f(scores[r][4 * group + j][2 * half + i], ElementOf<E>(words[j], i));
          }
        }
    }
  } else if (sizeof(E) <= 2 && tensor.row_stride == 1 && tensor.col_stride % 2 == 0 &&
             tensor.rows % 2 == 0 && reinterpret_cast<uintptr_t>(base) % (2 * sizeof(E)) == 0) {
    // Rows side by side: blocks of 8 x 8, read with rows and columns exchanged.
    if constexpr (sizeof(E) <= 2) {
      const int lane_index = threadIdx.x % kWarpSize;
      const int first_row = lane.row - lane_index / 4 + lane_index % 4 * 2;
      const int first_col = lane.col - lane_index % 4 * 2 + lane_index / 4;
#pragma unroll
      for (int n = 0; n < kColTiles; ++n) {
        const E* column = base + min(first_col + 8 * n, tensor.cols - 1) * tensor.col_stride;
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const E* source = column + min(first_row + 16 * r + 8 * half, tensor.rows - 2);
            uint32_t word;
            if constexpr (sizeof(E) == 1) {
              const uint32_t bytes = *reinterpret_cast<const uint16_t*>(source);
              word = (bytes | bytes << 8) & 0x00ff00ff;
            } else {
              word = *reinterpret_cast<const uint32_t*>(source);
            }
            word = MatrixTranspose(word);
#pragma unroll
            for (int i = 0; i < 2; ++i)
              f(scores[r][n][2 * half + i],
                ElementOf<E>(sizeof(E) == 1 ? word >> 16 * i : word, sizeof(E) == 1 ? 0 : i));
          }
      }
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
/// So does kModified: a bias of -1e9 or the lowest float32 has no counterpart in units of log2.
template <typename T, bool kModified>
inline constexpr bool kSubtractFirst = kModified || std::is_same_v<T, float>;
template <typename T, bool kModified>
inline constexpr float kLogitsPerUnit = kSubtractFirst<T, kModified> ? 1.f : kLog2E;

/// lse in T's unit of logits, and delta. A query without an allowed key, or past the end, gets
/// +inf: then p = 2^-inf = 0 for every key.
template <typename T, bool kModified>
__device__ __forceinline__ float2 QueryStatistics(const float* lse, const float* delta, int t,
                                                  int q_len) {
  if (t >= q_len) return {INFINITY, 0};
  const float x = lse[t];
  return {x == -INFINITY ? INFINITY : kLogitsPerUnit<T, kModified> * x, delta[t]};
}
/// lse_rest in units of log2; `rest`: null for 0.
__device__ __forceinline__ float QueryRest(const float* rest, int t, int q_len) {
  return rest && t < q_len ? kLog2E * rest[t] : 0.f;
}

/// The warp's tile of a tensor that is broadcast to the scores, seen as rows and columns of scores.
template <bool kByQuery>
__device__ __forceinline__ ScoreTensor TensorOf(const AttentionProblem& p,
                                                const ScoreStrides& strides) {
  const int q_len = static_cast<int>(p.q_len), kv_len = static_cast<int>(p.kv_len);
  return kByQuery ? ScoreTensor{strides.query, strides.key, q_len, kv_len}
                  : ScoreTensor{strides.key, strides.query, kv_len, q_len};
}

/// Where this lane's scores are, of a warp's tile whose first is (row0, col0).
__device__ __forceinline__ LaneOrigin OriginOf(int row0, int col0) {
  const int lane = threadIdx.x % kWarpSize;
  return {row0 + lane / 4, col0 + lane % 4 * 2};
}

/// scores += bias.
template <bool kByQuery, int kRowTiles, int kColTiles>
__device__ __forceinline__ void AddBias(float (&scores)[kRowTiles][kColTiles][4],
                                        const AttentionProblem& p, const ScoreOffsets& offsets,
                                        LaneOrigin origin) {
  const auto add = [&]<typename E>(const E* bias) {
    ForEachScore(scores, bias + offsets.bias, TensorOf<kByQuery>(p, p.bias_strides), origin,
                 [](float& score, E value) { score += ToFloat(value); });
  };
  if (p.bias_dtype == DType::kF16)
    add(static_cast<const __half*>(p.bias));
  else if (p.bias_dtype == DType::kBF16)
    add(static_cast<const __nv_bfloat16*>(p.bias));
  else
    add(static_cast<const float*>(p.bias));
}

/// -inf where the mask forbids a key.
template <bool kByQuery, int kRowTiles, int kColTiles>
__device__ __forceinline__ void ApplyMask(float (&scores)[kRowTiles][kColTiles][4],
                                          const AttentionProblem& p, const ScoreOffsets& offsets,
                                          LaneOrigin origin) {
  ForEachScore(scores, reinterpret_cast<const uint8_t*>(p.mask) + offsets.mask,
               TensorOf<kByQuery>(p, p.mask_strides), origin,
               [](float& score, uint8_t allowed) { score = allowed ? score : -INFINITY; });
}

/// Of the lane's scores of a warp's tile whose first is (row0, col0): where they are, and which of
/// them are queries.
template <bool kByQuery, int kRowTiles, int kColTiles>
struct LaneScores {
  static constexpr int kRows = 2 * kRowTiles, kCols = 2 * kColTiles;
  static constexpr int kQueries = kByQuery ? kRows : kCols;
  LaneOrigin origin;

  __device__ __forceinline__ LaneScores(int row0, int col0) : origin(OriginOf(row0, col0)) {}
  __device__ __forceinline__ int row(int i) const { return origin.row + 8 * i; }
  __device__ __forceinline__ int col(int i) const { return origin.col + 8 * (i / 2) + i % 2; }
  __device__ __forceinline__ int query(int i) const { return kByQuery ? row(i) : col(i); }
  /// Calls f(score, row, column), each counted among the lane's.
  template <typename F>
  __device__ __forceinline__ static void ForEach(float (&scores)[kRowTiles][kColTiles][4], F f) {
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
      for (int n = 0; n < kColTiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) f(scores[r][n][i], 2 * r + i / 2, 2 * n + i % 2);
  }
};

/// -inf where intervals forbid a key. `row0`, `col0`: of the warp's tile.
template <bool kByQuery, int kRowTiles, int kColTiles>
__device__ __forceinline__ void ApplyIntervals(float (&scores)[kRowTiles][kColTiles][4],
                                               const AttentionProblem& p,
                                               const ScoreOffsets& offsets, int row0, int col0) {
  using Lane = LaneScores<kByQuery, kRowTiles, kColTiles>;
  const Lane lane(row0, col0);
  const int q_len = static_cast<int>(p.q_len);
  int2 keys[Lane::kQueries];
#pragma unroll
  for (int i = 0; i < Lane::kQueries; ++i)
    keys[i] = LoadInterval(p, offsets.interval, min(lane.query(i), q_len - 1));
  // Most tiles lie inside of the intervals of all their queries.
  constexpr int kKeys = kByQuery ? 8 * kColTiles : 16 * kRowTiles;
  const int first = kByQuery ? col0 : row0;
  bool inside = true;
#pragma unroll
  for (int i = 0; i < Lane::kQueries; ++i)
    inside = inside && keys[i].x <= first && keys[i].y >= first + kKeys;
  if (__all_sync(kAllLanes, inside)) return;
  Lane::ForEach(scores, [&](float& score, int row, int col) {
    const int2 allowed = keys[kByQuery ? row : col];
    const int s = kByQuery ? lane.col(col) : lane.row(row);
    score = s >= allowed.x && s < allowed.y ? score : -INFINITY;
  });
}

/// -inf where query and key are of different segments. `row0`, `col0`: of the warp's tile.
template <bool kByQuery, int kRowTiles, int kColTiles>
__device__ __forceinline__ void ApplySegments(float (&scores)[kRowTiles][kColTiles][4],
                                              const AttentionProblem& p,
                                              const ScoreOffsets& offsets, int row0, int col0) {
  using Lane = LaneScores<kByQuery, kRowTiles, kColTiles>;
  const Lane lane(row0, col0);
  const int q_len = static_cast<int>(p.q_len), kv_len = static_cast<int>(p.kv_len);
  const auto query_segment = [&](int t) {
    return p.query_segments[offsets.query_segments +
                            min(t, q_len - 1) * p.query_segments_strides.query];
  };
  const auto key_segment = [&](int s) {
    return p.key_segments[offsets.key_segments + min(s, kv_len - 1) * p.key_segments_strides.key];
  };
  int rows[Lane::kRows], cols[Lane::kCols];
#pragma unroll
  for (int i = 0; i < Lane::kRows; ++i)
    rows[i] = kByQuery ? query_segment(lane.row(i)) : key_segment(lane.row(i));
#pragma unroll
  for (int i = 0; i < Lane::kCols; ++i)
    cols[i] = kByQuery ? key_segment(lane.col(i)) : query_segment(lane.col(i));
  Lane::ForEach(scores, [&](float& score, int row, int col) {
    score = rows[row] == cols[col] ? score : -INFINITY;
  });
}

/// Scores become logits in T's unit, -inf where not allowed. Without kModified the scale is left to
/// the caller's exponent, and only the band is applied. `row0`, `col0`: of the warp's tile.
/// `whole`: every score of the tile is inside the band and the tensors. `on_slope(r, n, i, slope)`
/// is told the derivative of each logit that is capped.
template <typename T, bool kByQuery, bool kModified, int kRowTiles, int kColTiles, typename OnSlope>
__device__ __forceinline__ void ApplyBandMaskBias(float (&scores)[kRowTiles][kColTiles][4],
                                                  const AttentionProblem& p, const Band& band,
                                                  const ScoreOffsets& offsets, int row0, int col0,
                                                  bool whole, OnSlope on_slope) {
  const LaneOrigin origin = OriginOf(row0, col0);
  const int q_len = static_cast<int>(p.q_len), kv_len = static_cast<int>(p.kv_len);
  if constexpr (kModified) {
    const bool capped = p.softcap > 0;
    const float scale = capped ? p.scale / p.softcap : p.scale;
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
      for (int n = 0; n < kColTiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) scores[r][n][i] *= scale;
    if (capped)
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
        for (int n = 0; n < kColTiles; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float tanh = Tanh<T>(scores[r][n][i]);
            scores[r][n][i] = p.softcap * tanh;
            on_slope(r, n, i, 1.f - tanh * tanh);
          }
    if (p.bias) AddBias<kByQuery>(scores, p, offsets, origin);
    if (p.mask) ApplyMask<kByQuery>(scores, p, offsets, origin);
    if (p.interval) ApplyIntervals<kByQuery>(scores, p, offsets, row0, col0);
    if (p.query_segments) ApplySegments<kByQuery>(scores, p, offsets, row0, col0);
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
