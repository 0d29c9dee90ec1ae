// Attention forward of few queries over many keys (decoding with a cache of keys and values), by
// how fast keys and values can be read: each crosses memory once, for all query heads that share
// it. The rows of a block are up to 16 (head of the group, query) pairs, one A tile of mma.sync.
//
// The keys of a row tile are dealt out in tiles of kCols to all warps of a cluster of blocks. Each
// warp has a ring of buffers and a running softmax of its own and meets nobody on the way
// (Flash-decoding: Dao et al. 2023, crfm.stanford.edu/2023/10/12/flashdecoding). At the end the
// blocks of the cluster read each other's partial sums in shared memory: no scratch in global
// memory, no second launch, and sums in one order, so bit-reproducible.
#pragma once

#include <cooperative_groups.h>

#include <algorithm>

#include "cuda/attention/kernels.h"
#include "cuda/attention/score.cuh"

namespace zenith::attention::hopper {

template <typename T_, int kDim_, int kCols_, int kStages_, int kBlocksPerSm_>
struct DecodeConfig {
  using T = T_;
  static constexpr int kDim = kDim_;        // features, padded; of query, key and value
  static constexpr int kCols = kCols_;      // keys per tile of a warp, a multiple of 16
  static constexpr int kStages = kStages_;  // tiles of keys and values that a warp has room for
  static constexpr int kBlocksPerSm = kBlocksPerSm_;
  static constexpr bool kQueryInRegisters = kDim <= 128;
  static constexpr int kRows = 16, kWarps = 4, kThreads = kWarps * kWarpSize;
  static constexpr int kMaxCluster = 16;  // above 8 a kernel must ask for it
  static constexpr int kTileBytes = kCols * kDim * int{sizeof(T)};
  static constexpr int kWarpBytes = kStages * 2 * kTileBytes;
  static constexpr int kQueryBytes = kRows * kDim * int{sizeof(T)};
  static constexpr int kTilesBytes = kQueryBytes + kWarps * kWarpBytes;
  static constexpr int kStatisticsBytes = kWarps * kRows * int{sizeof(float2)};
  static constexpr int kWeightsBytes = (kMaxCluster * kWarps + 1) * kRows * int{sizeof(float)};
  static constexpr int kSharedBytes = kTilesBytes + kStatisticsBytes + kWeightsBytes;
  // A warp's partial sums take the place of its buffers.
  static_assert(kRows * kDim * int{sizeof(float)} <= kWarpBytes);
  static_assert(kThreads % kRows == 0 && kMaxCluster * kWarps % (kThreads / kRows) == 0);
};

/// A row of the tile: a query of one head of the group, and which keys it may see.
struct DecodeRow {
  int64_t mask, bias;  // offsets of key 0
  int begin, end;      // keys
  int segment;
};

/// `row`: of all rows of the group. Those past the last are like it.
__device__ inline DecodeRow MakeDecodeRow(const AttentionProblem& p, const Band& band,
                                          const HeadIndex& first_head, int row) {
  const int q_len = static_cast<int>(p.q_len), kv_len = static_cast<int>(p.kv_len);
  row = min(row, static_cast<int>(p.groups) * q_len - 1);
  const int group = row / q_len, t = row % q_len;
  const HeadIndex head{first_head.batch, first_head.head + group, first_head.kv_head, group};
  DecodeRow r{.mask = ScoreOffset(p.mask_strides, head) + t * p.mask_strides.query,
              .bias = ScoreOffset(p.bias_strides, head) + t * p.bias_strides.query,
              .begin = band.KeysBegin(t),
              .end = band.KeysEnd(t, 1, kv_len),
              .segment = 0};
  if (p.interval) {
    const int2 keys = LoadInterval(p, ScoreOffset(p.interval_strides, head), t);
    r.begin = max(r.begin, keys.x), r.end = min(r.end, keys.y);
  }
  if (p.query_segments)
    r.segment = p.query_segments[ScoreOffset(p.query_segments_strides, head) +
                                 t * p.query_segments_strides.query];
  return r;
}

/// Copies tiles of kRows rows of `dim` elements; one warp. What a lane copies lies in one chunk of
/// every kRowsPerStep-th row, so that its addresses differ by constants.
template <int kRows, int kDim, typename T>
class TileCopy {
  using Layout = TileLayout<T, kDim>;
  static constexpr int kRowsPerStep = kWarpSize / Layout::kChunksPerRow;
  static_assert(kRowsPerStep > 0 && 8 % kRowsPerStep == 0);

 public:
  __device__ __forceinline__ TileCopy(const T* source, int64_t stride, int dim)
      : source_(source), stride_(stride) {
    const int lane = threadIdx.x % kWarpSize, chunk = lane % Layout::kChunksPerRow;
    first_row_ = lane / Layout::kChunksPerRow;
    inside_ = chunk * Layout::kChunk < dim;
    offset_ = Layout::Offset(first_row_, chunk);
    if (inside_) source_ += first_row_ * stride + chunk * Layout::kChunk;
  }
  /// Starts copying rows from `row` on into `tile`; elements from `dim` and rows from `end` on
  /// become zeros.
  __device__ __forceinline__ void Start(uint32_t tile, int row, int end) const {
    const T* source = source_ + row * stride_;
    const bool whole = row + kRows <= end;
#pragma unroll
    for (int i = 0; i < kRows / kRowsPerStep; ++i) {
      constexpr int kStepBytes = kRowsPerStep * Layout::kRowBytes;
      // The rows' number modulo 8 is in the swizzle, bits that those of the first row leave free.
      const uint32_t to = tile + i * kStepBytes + (offset_ ^ (i * kRowsPerStep % 8 << 4));
      const bool valid = inside_ && (whole || row + first_row_ + i * kRowsPerStep < end);
      CpAsync16(to, valid ? source + i * (kRowsPerStep * stride_) : source_, valid);
    }
  }

 private:
  const T* source_;
  int64_t stride_;
  int first_row_;
  bool inside_;
  uint32_t offset_;
};

/// scores = the 16 rows of A, whose fragments are in `a` or, where registers are short, at
/// `a_shared`, times kCols rows of B.
template <typename T, int kDim, int kCols, bool kInRegisters>
__device__ __forceinline__ void DecodeScores(
    float (&scores)[1][kCols / 8][4],
    const Operand<T, 4> (&a)[kInRegisters ? TileLayout<T, kDim>::kSteps : 1], uint32_t a_shared,
    uint32_t b) {
  using Layout = TileLayout<T, kDim>;
  float odd[kCols / 8][4] = {};  // of odd steps: chains of dependent products half as long
#pragma unroll
  for (int n = 0; n < kCols / 8; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) scores[0][n][i] = 0;
#pragma unroll
  for (int k = 0; k < Layout::kSteps; ++k) {
    Operand<T, 4> operand_a;
    if constexpr (kInRegisters)
      operand_a = a[k];
    else
      LoadMatrix4(operand_a.bits, Layout::Move(a_shared, 0, k));
#pragma unroll
    for (int n = 0; n < kCols / 16; ++n) {
      Operand<T, 4> operand_b;
      LoadMatrix4(operand_b.bits, Layout::Move(b, 16 * n, k));
#pragma unroll
      for (int i = 0; i < 2; ++i)
        MultiplyAdd(k % 2 ? odd[2 * n + i] : scores[0][2 * n + i], operand_a, operand_b, i);
    }
  }
#pragma unroll
  for (int n = 0; n < kCols / 8; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) scores[0][n][i] += odd[n][i];
}

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kBlocksPerSm)
    hopper_attention_decode_kernel(const __grid_constant__ AttentionForwardArgs args) {
  namespace cg = cooperative_groups;
  using T = typename Config::T;
  constexpr int kDim = Config::kDim, kCols = Config::kCols, kRows = Config::kRows;
  constexpr int kWarps = Config::kWarps, kStages = Config::kStages;
  using Layout = TileLayout<T, kDim>;
  extern __shared__ __align__(kTileAlignment) unsigned char shared[];
  const cg::cluster_group cluster = cg::this_cluster();
  const int blocks = static_cast<int>(cluster.num_blocks());
  const int block = static_cast<int>(cluster.block_rank());
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int q_len = static_cast<int>(args.q_len), kv_len = static_cast<int>(args.kv_len);
  const int qk_dim = static_cast<int>(args.qk_dim), v_dim = static_cast<int>(args.v_dim);

  const int all_rows = static_cast<int>(args.groups) * q_len;
  const int row_tiles = (all_rows + kRows - 1) / kRows;
  const int index = static_cast<int>(blockIdx.x) / blocks;
  const int row0 = index % row_tiles * kRows, rows = min(kRows, all_rows - row0);
  HeadIndex head;  // the first of the group
  head.kv_head = index / row_tiles % args.kv_heads;
  head.batch = index / row_tiles / args.kv_heads;
  head.head = head.kv_head * args.groups, head.group = 0;
  const T* key =
      RowPointer(static_cast<const T*>(args.key), args.key_strides, head.batch, head.kv_head, 0);
  const T* value = RowPointer(static_cast<const T*>(args.value), args.value_strides, head.batch,
                              head.kv_head, 0);
  const int32_t* key_segments =
      args.key_segments ? args.key_segments + ScoreOffset(args.key_segments_strides, head)
                        : nullptr;

  const uint32_t query_tile = SharedAddress(shared);
  for (int i = threadIdx.x; i < kRows * Layout::kChunksPerRow; i += Config::kThreads) {
    const int row = i / Layout::kChunksPerRow, chunk = i % Layout::kChunksPerRow;
    const int group = (row0 + row) / q_len, t = (row0 + row) % q_len;
    const bool valid = row < rows && chunk * Layout::kChunk < qk_dim;
    const T* source = static_cast<const T*>(args.query);
    if (valid)
      source = RowPointer(source, args.query_strides, head.batch, head.head + group, t) +
               chunk * Layout::kChunk;
    CpAsync16(query_tile + Layout::Offset(row, chunk), source, valid);
  }
  CpAsyncCommit();

  // Keys that some row sees. Each warp takes every (kWarps * blocks)-th of their tiles.
  const Band band(args);
  const DecodeRow own = MakeDecodeRow(args, band, head, row0 + lane % kRows);
  const bool empty = own.begin >= own.end;
  const int begin = __reduce_min_sync(kAllLanes, empty ? INT_MAX : own.begin);
  const int end = __reduce_max_sync(kAllLanes, empty ? 0 : own.end);
  // Between these all rows see all keys, if nothing but band and intervals forbids them.
  const int all_begin = __reduce_max_sync(kAllLanes, own.begin);
  const int all_end = __reduce_min_sync(kAllLanes, own.end);
  const bool capped = args.softcap > 0, plain = !args.bias && !args.mask && !key_segments;
  const int first = begin < end ? begin / kCols : 0;
  const int tiles = begin < end ? (end + kCols - 1) / kCols - first : 0;
  const int stride = kWarps * blocks;
  DecodeRow row_of_lane[2];  // of the scores that this lane holds
#pragma unroll
  for (int half = 0; half < 2; ++half)
    row_of_lane[half] = MakeDecodeRow(args, band, head, row0 + lane / 4 + 8 * half);

  const uint32_t stages = query_tile + Config::kQueryBytes + warp * Config::kWarpBytes;
  const TileCopy<kCols, kDim, T> keys(key, args.key_strides.length, qk_dim);
  const TileCopy<kCols, kDim, T> values(value, args.value_strides.length, v_dim);
  int next = warp * blocks + block, next_stage = 0;
  const auto load_next = [&] {
    if (next < tiles) {
      const uint32_t tile = stages + next_stage * 2 * Config::kTileBytes;
      keys.Start(tile, (first + next) * kCols, end);
      values.Start(tile + Config::kTileBytes, (first + next) * kCols, end);
    }
    CpAsyncCommit();
    next += stride;
    if (++next_stage == kStages) next_stage = 0;
  };
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) load_next();
  CpAsyncWait<kStages - 1>();  // the query
  __syncthreads();

  const uint32_t lane_query = query_tile + Layout::LaneOffset(lane);
  Operand<T, 4> query[Config::kQueryInRegisters ? Layout::kSteps : 1];
  if constexpr (Config::kQueryInRegisters)
#pragma unroll
    for (int k = 0; k < Layout::kSteps; ++k)
      LoadMatrix4(query[k].bits, Layout::Move(lane_query, 0, k));
  const float scale = capped ? args.scale / args.softcap : args.scale;
  float acc[1][kDim / 8][4] = {};
  float max[2] = {-INFINITY, -INFINITY}, sum[2] = {};  // sum: over this lane's columns
  int stage = 0;
  for (int n = warp * blocks + block; n < tiles; n += stride) {
    CpAsyncWait<kStages - 2>();
    __syncwarp();  // the tile is there for all lanes, and none reads the one before any more
    load_next();
    const uint32_t tile = stages + stage * 2 * Config::kTileBytes;
    if (++stage == kStages) stage = 0;
    const int tile_s0 = (first + n) * kCols, s0 = tile_s0 + lane % 4 * 2;
    float scores[1][kCols / 8][4];
    DecodeScores<T, kDim, kCols, Config::kQueryInRegisters>(
        scores, query, lane_query, tile + Layout::LaneOffsetByColumn(lane));
#pragma unroll
    for (int j = 0; j < kCols / 8; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) scores[0][j][i] *= scale;
    if (capped)
#pragma unroll
      for (int j = 0; j < kCols / 8; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) scores[0][j][i] = args.softcap * Tanh<T>(scores[0][j][i]);
    if (!plain || tile_s0 < all_begin || tile_s0 + kCols > all_end)
#pragma unroll
      for (int j = 0; j < kCols / 8; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const DecodeRow& row = row_of_lane[i / 2];
          const int s = s0 + 8 * j + i % 2;
          float& score = scores[0][j][i];
          bool allowed = s >= row.begin && s < row.end;
          if (args.bias && allowed) score += LoadBias(args, row.bias + s * args.bias_strides.key);
          if (args.mask && allowed) allowed = args.mask[row.mask + s * args.mask_strides.key];
          if (key_segments && allowed)
            allowed = key_segments[s * args.key_segments_strides.key] == row.segment;
          if (!allowed) score = -INFINITY;
        }
    float decay[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float row_max = max[half];
#pragma unroll
      for (int j = 0; j < kCols / 8; ++j)
        row_max = fmaxf(row_max, fmaxf(scores[0][j][2 * half], scores[0][j][2 * half + 1]));
      row_max = fmaxf(row_max, __shfl_xor_sync(kAllLanes, row_max, 1));  // a row lies in 4 lanes
      row_max = fmaxf(row_max, __shfl_xor_sync(kAllLanes, row_max, 2));
      const float shift = row_max == -INFINITY ? 0.f : row_max;  // no -inf - -inf
      decay[half] = Exp2((max[half] - shift) * kLog2E);
      max[half] = row_max;
      sum[half] *= decay[half];
#pragma unroll
      for (int j = 0; j < kCols / 8; ++j)
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          scores[0][j][i] = Exp2((scores[0][j][i] - shift) * kLog2E);
          sum[half] += scores[0][j][i];
        }
    }
    if (__any_sync(kAllLanes, decay[0] != 1 || decay[1] != 1))  // rare once the maximum is found
#pragma unroll
      for (int j = 0; j < kDim / 8; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) acc[0][j][i] *= decay[i / 2];
    AccumulateWeighted<T, kDim, 1, kCols>(acc, scores,
                                          tile + Config::kTileBytes + Layout::LaneOffsetOfB(lane));
  }
  CpAsyncWait<0>();
  __syncwarp();

  // The warp's sums, where its buffers were, and (max, sum) of each row.
  float* partials = reinterpret_cast<float*>(shared + Config::kQueryBytes);  // of warp 0
  constexpr int kPartialStride = Config::kWarpBytes / int{sizeof(float)};
  float2* statistics = reinterpret_cast<float2*>(shared + Config::kTilesBytes);
  float* weights =
      reinterpret_cast<float*>(shared + Config::kTilesBytes + Config::kStatisticsBytes);
  float* inverse = weights + Config::kMaxCluster * kWarps * kRows;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = lane / 4 + 8 * half;
    sum[half] += __shfl_xor_sync(kAllLanes, sum[half], 1);
    sum[half] += __shfl_xor_sync(kAllLanes, sum[half], 2);
    if (lane % 4 == 0) statistics[warp * kRows + row] = {max[half], sum[half]};
#pragma unroll
    for (int j = 0; j < kDim / 8; ++j)
      *reinterpret_cast<float2*>(partials + warp * kPartialStride + row * kDim + 8 * j +
                                 lane % 4 * 2) = {acc[0][j][2 * half], acc[0][j][2 * half + 1]};
  }
  cluster.sync();

  // What each warp's sum weighs: 2^(its maximum - that of all). Some lanes share a row.
  constexpr int kLanesPerRow = Config::kThreads / kRows;
  constexpr int kPartsPerLane = Config::kMaxCluster * kWarps / kLanesPerRow;
  const int own_row = threadIdx.x / kLanesPerRow;
  float2 parts[kPartsPerLane];
  float row_max = -INFINITY, row_sum = 0;
#pragma unroll
  for (int i = 0; i < kPartsPerLane; ++i) {
    const int part = i * kLanesPerRow + lane % kLanesPerRow;
    parts[i] = {-INFINITY, 0};
    if (part < blocks * kWarps)
      parts[i] =
          cluster.map_shared_rank(statistics, part / kWarps)[part % kWarps * kRows + own_row];
    row_max = fmaxf(row_max, parts[i].x);
  }
  row_max = WarpAllReduce<Max>(row_max, kLanesPerRow);
  const float shift = row_max == -INFINITY ? 0.f : row_max;
#pragma unroll
  for (int i = 0; i < kPartsPerLane; ++i) {
    const float weight = Exp2((parts[i].x - shift) * kLog2E);
    weights[(i * kLanesPerRow + lane % kLanesPerRow) * kRows + own_row] = weight;
    row_sum += weight * parts[i].y;
  }
  row_sum = WarpAllReduce<Add>(row_sum, kLanesPerRow);
  if (lane % kLanesPerRow == 0) {
    inverse[own_row] = 1.f / row_sum;  // infinite, and out NaN, without an allowed key
    if (block == 0 && own_row < rows)
      WriteLse(args, FirstRow(args, head) + row0 + own_row, row_sum == 0, row_max, logf(row_sum));
  }
  __syncthreads();
  for (int i = block * Config::kThreads + threadIdx.x; i < rows * kDim;
       i += blocks * Config::kThreads) {
    const int row = i / kDim, e = i % kDim;
    if (e >= v_dim) continue;
    float total = 0;
#pragma unroll 8
    for (int j = 0; j < blocks * kWarps; ++j)
      total += weights[j * kRows + row] *
               cluster.map_shared_rank(partials,
                                       j / kWarps)[j % kWarps * kPartialStride + row * kDim + e];
    total *= inverse[row];
    if (isinf(inverse[row]) && args.masked_row == MaskedRow::kMean) {
      total = 0;
#pragma unroll 8
      for (int64_t s = 0; s < kv_len; ++s)
        total += ToFloat(value[s * args.value_strides.length + e]);
      total /= static_cast<float>(kv_len);
    }
    const int group = (row0 + row) / q_len, t = (row0 + row) % q_len;
    RowPointer(static_cast<T*>(args.out), args.out_strides, head.batch, head.head + group, t)[e] =
        FromFloat<T>(total);
  }
  cluster.sync();  // others may still read this block's sums
}

/// For problems that FitsTensorCores (cuda/attention.cu) admits, of 16-bit types.
template <typename Config>
Status LaunchDecode(const AttentionForwardArgs& args, const Launch& launch) {
  const auto kernel = hopper_attention_decode_kernel<Config>;
  int device = 0, processors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 Config::kSharedBytes);
  if (error == cudaSuccess)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  if (error != cudaSuccess) return Status{cudaGetErrorString(error)};

  // The cluster with which the device works through all keys soonest, a block a multiprocessor at a
  // time, if it gains a tenth: blocks cost some time each. Two tiles a warp at least.
  const int64_t row_tiles = (args.groups * args.q_len + Config::kRows - 1) / Config::kRows;
  const int64_t items = args.batch * args.kv_heads * row_tiles;
  const int64_t slots = processors;
  const int64_t most = args.kv_len / (2 * Config::kWarps * Config::kCols);
  int64_t cluster = 1, rounds = (items + slots - 1) / slots;
  for (int64_t c = 2; c <= std::min<int64_t>(most, Config::kMaxCluster); c *= 2) {
    const int64_t rounds_of_c = (items * c + slots - 1) / slots;
    if (10 * rounds_of_c * cluster < 9 * rounds * c) cluster = c, rounds = rounds_of_c;
  }

  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(items * cluster));
  config.blockDim = dim3(Config::kThreads);
  config.dynamicSmemBytes = Config::kSharedBytes;
  config.stream = launch.stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  error = cudaLaunchKernelEx(&config, kernel, args);
  return error == cudaSuccess ? LastLaunch() : Status{cudaGetErrorString(error)};
}

}  // namespace zenith::attention::hopper
