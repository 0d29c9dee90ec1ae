// A linear layer with integer weights and few rows on Hopper. Contract:
// ffi/kernels/quantized_linear.h; measurements: docs/kernels/quantized_linear.md.
//
// What bounds it is reading w once. Each warp has a ring of stages of its own in shared memory: one
// of its lanes asks the copy engine for boxes of w and x, all wait at the stage's barrier, widen w
// in registers and multiply. Warps do not meet on the way.
//
// The warps of a block and the blocks of a cluster share out k for a tile of columns; their float32
// sums are added in one order in shared memory, so that results are the same in every run. Where
// each sum goes is worked out while the first weights are under way: after the last of them nothing
// else happens, and an instruction takes as long as a thousand bytes.
#pragma once

#include <algorithm>
#include <array>

#include "cuda/core/cluster.cuh"
#include "cuda/core/convert.cuh"
#include "cuda/core/launch.h"
#include "cuda/core/matrix_map.h"
#include "cuda/core/reduce.cuh"
#include "cuda/core/tma_matrix.cuh"
#include "cuda/core/vector.cuh"
#include "cuda/quantized_linear/hopper/tiles.cuh"
#include "cuda/quantized_linear/split.h"
#include "ffi/kernels/quantized_linear.h"

namespace zenith::quantized_linear {

constexpr int kMaxCluster = 8;  // the largest that every Hopper GPU can place

/// kTiles: tiles of 8 rows of x. kGrouped: more than one group, whose scale is applied in between.
/// kWarps: of a block, at most. kStages: of a warp's ring. 48 KB of w on their way for each
/// multiprocessor are enough; with three times as much the first stage came 2 us later, and all
/// behind it (H100, 11/2026).
template <typename T_, typename P_, typename Tile_, int kTiles_, bool kGrouped_, int kWarps_,
          int kStages_>
struct HopperConfig {
  using T = T_;
  using P = P_;
  using Tile = Tile_;
  static constexpr bool kGrouped = kGrouped_;
  static constexpr int kTiles = kTiles_, kWarps = kWarps_, kStages = kStages_;
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kColumns = Tile::kColumns;
  static constexpr int kXBytes = kTiles * Tile::kXBytes;
  static constexpr int kScaleBytes = kGrouped ? kColumns * int{sizeof(P)} : 0;
  // A warp's sums take the place of its ring: w of all stages, x of all, scales of all. Boxes begin
  // at multiples of 1024 bytes.
  static constexpr int kStride = kColumns + 4;  // floats; rows begin in other banks
  static constexpr int kXAt = kStages * Tile::kWBytes, kScaleAt = kXAt + kStages * kXBytes;
  static constexpr int kRingBytes = kScaleAt + kStages * kScaleBytes;
  static constexpr int kSumBytes = 8 * kTiles * kStride * int{sizeof(float)};
  static constexpr int kWarpBytes =
      ((kRingBytes > kSumBytes ? kRingBytes : kSumBytes) + 1023) / 1024 * 1024;
  // Sums of a block, four columns of a row each.
  static constexpr int kMostParts = 8 * kTiles * 2 * kColumns / 4;
  static constexpr int kPartsOfThread = (kMostParts + kThreads - 1) / kThreads;
  static constexpr int kInboxAt = kWarps * kWarpBytes;
  static constexpr int kBarriersAt = kInboxAt + (kMostParts + kMaxCluster) * 16;
  static constexpr int kSharedBytes = kBarriersAt + (kWarps * kStages + 1) * 8;
  static_assert(kWarps % 2 == 0 && kXAt % 1024 == 0 && kXBytes % 512 == 0);
  static_assert(kSharedBytes <= 227 * 1024);
};

/// How tiles and sums are shared out.
struct Shares {
  int two_tiles;            // 1 if a block has two tiles of columns, which its warps take in turn
  uint32_t blocks_inverse;  // (a * this) >> 16 = a / blocks, for as many parts as there are
  int stage_bytes;          // of w and x, that the copy engine brings
};

/// A block: one or two tiles of columns, k shared out to its warps, and to those of all blocks of a
/// cluster (blockIdx.x). w crosses memory once, x once for each tile.
template <typename C>
__global__ void __launch_bounds__(C::kThreads, 1)
    quantized_linear_hopper_kernel(const __grid_constant__ CUtensorMap w_map,
                                   const __grid_constant__ CUtensorMap x_map,
                                   const __grid_constant__ QuantizedLinearArgs args, Split split,
                                   Shares shares) {
#if __CUDA_ARCH__ >= 900
  using T = typename C::T;
  using P = typename C::P;
  using Tile = typename C::Tile;
  using Params = Vector<P, 4>;
  constexpr int kTiles = C::kTiles, kWarps = C::kWarps;
  const int threads = static_cast<int>(blockDim.x);
  extern __shared__ __align__(1024) unsigned char shared[];
  // Known to be the same in all lanes, it stays in uniform registers, which copies need.
  const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / kWarpSize, 0);
  const int lane = threadIdx.x % kWarpSize, warps = threads / kWarpSize;
  const int blocks = static_cast<int>(gridDim.x), rank = static_cast<int>(blockIdx.x);
  const int two_tiles = shares.two_tiles, all_columns = static_cast<int>(args.n);
  const int block_column = static_cast<int>(blockIdx.y) * (C::kColumns << two_tiles);
  const int column = block_column + (warp & two_tiles) * C::kColumns;

  const int range = (warp >> two_tiles) * blocks + rank;
  const int steps = (split.units + (range < split.longer)) * split.unit -
                    (range == split.last_range ? split.missing : 0);
  const uint32_t ring = SharedAddress(shared) + warp * C::kWarpBytes;
  const uint32_t barriers = SharedAddress(shared) + C::kBarriersAt + warp * C::kStages * 8;
  const uint32_t arrived = SharedAddress(shared) + C::kBarriersAt + kWarps * C::kStages * 8;
  int ahead = 0, ahead_unit = range, ahead_of_unit = 0;  // what is asked for next
  const auto copy_next = [&](int stage) {
    if (ahead == steps) return;
    ++ahead;
    const int k = (ahead_unit * split.unit + ahead_of_unit) * Tile::kStageK;
    const bool ends_unit = ahead_of_unit + 1 == split.unit || ahead == steps;
    const bool with_scale = C::kGrouped && ends_unit && column < all_columns;
    if (lane == 0) {
      const uint32_t barrier = barriers + 8 * stage;
      const int scale_bytes = min(all_columns - column, C::kColumns) * int{sizeof(P)};
      BarrierExpect(barrier, shares.stage_bytes + (with_scale ? scale_bytes : 0));
      TmaLoad(ring + stage * Tile::kWBytes, w_map, barrier, Tile::BoxColumn(k, column),
              Tile::BoxRow(k, column));
#pragma unroll
      for (int t = 0; t < kTiles; ++t)
#pragma unroll
        for (int b = 0; b < Tile::kStageK / Tile::kXBox; ++b)
          TmaLoad(ring + C::kXAt + stage * C::kXBytes + t * Tile::kXBytes + b * (16 * Tile::kXBox),
                  x_map, barrier, k + b * Tile::kXBox, 8 * t);
      if (with_scale) {
        const int64_t group = split.units_of_group == 1
                                  ? ahead_unit
                                  : __umulhi(ahead_unit, split.units_of_group_inverse);
        BulkLoad(ring + C::kScaleAt + stage * C::kScaleBytes,
                 static_cast<const P*>(args.scale) + group * args.n + column, scale_bytes, barrier);
      }
    }
    if (++ahead_of_unit == split.unit) ahead_of_unit = 0, ahead_unit += split.ranges;
  };
  if (lane == 0) {
#pragma unroll
    for (int i = 0; i < C::kStages; ++i) BarrierInit(barriers + 8 * i, 1);
    BarrierInitFence();
  }
  __syncwarp();  // the barriers are initialised
#pragma unroll 1
  for (int i = 0; i < C::kStages; ++i) copy_next(i);

  // A block's sums are parts of four columns of a row: of its warps' sums a thread adds parts
  // threadIdx.x and so on, and sends them to the block that has the part, every blocks-th.
  const int row_shift = (C::kColumns == 64 ? 4 : C::kColumns == 128 ? 5 : 6) + two_tiles;
  const int parts = static_cast<int>(args.rows) << row_shift;
  const auto share = [&](int all) { return static_cast<int>(all * shares.blocks_inverse >> 16); };
  const int own_parts = share(parts - rank + blocks - 1), most_parts = share(parts + blocks - 1);
  if (blocks > 1) {
    if (threadIdx.x == 0) {
      BarrierInit(arrived, 1);
      BarrierInitFence();
      BarrierExpect(arrived, static_cast<uint32_t>(own_parts * blocks * 16));
    }
    ClusterArrive();
  }
  const unsigned char* from[C::kPartsOfThread];
  int owner[C::kPartsOfThread];
  uint32_t to[C::kPartsOfThread];
  T* gY[C::kPartsOfThread];
  [[maybe_unused]] Params scale[C::kPartsOfThread];
  Params bias[C::kPartsOfThread];
#pragma unroll
  for (int i = 0; i < C::kPartsOfThread; ++i) {
    const int nth = i * threads + static_cast<int>(threadIdx.x);
    const auto row = [&](int part) { return part >> row_shift; };
    const auto at = [&](int part) { return (part & ((1 << row_shift) - 1)) * 4; };
    from[i] = shared + at(nth) / C::kColumns * C::kWarpBytes +
              (row(nth) * C::kStride + at(nth) % C::kColumns) * int{sizeof(float)};
    const int place = share(nth);
    owner[i] = nth - place * blocks;
    to[i] = SharedAddress(shared) + C::kInboxAt + (rank * most_parts + place) * 16;
    const int part = nth * blocks + rank, n = block_column + at(part);
    gY[i] = nullptr;
    if (part < parts && n < all_columns) {
      gY[i] = static_cast<T*>(args.y) + row(part) * args.n + n;
      if constexpr (!C::kGrouped) scale[i] = LoadVector<4>(static_cast<const P*>(args.scale) + n);
      if (args.bias != nullptr) bias[i] = LoadVector<4>(static_cast<const P*>(args.bias) + n);
    }
  }
  if (blocks > 1) ClusterWait();  // all have begun

  float sums[kTiles][Tile::kAccumulators][4] = {};
  float total[kTiles][Tile::kAccumulators][4] = {};
  const typename Tile::Lane places(lane);
  Ring<C::kStages> at;
  [[maybe_unused]] int of_unit = split.unit;
#pragma unroll 1
  for (int step = 1; step <= steps; ++step) {
    BarrierWait(barriers + 8 * at.stage, at.parity);
    Tile::Multiply(ring + at.stage * Tile::kWBytes, ring + C::kXAt + at.stage * C::kXBytes, places,
                   sums);
    if (C::kGrouped && (--of_unit == 0 || step == steps)) {  // total += scale * sums
      of_unit = split.unit;
      float scales[Tile::kAccumulators][2];
      Tile::template Scales<P>(
          shared + warp * C::kWarpBytes + C::kScaleAt + at.stage * C::kScaleBytes, lane, scales);
#pragma unroll
      for (int t = 0; t < kTiles; ++t)
#pragma unroll
        for (int a = 0; a < Tile::kAccumulators; ++a)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            total[t][a][i] += scales[a][i / 2] * sums[t][a][i];
            sums[t][a][i] = 0.0f;
          }
    }
    __syncwarp();  // all have read the stage
    copy_next(at.stage);
    at.Advance();
  }

  // The warps' sums, then those of the cluster's blocks, each in one order.
  float* const own_sums = reinterpret_cast<float*>(shared + warp * C::kWarpBytes);
#pragma unroll
  for (int t = 0; t < kTiles; ++t)
    Tile::Store(C::kGrouped ? total[t] : sums[t], own_sums + 8 * t * C::kStride, C::kStride,
                static_cast<int>(args.rows) - 8 * t, lane);
  __syncthreads();
  const auto add = [](float4& sum, const void* shared_part) {
    const float4 other = *static_cast<const float4*>(shared_part);
    sum.x += other.x, sum.y += other.y, sum.z += other.z, sum.w += other.w;
  };
  float4 sum[C::kPartsOfThread] = {};
#pragma unroll
  for (int i = 0; i < C::kPartsOfThread; ++i) {
    if (i * threads + static_cast<int>(threadIdx.x) >= parts) break;
#pragma unroll
    for (int j = 0; j < kWarps; ++j)
      if (j < warps && (j % 2 == 0 || !two_tiles)) add(sum[i], from[i] + j * C::kWarpBytes);
    if (blocks > 1) StoreTo(owner[i], to[i], arrived, sum[i]);
  }
  if (blocks > 1) BarrierWait(arrived, 0);
#pragma unroll
  for (int i = 0; i < C::kPartsOfThread; ++i) {
    if (gY[i] == nullptr) continue;
    if (blocks > 1) {
      const unsigned char* const inbox =
          shared + C::kInboxAt + (i * threads + static_cast<int>(threadIdx.x)) * 16;
      sum[i] = {};
#pragma unroll
      for (int j = 0; j < kMaxCluster; ++j)
        if (j < blocks) add(sum[i], inbox + j * most_parts * 16);
    }
    float values[4] = {sum[i].x, sum[i].y, sum[i].z, sum[i].w}, params[4];
    if constexpr (!C::kGrouped) {
      ToFloat(scale[i], params);
#pragma unroll
      for (int j = 0; j < 4; ++j) values[j] *= params[j];
    }
    if (args.bias != nullptr) {
      ToFloat(bias[i], params);
#pragma unroll
      for (int j = 0; j < 4; ++j) values[j] += params[j];
    }
    *reinterpret_cast<uint2*>(gY[i]) = {PackPair<T>(values[0], values[1]),
                                        PackPair<T>(values[2], values[3])};
  }
#endif
}

/// How many clusters of each size the device runs at once. Asked for once: the devices of a process
/// are taken to be alike.
template <typename C>
std::array<int, kMaxCluster + 1> ClustersAtOnce() {
  std::array<int, kMaxCluster + 1> most = {};
  for (int blocks = 1; blocks <= kMaxCluster; ++blocks) {
    cudaLaunchAttribute cluster = {};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = static_cast<unsigned>(blocks);
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(C::kThreads);
    config.dynamicSmemBytes = C::kSharedBytes;
    config.attrs = &cluster;
    config.numAttrs = 1;
    if (cudaOccupancyMaxActiveClusters(&most[blocks], quantized_linear_hopper_kernel<C>, &config) !=
        cudaSuccess) {
      most[blocks] = 0;
      (void)cudaGetLastError();
    }
  }
  return most;
}

/// Between `fewest` and `most` warps of each of so many blocks, and their units. The end of a group
/// takes a warp about as long as half a step; fewer warps than the most must gain a sixteenth.
inline Split HopperSplit(int64_t steps, int64_t group_steps, int64_t blocks, int64_t fewest,
                         int64_t most, int64_t unit) {
  if (group_steps == 0) return SplitOf(steps, blocks * most, 0, unit);
  const auto cost = [](const Split& split) {
    return (1 + 0.5 / split.unit) * split.Most() * split.ranges;
  };
  Split best = SplitOf(steps, blocks * most, group_steps, 1);
  for (int64_t warps = most; warps >= fewest; --warps) {
    for (unit = group_steps; unit > 0; unit = unit % 2 == 0 ? unit / 2 : 0) {
      const Split split = SplitOf(steps, blocks * warps, group_steps, unit);
      if (cost(split) < (split.ranges == best.ranges ? 1 : 15.0 / 16) * cost(best)) best = split;
    }
  }
  return best;
}

template <typename C>
Status LaunchHopper(const QuantizedLinearArgs& args, const Launch& launch) {
  using Tile = typename C::Tile;
  const auto kernel = quantized_linear_hopper_kernel<C>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, C::kSharedBytes);
  if (error != cudaSuccess) return {cudaGetErrorString(error)};

  // Two tiles of columns a block where there are more of them than multiprocessors. The smallest
  // clusters that fill nine of ten: memory is then what is waited for. They must all run at once,
  // or the last ones double the time.
  static const std::array<int, kMaxCluster + 1> most = ClustersAtOnce<C>();
  int device = 0, multiprocessors = 0;
  (void)cudaGetDevice(&device);
  (void)cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  int64_t tiles = (args.n + C::kColumns - 1) / C::kColumns;
  const int two_tiles = tiles > multiprocessors ? 1 : 0;
  tiles = (tiles + two_tiles) >> two_tiles;
  if (tiles > 65535) return {"more than 65535 tiles of columns"};
  const int64_t steps = (args.k + Tile::kStageK - 1) / Tile::kStageK;
  int64_t blocks = 1;
  for (int b = 2; b <= kMaxCluster && 10 * blocks * tiles < 9 * multiprocessors; ++b) {
    if (b * C::kWarps <= steps && most[b] >= tiles) blocks = b;
  }
  // Lines that were not asked for: a neighbour's, which cost up to 8 % where several blocks share
  // out k, or the warp's own next ones, which gain 6 % (H100, 11/2026).
  const bool promoted = args.transposed || blocks == 1;
  CUtensorMap w_map, x_map;
  const int64_t w_rows = args.transposed ? args.n : args.k;
  const int64_t w_row_bytes = (args.transposed ? args.k : args.n) * args.bits / 8;
  Status made = MakeMatrixMap({args.w, 1, w_rows, w_row_bytes}, Tile::kBoxRows, Tile::kBoxBytes,
                              Tile::kSwizzled, promoted, w_map);
  if (!made.ok()) return made;
  // Rows that are not there are not copied: what lies in their place has results that no one
  // stores.
  const int x_rows = static_cast<int>(args.rows < 8 ? args.rows : 8);
  made = MakeMatrixMap({args.x, 2, args.rows, args.k}, x_rows, Tile::kXBox, true, true, x_map);
  if (!made.ok()) return made;

  const int64_t sums = args.rows * C::kColumns / 4 << two_tiles;  // of a block, that a thread adds
  const int64_t enough = (sums / C::kPartsOfThread + kWarpSize - 1) / kWarpSize;
  const int64_t fewest = std::max(enough + two_tiles, C::kWarps / 2 + int64_t{1}) >> two_tiles;
  const Split split = HopperSplit(steps, args.groups > 1 ? steps / args.groups : 0, blocks, fewest,
                                  C::kWarps >> two_tiles, args.transposed ? 2 : 1);
  const int64_t warps = split.ranges / blocks << two_tiles;
  const Shares shares = {two_tiles, static_cast<uint32_t>(65536 / blocks + 1),
                         Tile::kWBytes + C::kTiles * Tile::kXBytes / 8 * x_rows};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(tiles));
  config.blockDim = dim3(static_cast<unsigned>(warps) * kWarpSize);
  config.dynamicSmemBytes = C::kSharedBytes;
  config.stream = launch.stream;
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = static_cast<unsigned>(blocks);
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  config.attrs = &cluster;
  config.numAttrs = blocks > 1 ? 1 : 0;
  const cudaError_t launched =
      cudaLaunchKernelEx(&config, kernel, w_map, x_map, args, split, shares);
  return launched == cudaSuccess ? LastLaunch() : Status{cudaGetErrorString(launched)};
}

}  // namespace zenith::quantized_linear
