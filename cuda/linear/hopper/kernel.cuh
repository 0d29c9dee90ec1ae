// Linear layer for Hopper, 16-bit types: y = epilogue(x w + bias) + residual.
//
// A persistent block of a producer and two consumer warpgroups, in pairs (clusters of 2) that work
// on neighbouring rows and the same columns: each fetches its x and half of the w that both need. A
// consumer owns a whole tile, kRows x kCols of float32 in its registers; while it multiplies, the
// other one applies the epilogue to its last tile and stores it, so that the tensor cores wait for
// no epilogue ("ping-pong"). x and w cross memory once, for the most part, and L2 once a tile. y
// leaves through shared memory and the copy engine. What was tried and measured:
// docs/kernels/linear_hopper.md.
#pragma once

#include "cuda/core/launch.h"
#include "cuda/core/quad.cuh"
#include "cuda/core/tensor_map.h"
#include "cuda/core/tma.cuh"
#include "cuda/core/tma_store.cuh"
#include "cuda/core/wgmma.cuh"
#include "cuda/linear/epilogue.cuh"

namespace zenith::linear {

inline constexpr int kMaxSharedBytes = 227 * 1024;  // of a block; CUDA C++ Programming Guide, 9.0
inline constexpr int kTileAlignment = 1024;         // of the swizzle
inline constexpr int kCluster = 2;
inline constexpr int kConsumers = 2;
inline constexpr int kConsumerWarps = kWarpgroupSize / kWarpSize;  // that read a stage
inline constexpr int kThreads = (kConsumers + 1) * kWarpgroupSize;
inline constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;  // a block starts with 168

template <typename T_, Major kMajor_, int kCols_>
struct Config {
  using T = T_;
  static constexpr Major kMajor = kMajor_;  // of w: kMN is (k, n), kK is (n, k)
  static constexpr int kRows = 128, kCols = kCols_, kDepth = kBoxFeatures;
  static constexpr int kXBytes = kRows * kBlockRowBytes;
  static constexpr int kWBytes = kCols * kBlockRowBytes;
  static constexpr int kStageBytes = kXBytes + kWBytes;
  static constexpr int kBarrierBytes = 16;                  // of a stage
  static constexpr int kOutBytes = kRows * kBlockRowBytes;  // 64 columns, of a consumer
  static constexpr int kOutsBytes = kConsumers * kOutBytes;
  static constexpr int kStages =
      (kMaxSharedBytes - kTileAlignment - kOutsBytes) / (kStageBytes + kBarrierBytes);
  static constexpr int kSharedBytes =
      kTileAlignment + kOutsBytes + kStages * (kStageBytes + kBarrierBytes);
  /// Rows of a box of w: half of a tile of (n, k), or half of each 64-column block of (k, n).
  static constexpr int kWBoxRows = (kMajor == Major::kK ? kCols : kDepth) / kCluster;
};

struct Params {
  CUtensorMap x, w, y, pre;
  LinearForwardArgs args;
  int row_pairs, col_tiles, steps;  // of tiles; of kDepth
};

/// The tiles of a pair of blocks, in sections of kSection pairs of rows, column by column: what the
/// pairs that run at one time read stays in L2.
struct Tile {
  static constexpr int kSection = 8;
  int row_pair, col_tile;

  __device__ __forceinline__ Tile(const Params& p, int index) {
    const int section = index / (kSection * p.col_tiles);
    const int first = section * kSection, pairs = min(kSection, p.row_pairs - first);
    const int within = index - section * kSection * p.col_tiles;
    col_tile = within / pairs;
    row_pair = first + within - col_tile * pairs;
  }
};

/// A ring of stages. `full`: a producer's thread has announced a stage and all its copies, the
/// other block's too, have come. `empty`: the consumers of both blocks are done with it.
template <typename Config>
struct Stages {
  uint32_t base;

  __device__ __forceinline__ uint32_t x(uint32_t stage) const {
    return base + stage * Config::kStageBytes;
  }
  __device__ __forceinline__ uint32_t w(uint32_t stage) const { return x(stage) + Config::kXBytes; }
  __device__ __forceinline__ uint32_t out(int consumer) const {
    return x(Config::kStages) + consumer * Config::kOutBytes;
  }
  __device__ __forceinline__ uint32_t full(uint32_t stage) const {
    return out(kConsumers) + stage * Config::kBarrierBytes;
  }
  __device__ __forceinline__ uint32_t empty(uint32_t stage) const { return full(stage) + 8; }
};

template <typename Config>
__device__ __forceinline__ void Produce(const Params& p, const Stages<Config>& stages, int clusters,
                                        uint32_t rank) {
  constexpr uint16_t kBoth = (1 << kCluster) - 1;
  constexpr int kHalfBytes = Config::kWBoxRows * kBlockRowBytes;
  TmaPrefetch(p.x);
  TmaPrefetch(p.w);
  Ring<Config::kStages> ring;
  for (int item = blockIdx.x / kCluster; item < p.row_pairs * p.col_tiles; item += clusters) {
    const Tile tile(p, item);
    const int row = (tile.row_pair * kCluster + static_cast<int>(rank)) * Config::kRows;
    const int col = tile.col_tile * Config::kCols;
    const int half = static_cast<int>(rank) * Config::kWBoxRows;
    for (int step = 0; step < p.steps; ++step, ring.Advance()) {
      const uint32_t stage = ring.stage, full = stages.full(stage);
      const int depth = step * Config::kDepth;
      BarrierWait(stages.empty(stage), ring.parity ^ 1);
      BarrierExpect(full, Config::kStageBytes);
      TmaLoad(stages.x(stage), p.x, full, depth, row, 0, 0);
      const uint32_t target = stages.w(stage) + rank * kHalfBytes;
      if constexpr (Config::kMajor == Major::kK) {
        TmaLoadTo(kBoth, target, p.w, full, depth, col + half, 0, 0);
      } else {
#pragma unroll
        for (int block = 0; block < Config::kCols / kBoxFeatures; ++block)
          TmaLoadTo(kBoth, target + block * kCluster * kHalfBytes, p.w, full,
                    col + block * kBoxFeatures, depth + half, 0, 0);
      }
    }
  }
}

/// acc += 64 rows of x (row block i) times w, over the stage's depth, for each i.
template <typename Config>
__device__ __forceinline__ void Multiply(float (&acc)[2][Config::kCols / 2], uint32_t x, uint32_t w,
                                         bool accumulate) {
  const uint64_t a = MatrixDescriptor(x);
  const uint64_t b = MatrixDescriptor(w, Config::kDepth * kBlockRowBytes);
#pragma unroll
  for (int k = 0; k < Config::kDepth / 16; ++k)
#pragma unroll
    for (int i = 0; i < 2; ++i)
      Wgmma<typename Config::T, Major::kK, Config::kMajor>(
          acc[i], Moved(a, i * 64 * kBlockRowBytes + k * 32),
          Moved(b, Config::kMajor == Major::kK ? k * 32 : k * 16 * kBlockRowBytes),
          accumulate || k > 0);
}

template <typename T>
__device__ __forceinline__ float2 LoadPair(const void* base, bool is_float, int index) {
  if (is_float)
    return __ldg(reinterpret_cast<const float2*>(static_cast<const float*>(base) + index));
  return UnpackPair<T>(
      __ldg(reinterpret_cast<const uint32_t*>(static_cast<const T*>(base) + index)));
}

/// A tile and a lane's part of it. In the accumulators the lane has columns 8 j + 2 (lane % 4) of
/// its rows; of the residual it reads 8 neighbours in a row, a chunk of 16 bytes of each group of
/// 32, which the four lanes that have a row exchange. Unit u is row 64 (u / 2) + 8 (u % 2).
struct Place {
  static constexpr int kUnits = 4;
  int tile_row, row, col, rows_left, cols_left, n;

  __device__ __forceinline__ Place(const LinearForwardArgs& args, int first_row, int tile_col) {
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize % kConsumerWarps;
    tile_row = first_row;
    row = tile_row + 16 * warp + lane / 4;
    col = tile_col;
    n = static_cast<int>(args.n);
    rows_left = static_cast<int>(args.rows) - row;
    cols_left = n - col;
  }
  __device__ __forceinline__ int64_t origin() const {
    return int64_t{row} * n + col + 8 * (threadIdx.x % 4);
  }
  /// From `origin` on, in 32 bits: at most 72 n + 96 (n < 2^24, cuda/linear.cu).
  __device__ __forceinline__ int offset(int unit, int group) const {
    return (unit / 2 * 64 + unit % 2 * 8) * n + 32 * group;
  }
  __device__ __forceinline__ bool has(int unit, int group) const {
    return unit / 2 * 64 + unit % 2 * 8 < rows_left &&
           32 * group + 8 * static_cast<int>(threadIdx.x % 4) < cols_left;
  }
};

/// Brings the lines of the residual that a warpgroup will read into L2.
template <typename Config>
__device__ __forceinline__ void PrefetchResidual(const LinearForwardArgs& args, int row, int col) {
  using T = typename Config::T;
  constexpr int kLine = 128 / sizeof(T);
  static_assert(Config::kRows == kWarpgroupSize);
  const int64_t r = row + static_cast<int>(threadIdx.x) % kWarpgroupSize;
  if (r >= args.rows) return;
  const T* line = static_cast<const T*>(args.residual) + r * args.n + col;
#pragma unroll
  for (int i = 0; i < Config::kCols / kLine; ++i)
    if (col + i * kLine < args.n)
      asm volatile("prefetch.global.L2 [%0];\n" ::"l"(line + i * kLine));
}

/// Four 8 x 8 matrices of 16-bit elements to shared memory: lane l gives the address of row l % 8
/// of matrix l / 8 and has two neighbours of row l / 4 of each, as a fragment has.
__device__ __forceinline__ void StoreMatrices(uint32_t shared, const uint32_t (&words)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};\n" ::"r"(shared),
               "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
               : "memory");
}

/// The consumer's tile of 64 columns in shared memory, through which results leave: the copy engine
/// writes whole lines, at times when nobody waits for it.
struct Out {
  uint32_t tile;
  int barrier;  // of the consumer's threads

  __device__ __forceinline__ bool copies() const { return threadIdx.x % kWarpgroupSize == 0; }

  /// Before the first Put: the copy engine has read what was there.
  __device__ __forceinline__ void Acquire() const {
    if (copies()) TmaStoreWait<0>();
    NamedBarrierWait(barrier, kWarpgroupSize);
  }
  /// Columns 32 half .. + 31 of the 64, of this lane's rows.
  template <typename T>
  __device__ __forceinline__ void Put(const float (&values)[Place::kUnits][8], int half) const {
    const int lane = threadIdx.x % kWarpSize;
    const int row = threadIdx.x / kWarpSize % kConsumerWarps * 16 + lane % 16;
    const uint32_t start = tile + row * kBlockRowBytes;
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int j = 0; j < 2; ++j) {  // of 16 columns
        uint32_t words[4];
#pragma unroll
        for (int m = 0; m < 4; ++m) {
          const float* pair = &values[2 * i + m % 2][4 * j + m / 2 * 2];
          words[m] = PackPair<T>(pair[0], pair[1]);
        }
        const int chunk = 4 * half + 2 * j + lane / 16;
        StoreMatrices(start + i * 64 * kBlockRowBytes + (chunk ^ row % 8) * 16, words);
      }
  }
  __device__ __forceinline__ void Copy(const CUtensorMap& map, int row, int col) const {
    TmaStoreFence();
    NamedBarrierWait(barrier, kWarpgroupSize);
    if (copies()) TmaStore(map, tile, col, row, 0, 0);
  }
};

/// Applies the epilogue to a tile and stores it, 64 columns after another.
template <typename Config, Body kBody, bool kHasResidual, bool kHasPre>
__device__ __forceinline__ void Finish(const Params& p, const float (&acc)[2][Config::kCols / 2],
                                       const float2 (&bias)[Config::kCols / 8], const Place& place,
                                       const Out& out) {
  using T = typename Config::T;
  const T* gResidual = static_cast<const T*>(p.args.residual) + (kHasResidual ? place.origin() : 0);
#pragma unroll
  for (int block = 0; block < Config::kCols / 64; ++block) {
    const int col = place.col + 64 * block;
    const auto biased = [&](int half, float (&values)[Place::kUnits][8]) {
#pragma unroll
      for (int u = 0; u < Place::kUnits; ++u)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int group = 2 * block + half, at = 16 * group + 4 * j + u % 2 * 2;
          values[u][2 * j] = acc[u / 2][at] + bias[4 * group + j].x;
          values[u][2 * j + 1] = acc[u / 2][at + 1] + bias[4 * group + j].y;
        }
    };
    if constexpr (kHasPre) {
      out.Acquire();
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float values[Place::kUnits][8];
        biased(half, values);
        out.Put<T>(values, half);
      }
      out.Copy(p.pre, place.tile_row, col);
    }
    out.Acquire();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int group = 2 * block + half;
      uint4 residual[Place::kUnits];
      if constexpr (kHasResidual) {
#pragma unroll
        for (int u = 0; u < Place::kUnits; ++u) {
          residual[u] = uint4{0, 0, 0, 0};
          if (place.has(u, group))
            residual[u] = __ldg(reinterpret_cast<const uint4*>(gResidual + place.offset(u, group)));
        }
      }
      float values[Place::kUnits][8];
      biased(half, values);
#pragma unroll
      for (int u = 0; u < Place::kUnits; ++u)
#pragma unroll
        for (float& value : values[u]) value = Apply<T, kBody>(p.args.epilogue, value);
      if constexpr (kHasResidual) {
#pragma unroll
        for (int u = 0; u < Place::kUnits; ++u) {
          uint32_t words[4] = {residual[u].x, residual[u].y, residual[u].z, residual[u].w};
          QuadTranspose(words);
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const float2 pair = UnpackPair<T>(words[j]);
            values[u][2 * j] += pair.x;
            values[u][2 * j + 1] += pair.y;
          }
        }
      }
      out.Put<T>(values, half);
    }
    out.Copy(p.y, place.tile_row, col);
  }
}

template <typename Config, Body kBody>
__device__ __forceinline__ void Finish(const Params& p, const float (&acc)[2][Config::kCols / 2],
                                       const float2 (&bias)[Config::kCols / 8], const Place& place,
                                       const Out& out) {
  if (p.args.residual == nullptr && p.args.pre == nullptr)
    Finish<Config, kBody, false, false>(p, acc, bias, place, out);
  else if (p.args.residual == nullptr)
    Finish<Config, kBody, false, true>(p, acc, bias, place, out);
  else if (p.args.pre == nullptr)
    Finish<Config, kBody, true, false>(p, acc, bias, place, out);
  else
    Finish<Config, kBody, true, true>(p, acc, bias, place, out);
}

template <typename Config>
__device__ __forceinline__ void Consume(const Params& p, const Stages<Config>& stages, int clusters,
                                        uint32_t rank) {
  const int consumer =
      __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / kWarpgroupSize, 0) - 1;
  const int lane = threadIdx.x % kWarpSize;
  // Barrier 1 + i: consumer i may issue products, for the other one has issued its last.
  constexpr int kTurnThreads = kConsumers * kWarpgroupSize;
  if (consumer == 1) NamedBarrierArrive(1, kTurnThreads);
  Ring<Config::kStages> ring;
  const auto skip = [&] {  // the stages of a tile of the other consumer
    ring.stage += static_cast<uint32_t>(p.steps);
    ring.parity ^= ring.stage / Config::kStages & 1;
    ring.stage %= Config::kStages;
  };
  const auto release = [&](uint32_t stage) {
    if (lane < kCluster) BarrierArriveAt(stages.empty(stage), static_cast<uint32_t>(lane));
  };
  if (consumer == 1) skip();
  float acc[2][Config::kCols / 2];
  const int items = p.row_pairs * p.col_tiles;
  const Out out{stages.out(consumer), 3 + consumer};
  const bool float_bias = p.args.bias_dtype == DType::kF32;
  for (int item = static_cast<int>(blockIdx.x) / kCluster + consumer * clusters; item < items;
       item += kConsumers * clusters) {
    const Tile tile(p, item);
    const int row = (tile.row_pair * kCluster + static_cast<int>(rank)) * Config::kRows;
    const Place place(p.args, row, tile.col_tile * Config::kCols);
    // While the other consumer multiplies: what the epilogue would wait for.
    if (p.args.residual != nullptr) PrefetchResidual<Config>(p.args, row, place.col);
    float2 bias[Config::kCols / 8];
#pragma unroll
    for (int j = 0; j < Config::kCols / 8; ++j) {
      const int column = 8 * j + 2 * (lane % 4);
      bias[j] = column < place.cols_left
                    ? LoadPair<typename Config::T>(p.args.bias, float_bias, place.col + column)
                    : float2{0, 0};
    }
    NamedBarrierWait(1 + consumer, kTurnThreads);
    uint32_t last = 0;
    for (int step = 0; step < p.steps; ++step, ring.Advance()) {
      BarrierWait(stages.full(ring.stage), ring.parity);
      WgmmaFence();
      Multiply<Config>(acc, stages.x(ring.stage), stages.w(ring.stage), step > 0);
      WgmmaCommit();
      if (step > 0) {
        WgmmaWait<1>();
        release(last);
      }
      last = ring.stage;
    }
    NamedBarrierArrive(2 - consumer, kTurnThreads);
    WgmmaWait<0>();
    FenceRegisters(acc[0]);
    FenceRegisters(acc[1]);
    release(last);
    skip();
    switch (p.args.epilogue) {
      case Epilogue::kTanh:
        Finish<Config, Body::kTanh>(p, acc, bias, place, out);
        break;
      case Epilogue::kSilu:
        Finish<Config, Body::kSilu>(p, acc, bias, place, out);
        break;
      case Epilogue::kGeluTanh:
        Finish<Config, Body::kGeluTanh>(p, acc, bias, place, out);
        break;
      case Epilogue::kGeluErf:
        Finish<Config, Body::kGeluErf>(p, acc, bias, place, out);
        break;
      default:
        Finish<Config, Body::kLinear>(p, acc, bias, place, out);
    }
  }
  if (out.copies()) TmaStoreWait<0>();  // the tile goes with the block
}

template <typename Config>
__global__ void __cluster_dims__(kCluster) __launch_bounds__(kThreads, 1)
    hopper_linear_kernel(const __grid_constant__ Params p) {
  extern __shared__ unsigned char shared_bytes[];
  // The same offset in both blocks: copies and arrivals of the other one go by it.
  const uint32_t address = SharedAddress(shared_bytes);
  const Stages<Config> stages{(address + kTileAlignment - 1) / kTileAlignment * kTileAlignment};
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < Config::kStages; ++stage) {
      BarrierInit(stages.full(stage), 1);
      BarrierInit(stages.empty(stage), kCluster * kConsumerWarps);
    }
    BarrierInitFence();
  }
  ClusterBarrier();
  const int clusters = static_cast<int>(gridDim.x) / kCluster;
  if (threadIdx.x < kWarpgroupSize) {
    LowerRegisters<kProducerRegisters>();
    if (threadIdx.x == 0) Produce<Config>(p, stages, clusters, ClusterRank());
  } else {
    RaiseRegisters<kConsumerRegisters>();
    Consume<Config>(p, stages, clusters, ClusterRank());
  }
  __syncwarp();
  ClusterBarrier();  // nobody leaves while the other block may still arrive here
}

template <typename Config>
Status LaunchHopper(const LinearForwardArgs& a, const Launch& launch) {
  const bool transposed = Config::kMajor == Major::kK;
  const int64_t row_tiles = (a.rows + Config::kRows - 1) / Config::kRows;
  Params p{.x = {},
           .w = {},
           .y = {},
           .pre = {},
           .args = a,
           .row_pairs = static_cast<int>((row_tiles + kCluster - 1) / kCluster),
           .col_tiles = static_cast<int>((a.n + Config::kCols - 1) / Config::kCols),
           .steps = static_cast<int>((a.k + Config::kDepth - 1) / Config::kDepth)};
  const auto matrix = [&](const void* base, int64_t rows, int64_t cols) {
    return HeadTensor{a.dtype, base, 1, 1, rows, cols, rows * cols, rows * cols, cols};
  };
  Status status = MakeTensorMap(matrix(a.x, a.rows, a.k), Config::kRows, p.x);
  if (status.ok())
    status = MakeTensorMap(transposed ? matrix(a.w, a.n, a.k) : matrix(a.w, a.k, a.n),
                           Config::kWBoxRows, p.w);
  if (status.ok()) status = MakeTensorMap(matrix(a.y, a.rows, a.n), Config::kRows, p.y);
  if (status.ok() && a.pre != nullptr)
    status = MakeTensorMap(matrix(a.pre, a.rows, a.n), Config::kRows, p.pre);
  if (!status.ok()) return status;
  const auto kernel = hopper_linear_kernel<Config>;
  int device = 0, processors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 Config::kSharedBytes);
  if (error != cudaSuccess) return {cudaGetErrorString(error)};
  const int items = p.row_pairs * p.col_tiles, clusters = processors / kCluster;
  const int blocks = kCluster * (items < clusters ? items : clusters);
  kernel<<<static_cast<unsigned>(blocks), kThreads, Config::kSharedBytes, launch.stream>>>(p);
  return LastLaunch();
}

}  // namespace zenith::linear
