// Attention forward on tensor cores (FlashAttention-2: Dao 2023, arXiv:2307.08691). One block per
// tile of queries of one head; it walks over the tiles of keys in the band with an online softmax.
// query and out cross memory once, key and value once per tile of queries (from L2, mostly). Scores
// never leave the registers.
//
// Each warp owns 16 * kRowTiles queries. mma.sync reads its operands through shared memory at 128
// bytes per cycle, and a B fragment (256 bytes) serves kRowTiles products: two row tiles where the
// registers allow it, since with one the loads take twice the time of the products.
#pragma once

#include "cuda/attention/kernels.h"
#include "cuda/attention/score.cuh"

namespace zenith::attention {

template <typename T_, int kDim_, int kWarps, int kRowTiles_, int kCols_, int kBlocksPerSm_>
struct ForwardConfig {
  using T = T_;
  static constexpr int kDim = kDim_;            // features, padded; of query, key and value
  static constexpr int kRowTiles = kRowTiles_;  // tiles of 16 queries per warp
  static constexpr int kCols = kCols_;          // keys per tile
  static constexpr int kBlocksPerSm = kBlocksPerSm_;
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kRows = 16 * kRowTiles * kWarps;
  static constexpr int kStages = 2;
  static constexpr int kQueryBytes = kRows * kDim * sizeof(T);
  static constexpr int kKeyBytes = kCols * kDim * sizeof(T);
  static constexpr int kSharedBytes = kQueryBytes + kStages * 2 * kKeyBytes;
};

/// mean[e] of value over all keys, for the rows without an allowed key. The whole block.
template <typename T>
__device__ void MeanOfValues(const AttentionForwardArgs& args, const T* value, float* mean) {
  for (int e = threadIdx.x; e < args.v_dim; e += blockDim.x) {
    float sum = 0;
#pragma unroll 8
    for (int64_t s = 0; s < args.kv_len; ++s)
      sum += ToFloat(value[s * args.value_strides.length + e]);
    mean[e] = sum / static_cast<float>(args.kv_len);  // NaN without keys: 0 / 0
  }
}

/// kModified: as IsModified.
template <typename Config, bool kModified>
__global__ void __launch_bounds__(Config::kThreads, Config::kBlocksPerSm)
    attention_forward_kernel(const __grid_constant__ AttentionForwardArgs args) {
  constexpr int kDim = Config::kDim, kCols = Config::kCols, kRows = Config::kRows;
  constexpr int kRowTiles = Config::kRowTiles, kThreads = Config::kThreads;
  using T = typename Config::T;
  using Layout = TileLayout<T, kDim>;
  extern __shared__ __align__(kTileAlignment) unsigned char shared[];
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;

  // Late queries see most keys under a causal mask: they start first, short blocks fill the end.
  const int q_len = static_cast<int>(args.q_len), kv_len = static_cast<int>(args.kv_len);
  const int q_tiles = (q_len + kRows - 1) / kRows;
  const HeadIndex head = HeadIndex::Of(args, blockIdx.x / q_tiles);
  const int t0 = (q_tiles - 1 - static_cast<int>(blockIdx.x % q_tiles)) * kRows;
  const int warp_row = warp * 16 * kRowTiles, warp_t0 = t0 + warp_row;

  const T* query =
      RowPointer(static_cast<const T*>(args.query), args.query_strides, head.batch, head.head, t0);
  const T* key =
      RowPointer(static_cast<const T*>(args.key), args.key_strides, head.batch, head.kv_head, 0);
  const T* value = RowPointer(static_cast<const T*>(args.value), args.value_strides, head.batch,
                              head.kv_head, 0);
  const int qk_dim = static_cast<int>(args.qk_dim), v_dim = static_cast<int>(args.v_dim);
  const ScoreOffsets offsets(args, head);

  const uint32_t query_tile = SharedAddress(shared);
  const uint32_t stages = query_tile + Config::kQueryBytes;
  const auto load_keys = [&](int s0, int stage) {
    const uint32_t tile = stages + stage * 2 * Config::kKeyBytes;
    LoadTile<kCols, kDim, kThreads>(tile, key + s0 * args.key_strides.length,
                                    args.key_strides.length, kv_len - s0, qk_dim);
    LoadTile<kCols, kDim, kThreads>(tile + Config::kKeyBytes,
                                    value + s0 * args.value_strides.length,
                                    args.value_strides.length, kv_len - s0, v_dim);
  };

  const Band band(args);
  const int2 seen = KeysSeen(args, band, offsets, t0, min(kRows, q_len - t0));
  const int s_begin = seen.x / kCols * kCols, s_end = seen.y;
  LoadTile<kRows, kDim, kThreads>(query_tile, query, args.query_strides.length, q_len - t0, qk_dim);
  if (s_begin < s_end) load_keys(s_begin, 0);
  CpAsyncCommit();

  const uint32_t lane_query = query_tile + warp_row * Layout::kRowBytes + Layout::LaneOffset(lane);
  // What takes a score, as the loop below leaves it, to units of log2.
  const float factor = kModified ? kLog2E : args.scale * kLog2E;
  float acc[kRowTiles][kDim / 8][4] = {};
  float max[kRowTiles][2], sum[kRowTiles][2] = {};  // of this lane's rows; sum over its columns
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) max[r][0] = max[r][1] = -INFINITY;

  for (int s0 = s_begin, stage = 0; s0 < s_end; s0 += kCols, stage ^= 1) {
    CpAsyncWait<0>();
    __syncthreads();  // this stage is complete, and nobody reads the other one any more
    if (s0 + kCols < s_end) load_keys(s0 + kCols, stage ^ 1);
    CpAsyncCommit();
    if (!band.HoldsAny(warp_t0, 16 * kRowTiles, s0, kCols)) continue;  // the warp as a whole
    const uint32_t key_tile = stages + stage * 2 * Config::kKeyBytes;

    float scores[kRowTiles][kCols / 8][4];
    MultiplyByRows<T, kDim, kRowTiles, kCols>(scores, lane_query,
                                              key_tile + Layout::LaneOffsetByColumn(lane));
    const bool whole = s0 + kCols <= kv_len && band.HoldsAll(warp_t0, 16 * kRowTiles, s0, kCols);
    ApplyBandMaskBias<T, true, kModified>(scores, args, band, offsets, warp_t0, s0, whole,
                                          [](auto...) {});

    // Online softmax: scores become weights 2^(score - max); what was summed before decays.
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float row_max = max[r][half];
#pragma unroll
        for (int n = 0; n < kCols / 8; ++n)
          row_max = fmaxf(row_max, fmaxf(scores[r][n][2 * half], scores[r][n][2 * half + 1]));
        row_max = fmaxf(row_max, __shfl_xor_sync(kAllLanes, row_max, 1));  // a row lies in 4 lanes
        row_max = fmaxf(row_max, __shfl_xor_sync(kAllLanes, row_max, 2));
        const float shift = row_max == -INFINITY ? 0.f : row_max;  // no -inf - -inf
        const float rounded_shift = __fmul_rn(shift, factor);
        const auto weight = [&](float score) {
          return Exp2(kSubtractFirst<T, kModified> ? (score - shift) * factor
                                                   : score * factor - rounded_shift);
        };
        // Exactly 1 while the maximum stays: what the product's rounding would leave, 2^-20 at a
        // maximum of 20, would be in what was summed once more with each tile.
        const float decay = kSubtractFirst<T, kModified>
                                ? weight(max[r][half])
                                : Exp2(__fmul_rn(max[r][half], factor) - rounded_shift);
        max[r][half] = row_max;
        float row_sum = 0;
#pragma unroll
        for (int n = 0; n < kCols / 8; ++n)
#pragma unroll
          for (int i = 2 * half; i < 2 * half + 2; ++i) {
            scores[r][n][i] = weight(scores[r][n][i]);
            row_sum += scores[r][n][i];
          }
        sum[r][half] = sum[r][half] * decay + row_sum;
#pragma unroll
        for (int n = 0; n < kDim / 8; ++n) {
          acc[r][n][2 * half] *= decay;
          acc[r][n][2 * half + 1] *= decay;
        }
      }
    AccumulateWeighted<T, kDim, kRowTiles, kCols>(
        acc, scores, key_tile + Config::kKeyBytes + Layout::LaneOffsetOfB(lane));
  }

  // out = acc / sum; a row with sum == 0 saw no key: 0 / 0 is the NaN it returns under kNan.
  bool dead = false;
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float& row_sum = sum[r][half];
      row_sum += __shfl_xor_sync(kAllLanes, row_sum, 1);
      row_sum += __shfl_xor_sync(kAllLanes, row_sum, 2);
      const float inverse = 1.f / row_sum;
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) {
        acc[r][n][2 * half] *= inverse;
        acc[r][n][2 * half + 1] *= inverse;
      }
      const int t = warp_t0 + 16 * r + 8 * half + lane / 4;
      if (t >= q_len) continue;
      dead = dead || row_sum == 0;
      if (lane % 4 == 0) {
        const float row_max = max[r][half];  // shifted as above, so that its rounding cancels
        const int64_t row = FirstRow(args, head) + t;
        if constexpr (kSubtractFirst<T, kModified>) {
          WriteLse(args, row, row_sum == 0, row_max * (kModified ? 1.f : args.scale),
                   logf(row_sum));
        } else {
          args.lse[row] =
              row_sum == 0 ? -INFINITY : kLn2 * (__fmul_rn(row_max, factor) + log2f(row_sum));
          args.lse_rest[row] = 0;
        }
      }
    }

  CpAsyncWait<0>();  // without keys the query tile may still be on its way into the staging rows
  const bool fill = args.masked_row == MaskedRow::kMean;
  if (__syncthreads_or(dead) && fill) {
    float* mean = reinterpret_cast<float*>(shared + Config::kQueryBytes);  // the stages are free
    MeanOfValues(args, value, mean);
    __syncthreads();
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (sum[r][i / 2] == 0) acc[r][n][i] = mean[8 * n + lane % 4 * 2 + i % 2];
  }
  T* out = RowPointer(static_cast<T*>(args.out), args.out_strides, head.batch, head.head, warp_t0);
  StoreRows<T, kDim, kRowTiles>(acc, shared + warp_row * Layout::kRowBytes, out,
                                args.out_strides.length, q_len - warp_t0, v_dim);
}

template <typename Config, bool kModified>
Status LaunchForward(const AttentionForwardArgs& args, const Launch& launch) {
  const auto kernel = attention_forward_kernel<Config, kModified>;
  static_assert(Config::kSharedBytes <= SharedBytesLimit(Config::kDim));
  const cudaError_t error = cudaFuncSetAttribute(
      kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Config::kSharedBytes);
  if (error != cudaSuccess) return Status{cudaGetErrorString(error)};
  const int64_t q_tiles = (args.q_len + Config::kRows - 1) / Config::kRows;
  const auto blocks = static_cast<unsigned>(args.batch * args.kv_heads * args.groups * q_tiles);
  kernel<<<blocks, Config::kThreads, Config::kSharedBytes, launch.stream>>>(args);
  return LastLaunch();
}

template <typename Config>
Status LaunchForward(const AttentionForwardArgs& args, const Launch& launch) {
  return IsModified(args) ? LaunchForward<Config, true>(args, launch)
                          : LaunchForward<Config, false>(args, launch);
}

}  // namespace zenith::attention
