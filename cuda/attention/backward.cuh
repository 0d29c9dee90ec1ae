// Attention backward on tensor cores, deterministic: one kernel template that
// walks the score matrix by rows (dquery) or by columns (dkey, dvalue), recomputing it each time.
// dproducts, below, are dlogits times the slope of the cap.
//
// A block owns a stationary tile of rows and streams over the other axis:
//               rows  stationary     streamed       results
//   kQuery      t     query, dout    key, value     dquery = scale * dproducts . key, dbias
//   kKeyValue   s     key, value     query, dout    dkey = scale * dproducts^T . query, dvalue =
//   p^T . dout kKey        s     key, value     query, dout    dkey alone    } where the registers
//   do not kValue      s     key            query, dout    dvalue alone  } hold both accumulators
// Both products of scores are taken with the stationary rows as M, so p and dlogits, packed, are
// the A operand of the products that follow: nothing but the streamed tiles goes through shared
// memory. Seven products instead of the five with atomics: the price of bit-reproducible gradients.
#pragma once

#include "cuda/attention/kernels.h"
#include "cuda/attention/score.cuh"

namespace zenith::attention {

/// Of two neighbouring queries: -delta, and lse in T's unit.
struct alignas(16) QueryPair {
  float minus_delta[2], lse[2];
};

enum class Gradient { kQuery, kKeyValue, kKey, kValue };

/// A tile of kCols streamed rows is taken kChunk at a time, so that more work follows on each
/// barrier and each round of copies than the registers have room for: with tiles of 64 for 32 rows,
/// the two kernels of d64 took 2.17 for 2.36 and 2.98 for 3.53 ms (b4 h32 s4096, H100, 11/2026).
/// kKeepsFirst: each warp keeps its rows of the first stationary tile as operands in registers.
template <typename T_, Gradient kGradient_, int kDim_, int kWarps, int kRowTiles_, int kCols_,
          int kBlocksPerSm_, int kChunk_ = kCols_, bool kKeepsFirst_ = false>
struct BackwardConfig {
  using T = T_;
  static constexpr Gradient kGradient = kGradient_;
  static constexpr bool kByQuery = kGradient == Gradient::kQuery;
  static constexpr bool kLogits = kGradient != Gradient::kValue;  // dquery or dkey is wanted
  static constexpr bool kWeights =
      kGradient == Gradient::kKeyValue || kGradient == Gradient::kValue;

  static constexpr int kDim = kDim_;            // features, padded
  static constexpr int kRowTiles = kRowTiles_;  // tiles of 16 stationary rows per warp
  static constexpr int kCols = kCols_;          // streamed rows per tile
  static constexpr int kBlocksPerSm = kBlocksPerSm_;
  static constexpr int kChunk = kChunk_;
  static constexpr bool kKeepsFirst = kKeepsFirst_;
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kRows = 16 * kRowTiles * kWarps;
  static constexpr int kStages = 2;
  static constexpr int kStationaryBytes = kRows * kDim * sizeof(T);
  static constexpr int kStreamedBytes = kCols * kDim * sizeof(T);
  static constexpr int kTilesBytes =
      (kLogits ? 2 : 1) * kStationaryBytes + kStages * 2 * kStreamedBytes;
  static constexpr int kSharedBytes =
      kTilesBytes + (kByQuery ? 0 : kStages * kCols / 2 * int{sizeof(QueryPair) + sizeof(float2)});
};

/// What the queries without an allowed key give to every key of the head, allowed or not: the mean
/// (or NaN) of dout over them, in `sum[e]`. False if there is none. The whole block.
template <typename T>
__device__ bool DeadRows(const AttentionBackwardArgs& args, const HeadIndex& first_head,
                         const T* dout, float* sum) {
  const int64_t first_row =
      (first_head.batch * args.kv_heads * args.groups + first_head.head) * args.q_len;
  const int64_t rows = args.groups * args.q_len;  // heads of a group are neighbours in lse
  bool dead = false;
#pragma unroll 8
  for (int64_t row = threadIdx.x; row < rows; row += blockDim.x)
    dead |= args.lse[first_row + row] == -INFINITY;
  if (!__syncthreads_or(dead)) return false;
  const float weight =
      args.masked_row == MaskedRow::kMean ? 1.f / static_cast<float>(args.kv_len) : NAN;
  for (int e = threadIdx.x; e < args.v_dim; e += blockDim.x) {
    float total = 0;
    for (int64_t group = 0; group < args.groups; ++group)
#pragma unroll 8
      for (int64_t t = 0; t < args.q_len; ++t)
        if (args.lse[first_row + group * args.q_len + t] == -INFINITY)
          total += ToFloat(dout[group * args.out_strides.head + t * args.out_strides.length + e]);
    sum[e] = total * weight;
  }
  __syncthreads();
  return true;
}

/// kModified: as IsModified, or dbias is wanted.
template <typename Config, bool kModified>
__global__ void __launch_bounds__(Config::kThreads, Config::kBlocksPerSm)
    attention_backward_kernel(const __grid_constant__ AttentionBackwardArgs args,
                              const bool may_have_dead_rows) {
  constexpr int kDim = Config::kDim, kCols = Config::kCols, kRows = Config::kRows;
  constexpr int kRowTiles = Config::kRowTiles, kThreads = Config::kThreads;
  constexpr int kChunk = Config::kChunk;
  constexpr bool kByQuery = Config::kByQuery;
  // Where a pair of queries serves one row tile alone, one read brings its delta and lse together.
  constexpr bool kDeltaLast = !kModified && !kByQuery && kRowTiles == 1;
  using T = typename Config::T;
  using Layout = TileLayout<T, kDim>;
  extern __shared__ __align__(kTileAlignment) unsigned char shared[];
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int q_len = static_cast<int>(args.q_len), kv_len = static_cast<int>(args.kv_len);
  const int qk_dim = static_cast<int>(args.qk_dim), v_dim = static_cast<int>(args.v_dim);

  // Under a causal mask, late queries and early keys have the most work; they start first.
  const int row_tiles = ((kByQuery ? q_len : kv_len) + kRows - 1) / kRows;
  const int tile = blockIdx.x % row_tiles;
  const int row0 = (kByQuery ? row_tiles - 1 - tile : tile) * kRows;
  const int warp_row = warp * 16 * kRowTiles, warp_row0 = row0 + warp_row;
  const int rows = kByQuery ? q_len : kv_len, cols = kByQuery ? kv_len : q_len;
  HeadIndex head;  // of the queries; when walking by keys, the first of its group
  if constexpr (kByQuery) {
    head = HeadIndex::Of(args, blockIdx.x / row_tiles);
  } else {
    const int64_t index = blockIdx.x / row_tiles;
    const int64_t kv_head = index % args.kv_heads;
    head = {index / args.kv_heads, kv_head * args.groups, kv_head, 0};
  }

  const T* query =
      RowPointer(static_cast<const T*>(args.query), args.query_strides, head.batch, head.head, 0);
  const T* dout =
      RowPointer(static_cast<const T*>(args.dout), args.out_strides, head.batch, head.head, 0);
  const T* key =
      RowPointer(static_cast<const T*>(args.key), args.key_strides, head.batch, head.kv_head, 0);
  const T* value = RowPointer(static_cast<const T*>(args.value), args.value_strides, head.batch,
                              head.kv_head, 0);
  const int64_t first_row = FirstRow(args, head);
  const float *lse = args.lse + first_row, *delta = args.delta + first_row;
  const float* rest = kModified && args.lse_rest ? args.lse_rest + first_row : nullptr;
  ScoreOffsets offsets(args, head);

  const uint32_t shared_address = SharedAddress(shared);
  const uint32_t stages = shared_address + (Config::kLogits ? 2 : 1) * Config::kStationaryBytes;
  QueryPair* pairs = reinterpret_cast<QueryPair*>(shared + Config::kTilesBytes);
  float2* rests = reinterpret_cast<float2*>(pairs + Config::kStages * kCols / 2);

  // Streamed rows: `cols_begin` to `cols_end`, for each query head of the group when walking by
  // keys. A dense dbias has zeros to be written where nothing is allowed: then none is skipped.
  const Band band(args);
  const int row_count = min(kRows, rows - row0);
  const bool whole_range = kModified && kByQuery && args.dbias;
  const int2 range = whole_range ? int2{0, cols}
                     : kByQuery  ? KeysSeen(args, band, offsets, row0, row_count)
                                 : QueriesSeeing(args, band, offsets, row0, row_count);
  const int cols_begin = range.x / kCols * kCols, cols_end = range.y;
  const int col_tiles = cols_end > cols_begin ? (cols_end - cols_begin + kCols - 1) / kCols : 0;
  const int64_t iterations = col_tiles * (kByQuery ? int64_t{1} : args.groups);

  const auto load_streamed = [&](int col0, int64_t group, int stage) {
    const uint32_t tile = stages + stage * 2 * Config::kStreamedBytes;
    const T* first = kByQuery ? key : query + group * args.query_strides.head;
    const T* second = kByQuery ? value : dout + group * args.out_strides.head;
    const int64_t first_stride = kByQuery ? args.key_strides.length : args.query_strides.length;
    const int64_t second_stride = kByQuery ? args.value_strides.length : args.out_strides.length;
    first += col0 * first_stride, second += col0 * second_stride;
    if (cols - col0 >= kCols && qk_dim == kDim && v_dim == kDim) {
      LoadWholeTile<kCols, kDim, kThreads>(tile, first, first_stride);
      LoadWholeTile<kCols, kDim, kThreads>(tile + Config::kStreamedBytes, second, second_stride);
      return;
    }
    LoadTile<kCols, kDim, kThreads>(tile, first, first_stride, cols - col0, qk_dim);
    LoadTile<kCols, kDim, kThreads>(tile + Config::kStreamedBytes, second, second_stride,
                                    cols - col0, v_dim);
  };
  // Of query col0 + threadIdx.x; x and y as QueryStatistics, z QueryRest.
  const auto column_statistics = [&](int col0, int64_t group) {
    const int t = col0 + static_cast<int>(threadIdx.x);
    const float2 statistics = QueryStatistics<T, kModified>(lse + group * args.q_len,
                                                            delta + group * args.q_len, t, q_len);
    return float3{statistics.x, statistics.y,
                  kModified ? QueryRest(rest ? rest + group * args.q_len : nullptr, t, q_len) : 0};
  };
  const auto store_statistics = [&](int stage, const float3& statistics) {
    QueryPair& pair = pairs[(stage * kCols + threadIdx.x) / 2];
    const int i = threadIdx.x % 2;
    pair.minus_delta[i] = -statistics.y;
    pair.lse[i] = statistics.x;
    if constexpr (kModified)
      reinterpret_cast<float*>(rests)[stage * kCols + threadIdx.x] = statistics.z;
  };

  const int64_t first_stride = kByQuery ? args.query_strides.length : args.key_strides.length;
  const int64_t second_stride = kByQuery ? args.out_strides.length : args.value_strides.length;
  LoadTile<kRows, kDim, kThreads>(shared_address, (kByQuery ? query : key) + row0 * first_stride,
                                  first_stride, rows - row0, qk_dim);
  if constexpr (Config::kLogits)
    LoadTile<kRows, kDim, kThreads>(shared_address + Config::kStationaryBytes,
                                    (kByQuery ? dout : value) + row0 * second_stride, second_stride,
                                    rows - row0, v_dim);
  if (iterations > 0) load_streamed(cols_begin, 0, 0);
  CpAsyncCommit();
  // As in QueryPair, where rows are queries.
  [[maybe_unused]] float minus_delta[kRowTiles][4], row_lse[kRowTiles][2], row_rest[kRowTiles][2];
  if constexpr (kByQuery) {
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int t = warp_row0 + 16 * r + 8 * half + lane / 4;
        const float2 statistics = QueryStatistics<T, kModified>(lse, delta, t, q_len);
        row_lse[r][half] = statistics.x;
        minus_delta[r][2 * half] = minus_delta[r][2 * half + 1] = -statistics.y;
        if constexpr (kModified) row_rest[r][half] = QueryRest(rest, t, q_len);
      }
  } else if (iterations > 0 && threadIdx.x < kCols) {
    store_statistics(0, column_statistics(cols_begin, 0));
  }

  const uint32_t lane_row =
      shared_address + warp_row * Layout::kRowBytes + Layout::LaneOffset(lane);
  // To T's unit, once the maximum is subtracted to that of log2.
  const float factor = kModified ? 1.f : args.scale * kLogitsPerUnit<T, kModified>;
  constexpr float kPerUnit = kLog2E / kLogitsPerUnit<T, kModified>;
  // A tile has room for dbias or for what is behind the cap's slope (kernels.h).
  [[maybe_unused]] const bool behind_cap = !(kByQuery && args.dbias);
  float acc[Config::kLogits ? kRowTiles : 1][kDim / 8][4] = {};         // dquery or dkey
  float acc_value[Config::kWeights ? kRowTiles : 1][kDim / 8][4] = {};  // dvalue

  [[maybe_unused]] Operand<T, 4> kept[kRowTiles][Layout::kSteps];
  if constexpr (Config::kKeepsFirst) {
    CpAsyncWait<0>();
    __syncthreads();
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
      for (int k = 0; k < Layout::kSteps; ++k) kept[r][k] = LoadOperandA<T, kDim>(lane_row, r, k);
  }
  const auto first_operand = [&](int r, int k) {
    if constexpr (Config::kKeepsFirst) return kept[r][k];
    return LoadOperandA<T, kDim>(lane_row, r, k);
  };
  const auto second_operand = [&](int r, int k) {
    return LoadOperandA<T, kDim>(lane_row + Config::kStationaryBytes, r, k);
  };

  int col0 = cols_begin, stage = 0;
  int64_t group = 0;
  for (int64_t iteration = 0; iteration < iterations; ++iteration, stage ^= 1) {
    CpAsyncWait<0>();
    __syncthreads();  // this stage is complete, and nobody reads the other one any more
    const bool last_of_group = col0 + kCols >= cols_end;
    const int next_col0 = last_of_group ? cols_begin : col0 + kCols;
    const int64_t next_group = group + last_of_group;
    float3 next_statistics;
    if (iteration + 1 < iterations) {
      load_streamed(next_col0, next_group, stage ^ 1);
      if (!kByQuery && threadIdx.x < kCols)
        next_statistics = column_statistics(next_col0, next_group);
    }
    CpAsyncCommit();

    const uint32_t tile = stages + stage * 2 * Config::kStreamedBytes;
    // The products of columns [chunk0, chunk0 + kChunk) of the tile. `whole`: all of their scores
    // are inside the band and the tensors. kPlain: and nothing else forbids or moves them; such
    // code has no branch, and the scheduler mixes products and exponentials.
    const auto take = [&]<bool kPlain>(int chunk0, bool whole) {
      const uint32_t first = tile + chunk0 * Layout::kRowBytes;
      const uint32_t second = first + Config::kStreamedBytes;
      const QueryPair* chunk_pairs = pairs + (stage * kCols + chunk0) / 2 + lane % 4;
      const auto pair_at = [&](int n) {
        const float4 pair = *reinterpret_cast<const float4*>(&chunk_pairs[4 * n]);
        return QueryPair{{pair.x, pair.y}, {pair.z, pair.w}};
      };
      const auto rest_at = [&](int n, int i) {
        return reinterpret_cast<const float*>(
            rests)[stage * kCols + chunk0 + 8 * n + lane % 4 * 2 + i];
      };
      float p[kRowTiles][kChunk / 8][4] = {};
      AccumulateByRows<T, kDim, kRowTiles, kChunk>(p, first_operand,
                                                   first + Layout::LaneOffsetByColumn(lane));

      // dp less delta, which stands before the slope of the cap: products start from -delta.
      [[maybe_unused]] float dlogits[Config::kLogits ? kRowTiles : 1][kChunk / 8][4];
      if constexpr (Config::kLogits) {
#pragma unroll
        for (int n = 0; n < kChunk / 8; ++n)
#pragma unroll
          for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
            for (int i = 0; i < 4; ++i)
              dlogits[r][n][i] = kDeltaLast ? 0.f
                                 : kByQuery ? minus_delta[r][i]
                                            : pair_at(n).minus_delta[i % 2];
        AccumulateByRows<T, kDim, kRowTiles, kChunk>(dlogits, second_operand,
                                                     second + Layout::LaneOffsetByColumn(lane));
      }
      if constexpr (!kPlain) {
        ApplyBandMaskBias<T, kByQuery, kModified>(p, args, band, offsets, warp_row0, col0 + chunk0,
                                                  whole, [&](int r, int n, int i, float slope) {
                                                    if constexpr (Config::kLogits)
                                                      if (behind_cap) dlogits[r][n][i] *= slope;
                                                  });
        // Where a key is not allowed: whatever value holds there, NaN too.
        if constexpr (Config::kLogits)
#pragma unroll
          for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
            for (int n = 0; n < kChunk / 8; ++n)
#pragma unroll
              for (int i = 0; i < 4; ++i)
                if (p[r][n][i] == -INFINITY) dlogits[r][n][i] = 0;
      }
#pragma unroll
      for (int n = 0; n < kChunk / 8; ++n)
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float lse = kByQuery ? row_lse[r][i / 2] : pair_at(n).lse[i % 2];
            float exponent = (p[r][n][i] * factor - lse) * kPerUnit;
            if constexpr (kModified) exponent -= kByQuery ? row_rest[r][i / 2] : rest_at(n, i % 2);
            p[r][n][i] = Exp2(exponent);
          }
      if constexpr (Config::kWeights)
        AccumulateWeighted<T, kDim, kRowTiles, kChunk>(acc_value, p,
                                                       second + Layout::LaneOffsetOfB(lane));
      if constexpr (Config::kLogits) {
#pragma unroll
        for (int n = 0; n < kChunk / 8; ++n)
#pragma unroll
          for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              float& dlogit = dlogits[r][n][i];
              if constexpr (kDeltaLast) dlogit += pair_at(n).minus_delta[i % 2];
              dlogit *= p[r][n][i];
              if constexpr (kModified && kByQuery) {
                const int t = warp_row0 + 16 * r + lane / 4 + i / 2 * 8;
                const int s = col0 + chunk0 + 8 * n + lane % 4 * 2 + i % 2;
                if (args.dbias && t < q_len && s < kv_len)
                  args.dbias[(first_row + t) * args.kv_len + s] = dlogit;
              }
            }
        AccumulateWeighted<T, kDim, kRowTiles, kChunk>(acc, dlogits,
                                                       first + Layout::LaneOffsetOfB(lane));
      }
    };
#pragma unroll 1
    for (int chunk0 = 0; chunk0 < kCols; chunk0 += kChunk) {
      const int chunk_col0 = col0 + chunk0;
      const bool any = kByQuery ? band.HoldsAny(warp_row0, 16 * kRowTiles, chunk_col0, kChunk)
                                : band.HoldsAny(chunk_col0, kChunk, warp_row0, 16 * kRowTiles);
      if (!any && !whole_range) continue;
      // Rows and queries past the end may stay in a whole tile: they are not stored, or have p = 0.
      const bool whole = kByQuery ? chunk_col0 + kChunk <= kv_len &&
                                        band.HoldsAll(warp_row0, 16 * kRowTiles, chunk_col0, kChunk)
                                  : band.HoldsAll(chunk_col0, kChunk, warp_row0, 16 * kRowTiles);
      if (!kModified && whole)
        take.template operator()<!kModified>(chunk0, whole);
      else
        take.template operator()<false>(chunk0, whole);
    }
    if (!kByQuery && iteration + 1 < iterations && threadIdx.x < kCols)
      store_statistics(stage ^ 1, next_statistics);
    if (next_group != group) offsets.NextOfGroup(args);
    col0 = next_col0;
    group = next_group;
  }
  CpAsyncWait<0>();  // without iterations the stationary tiles may still be on their way
  __syncthreads();

  [[maybe_unused]] float poison = 0;  // NaN if a dead row reaches the whole of dkey
  if constexpr (!kByQuery) {
    float* dead_sum = reinterpret_cast<float*>(shared + (stages - shared_address));
    if (may_have_dead_rows && DeadRows(args, head, dout, dead_sum)) {
      if (args.masked_row == MaskedRow::kNan) poison = NAN;
      if constexpr (Config::kWeights)
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
          for (int n = 0; n < kDim / 8; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              const int e = 8 * n + lane % 4 * 2 + i % 2;
              if (e < v_dim) acc_value[r][n][i] += dead_sum[e];
            }
    }
  }

  unsigned char* staging = shared + warp_row * Layout::kRowBytes;
  const int64_t warp_rows = rows - warp_row0;
  if constexpr (Config::kLogits) {
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float row_factor = args.scale + poison;
          if constexpr (kByQuery)
            if (args.masked_row == MaskedRow::kNan && row_lse[r][i / 2] == INFINITY)
              row_factor = NAN;
          acc[r][n][i] *= row_factor;
        }
    T* target = kByQuery ? RowPointer(static_cast<T*>(args.dquery), args.query_strides, head.batch,
                                      head.head, warp_row0)
                         : RowPointer(static_cast<T*>(args.dkey), args.key_strides, head.batch,
                                      head.kv_head, warp_row0);
    StoreRows<T, kDim, kRowTiles>(acc, staging, target, first_stride, warp_rows, qk_dim);
  }
  if constexpr (Config::kWeights) {
    T* target = RowPointer(static_cast<T*>(args.dvalue), args.value_strides, head.batch,
                           head.kv_head, warp_row0);
    StoreRows<T, kDim, kRowTiles>(acc_value, staging, target, second_stride, warp_rows, v_dim);
  }
}

template <typename Config, bool kModified>
Status LaunchBackward(const AttentionBackwardArgs& args, const Launch& launch) {
  const auto kernel = attention_backward_kernel<Config, kModified>;
  static_assert(Config::kSharedBytes <= SharedBytesLimit(Config::kDim));
  const cudaError_t error = cudaFuncSetAttribute(
      kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Config::kSharedBytes);
  if (error != cudaSuccess) return Status{cudaGetErrorString(error)};
  const int64_t heads = args.kv_heads * (Config::kByQuery ? args.groups : 1);
  const int64_t rows = Config::kByQuery ? args.q_len : args.kv_len;
  const int64_t blocks = args.batch * heads * ((rows + Config::kRows - 1) / Config::kRows);
  kernel<<<static_cast<unsigned>(blocks), Config::kThreads, Config::kSharedBytes, launch.stream>>>(
      args, MayHaveDeadRows(args));
  return LastLaunch();
}

template <typename Config>
Status LaunchBackward(const AttentionBackwardArgs& args, const Launch& launch) {
  return IsModified(args) || (Config::kByQuery && args.dbias)
             ? LaunchBackward<Config, true>(args, launch)
             : LaunchBackward<Config, false>(args, launch);
}

}  // namespace zenith::attention
