// Linear layer for Hopper, 16-bit types: y = epilogue(x w + bias) + residual, and the gated one,
// y = epilogue(x w) * (x w_value).
//
// A persistent block of a producer and two consumer warpgroups, in pairs (clusters of 2) that work
// on neighbouring rows and the same columns: each fetches its x and half of the w that both need. A
// consumer owns a whole tile, kRows x kCols of float32 in its registers; while it multiplies, the
// other one applies the epilogue to its last tile and stores it, so that the tensor cores wait for
// no epilogue ("ping-pong"). x and w cross memory once, for the most part, and L2 once a tile. The
// residual comes and results leave through shared memory and the copy engine. A gated layer's tile
// has half of its columns from w and the same ones from w_value: a thread holds both factors of its
// results. What was tried and measured: docs/kernels/linear_hopper.md.
#pragma once

#include "cuda/core/cluster.cuh"
#include "cuda/core/launch.h"
#include "cuda/core/mma.cuh"
#include "cuda/core/reduce.cuh"
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

template <typename T_, Major kMajor_, bool kGated_, Body kBody_>
struct Config {
  using T = T_;
  static constexpr Major kMajor = kMajor_;  // of w: kMN is (k, n), kK is (n, k)
  static constexpr bool kGated = kGated_;
  static constexpr Body kBody = kBody_;
  static constexpr int kRows = 128, kCols = 128, kDepth = kBoxFeatures;
  static constexpr int kOutCols = kGated ? kCols / 2 : kCols;  // of y
  static constexpr int kXBytes = kRows * kBlockRowBytes;
  static constexpr int kWBytes = kCols * kBlockRowBytes;
  static constexpr int kStageBytes = kXBytes + kWBytes;
  static constexpr int kBarrierBytes = 16;                // of a stage
  static constexpr int kOutBytes = kRows * kOutCols * 2;  // a tile of results, of a consumer
  static constexpr int kConsumerBytes = kOutBytes + kCols * 4 + kConsumerWarps * 8;
  static constexpr int kStages = (kMaxSharedBytes - kTileAlignment - kConsumers * kConsumerBytes) /
                                 (kStageBytes + kBarrierBytes);
  static constexpr int kSharedBytes =
      kTileAlignment + kConsumers * kConsumerBytes + kStages * (kStageBytes + kBarrierBytes);
  /// Of a box of w, half of a tile: 64 of its columns, which are rows of (n, k), and a block of 64
  /// elements of (k, n). In a gated layer the second half is of w_value.
  static constexpr int kWBoxRows = kMajor == Major::kK ? kCols / kCluster : kDepth;
  static_assert(kCols / kCluster == kBoxFeatures);
};

struct Params {
  CUtensorMap x, w, w_value, residual, y, pre, pre_value;
  LinearForwardArgs args;
  int row_pairs, col_tiles, steps;  // of tiles; of kDepth
  int section;                      // pairs of rows that follow each other in the same column
};

/// The tiles of a pair of blocks, in sections of pairs of rows, column by column: what the pairs
/// that run at one time read stays in L2.
struct Tile {
  int row_pair, col_tile;

  __device__ __forceinline__ Tile(const Params& p, int index) {
    const int section = index / (p.section * p.col_tiles);
    const int first = section * p.section, pairs = min(p.section, p.row_pairs - first);
    const int within = index - section * p.section * p.col_tiles;
    col_tile = within / pairs;
    row_pair = first + within - col_tile * pairs;
  }
};

/// Shared memory: a ring of stages, the consumers' tiles of results and biases, barriers. `full`: a
/// producer's thread has announced a stage and all its copies, the other block's too, have come.
/// `empty`: the consumers of both blocks are done with it. `residual`: a warp's part has come.
template <typename Config>
struct Layout {
  uint32_t base;

  __device__ __forceinline__ uint32_t x(uint32_t stage) const {
    return base + stage * Config::kStageBytes;
  }
  __device__ __forceinline__ uint32_t w(uint32_t stage) const { return x(stage) + Config::kXBytes; }
  __device__ __forceinline__ uint32_t out(int consumer) const {
    return x(Config::kStages) + consumer * Config::kOutBytes;
  }
  __device__ __forceinline__ uint32_t bias(int consumer) const {
    return out(kConsumers) + consumer * Config::kCols * 4;
  }
  __device__ __forceinline__ uint32_t residual(int consumer, int warp) const {
    return bias(kConsumers) + (consumer * kConsumerWarps + warp) * 8;
  }
  __device__ __forceinline__ uint32_t full(uint32_t stage) const {
    return residual(kConsumers, 0) + stage * Config::kBarrierBytes;
  }
  __device__ __forceinline__ uint32_t empty(uint32_t stage) const { return full(stage) + 8; }
};

/// Fetches this block's x, or its half of w, which goes to both blocks. (x by a multicast to one
/// block takes 1.15 times as long: requests of several clusters for the same x are then not joined
/// on the way to L2.)
template <typename Config, bool kFetchesX>
__device__ __forceinline__ void Produce(const Params& p, const Layout<Config>& shared, int clusters,
                                        uint32_t rank) {
  constexpr uint16_t kBoth = (1 << kCluster) - 1;
  const CUtensorMap& w = Config::kGated && rank > 0 ? p.w_value : p.w;
  TmaPrefetch(kFetchesX ? p.x : w);
  Ring<Config::kStages> ring;
  for (int item = blockIdx.x / kCluster; item < p.row_pairs * p.col_tiles; item += clusters) {
    const Tile tile(p, item);
    const int row = (tile.row_pair * kCluster + static_cast<int>(rank)) * Config::kRows;
    const int col = tile.col_tile * Config::kOutCols +
                    (Config::kGated ? 0 : static_cast<int>(rank) * kBoxFeatures);
    for (int step = 0; step < p.steps; ++step, ring.Advance()) {
      const uint32_t stage = ring.stage, full = shared.full(stage);
      const int depth = step * Config::kDepth;
      BarrierWait(shared.empty(stage), ring.parity ^ 1);
      if constexpr (kFetchesX) {
        BarrierExpect(full, Config::kStageBytes);
        TmaLoad(shared.x(stage), p.x, full, depth, row, 0, 0);
      } else {
        const bool transposed = Config::kMajor == Major::kK;
        TmaLoadTo(kBoth, shared.w(stage) + rank * (Config::kWBytes / kCluster), w, full,
                  transposed ? depth : col, transposed ? col : depth, 0, 0);
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

/// Four 8 x 8 matrices of 16-bit elements to shared memory, as LoadMatrix4 reads them.
__device__ __forceinline__ void StoreMatrix4(uint32_t shared, const uint32_t (&words)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};\n" ::"r"(shared),
               "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
               : "memory");
}
__device__ __forceinline__ void StoreShared(uint32_t shared, float value) {
  asm volatile("st.shared.f32 [%0], %1;\n" ::"r"(shared), "f"(value) : "memory");
}
__device__ __forceinline__ float2 LoadSharedPair(uint32_t shared) {
  float2 pair;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];\n" : "=f"(pair.x), "=f"(pair.y) : "r"(shared));
  return pair;
}

/// A warp's part of a consumer's tile in shared memory: kPieces of 16 rows and 64 columns, piece p
/// at row 64 (p % 2) + 16 warp and column 64 (p / 2), each with its own copies. No warp waits for
/// another one, and none for the copy engine unless the piece has been used less than a tile ago.
template <typename Config>
struct Pieces {
  static constexpr int kCount = Config::kOutCols / 32, kRows = 16, kBytes = kRows * kBlockRowBytes;
  uint32_t base, barrier;
  int row, col;  // of the tile, and of the warp in it

  __device__ __forceinline__ static bool copies() { return threadIdx.x % kWarpSize == 0; }
  __device__ __forceinline__ uint32_t piece(int p) const { return base + p * kBytes; }
  __device__ __forceinline__ int row_of(int p) const { return row + p % 2 * 64; }
  __device__ __forceinline__ int col_of(int p) const { return col + p / 2 * 64; }
  /// What lane l gives LoadMatrix4 and StoreMatrix4 for columns 16 j .. + 15 of a piece: words[m]
  /// of a lane are then columns 16 j + 8 (m / 2) + 2 (l % 4) and + 1 of row 8 (m % 2) + l / 4.
  __device__ __forceinline__ uint32_t matrices(int p, int j) const {
    const int lane = threadIdx.x % kWarpSize, r = lane % 16;
    return piece(p) + r * kBlockRowBytes + ((2 * j + lane / 16) ^ r % 8) * 16;
  }

  __device__ __forceinline__ void LoadAll(const CUtensorMap& map) const {
    if (!copies()) return;
    TmaStoreWait<0>();
    BarrierExpect(barrier, kCount * kBytes);
#pragma unroll
    for (int p = 0; p < kCount; ++p) TmaLoad(piece(p), map, barrier, col_of(p), row_of(p), 0, 0);
  }
  /// Before any piece is filled again: the copy engine has read what is there.
  __device__ __forceinline__ static void Acquire() {
    if (copies()) TmaStoreWait<kCount - 1>();
    __syncwarp();
  }
  __device__ __forceinline__ void Store(int p, const CUtensorMap& map) const {
    TmaStoreFence();
    __syncwarp();
    if (copies()) TmaStore(map, piece(p), col_of(p), row_of(p), 0, 0);
  }
};

/// Stores f(i, at, bias) of a warp's part of a tile, where acc[i][at] are the sums of y's element
/// and bias is its column's; plus, where there is a residual, what the pieces hold.
template <typename Config, bool kHasResidual, typename F>
__device__ __forceinline__ void StoreTile(const CUtensorMap& map, uint32_t bias,
                                          const Pieces<Config>& pieces, F&& f) {
  using T = typename Config::T;
  float2 biases[8] = {};  // of 64 columns
#pragma unroll
  for (int p = 0; p < Pieces<Config>::kCount; ++p) {
    if (!Config::kGated && p % 2 == 0) {
#pragma unroll
      for (int j = 0; j < 8; ++j)
        biases[j] = LoadSharedPair(bias + (32 * p + 8 * j + threadIdx.x % 4 * 2) * 4);
    }
    uint32_t words[4][4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {  // of 16 columns
      uint32_t residual[4];
      if constexpr (kHasResidual) LoadMatrix4(residual, pieces.matrices(p, j));
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        const int group = 2 * j + m / 2;  // of 8 columns
        const int at = p / 2 * 32 + 4 * group + m % 2 * 2;
        float2 y = {f(p % 2, at, biases[group].x), f(p % 2, at + 1, biases[group].y)};
        if constexpr (kHasResidual) {
          const float2 added = UnpackPair<T>(residual[m]);
          y.x += added.x;
          y.y += added.y;
        }
        words[j][m] = PackPair<T>(y.x, y.y);
      }
    }
    if constexpr (!kHasResidual) Pieces<Config>::Acquire();
#pragma unroll
    for (int j = 0; j < 4; ++j) StoreMatrix4(pieces.matrices(p, j), words[j]);
    pieces.Store(p, map);
  }
}

/// Applies the epilogue to a tile and stores it. turn: how many tiles there were before.
template <typename Config>
__device__ __forceinline__ void Finish(const Params& p, const float (&acc)[2][Config::kCols / 2],
                                       uint32_t bias, const Pieces<Config>& pieces, int turn) {
  constexpr Body kBody = Config::kBody;
  const auto activation = [&](float x) {
    return Apply<typename Config::T, kBody>(p.args.epilogue, x);
  };
  if constexpr (Config::kGated) {
    constexpr int kValue = Config::kCols / 4;  // from a sum of the gate to that of the value
    StoreTile<Config, false>(p.y, bias, pieces, [&](int i, int at, float) {
      return activation(kInputScale<kBody> * acc[i][at]) * acc[i][kValue + at];
    });
    if (p.args.pre == nullptr) return;
    StoreTile<Config, false>(p.pre, bias, pieces, [&](int i, int at, float) { return acc[i][at]; });
    StoreTile<Config, false>(p.pre_value, bias, pieces,
                             [&](int i, int at, float) { return acc[i][kValue + at]; });
  } else {
    const auto y = [&](int i, int at, float b) {
      return activation(fmaf(acc[i][at], kInputScale<kBody>, b));
    };
    if (p.args.residual == nullptr) {
      StoreTile<Config, false>(p.y, bias, pieces, y);
    } else {
      BarrierWait(pieces.barrier, turn % 2);
      StoreTile<Config, true>(p.y, bias, pieces, y);
    }
    if (p.args.pre != nullptr)
      StoreTile<Config, false>(p.pre, bias, pieces, [&](int i, int at, float b) {
        return fmaf(b, 1 / kInputScale<kBody>, acc[i][at]);
      });
  }
}

template <typename Config>
__device__ __forceinline__ void Consume(const Params& p, const Layout<Config>& shared, int clusters,
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
    if (lane < kCluster) BarrierArriveAt(shared.empty(stage), static_cast<uint32_t>(lane));
  };
  if (consumer == 1) skip();
  float acc[2][Config::kCols / 2];
  const int items = p.row_pairs * p.col_tiles;
  const int thread = threadIdx.x % kWarpgroupSize, warp = thread / kWarpSize;
  const bool float_bias = p.args.bias_dtype == DType::kF32;
  // Of the next tile, column `thread`, as it lies in memory: on its way while the last one is
  // stored and this one multiplied. Read where it is needed, 16 pairs a lane, each behind a branch,
  // the biases took as long as the product; converted where it is read, all warps waited for it.
  uint32_t next_bias = 0;
  const auto load_bias = [&](const Tile& tile) {
    if constexpr (Config::kGated) return;
    static_assert(Config::kCols == kWarpgroupSize);
    const int column = tile.col_tile * Config::kCols + thread;
    if (column >= p.args.n) return;
    next_bias = float_bias ? __ldg(static_cast<const uint32_t*>(p.args.bias) + column)
                           : __ldg(static_cast<const uint16_t*>(p.args.bias) + column);
  };
  const uint32_t bias = shared.bias(consumer);
  Pieces<Config> pieces{
      shared.out(consumer) + warp * Pieces<Config>::kCount * Pieces<Config>::kBytes,
      shared.residual(consumer, warp), 0, 0};
  const int first = static_cast<int>(blockIdx.x) / kCluster + consumer * clusters;
  Tile next(p, min(first, items - 1));
  load_bias(next);
  int turn = 0;
  for (int item = first; item < items; item += kConsumers * clusters, ++turn) {
    pieces.row = (next.row_pair * kCluster + static_cast<int>(rank)) * Config::kRows + 16 * warp;
    pieces.col = next.col_tile * Config::kOutCols;
    if (!Config::kGated && p.args.residual != nullptr) pieces.LoadAll(p.residual);
    NamedBarrierWait(1 + consumer, kTurnThreads);  // all warps have read the last biases, too
    uint32_t last = 0;
    for (int step = 0; step < p.steps; ++step, ring.Advance()) {
      BarrierWait(shared.full(ring.stage), ring.parity);
      WgmmaFence();
      Multiply<Config>(acc, shared.x(ring.stage), shared.w(ring.stage), step > 0);
      WgmmaCommit();
      if (step > 0) {
        WgmmaWait<1>();
        release(last);
      }
      last = ring.stage;
    }
    NamedBarrierArrive(2 - consumer, kTurnThreads);
    // What the next tile needs, while the last products are under way.
    if constexpr (!Config::kGated) {
      const float value =
          float_bias ? __uint_as_float(next_bias) : UnpackPair<typename Config::T>(next_bias).x;
      StoreShared(bias + thread * 4, kInputScale<Config::kBody> * value);
      NamedBarrierWait(3 + consumer, kWarpgroupSize);
    }
    if (item + kConsumers * clusters < items) {
      next = Tile(p, item + kConsumers * clusters);
      load_bias(next);
    }
    WgmmaWait<0>();
    FenceRegisters(acc[0]);
    FenceRegisters(acc[1]);
    release(last);
    skip();
    Finish<Config>(p, acc, bias, pieces, turn);
  }
  if (Pieces<Config>::copies()) TmaStoreWait<0>();  // the pieces go with the block
}

template <typename Config>
__global__ void __cluster_dims__(kCluster) __launch_bounds__(kThreads, 1)
    hopper_linear_kernel(const __grid_constant__ Params p) {
  extern __shared__ unsigned char shared_bytes[];
  // The same offset in both blocks: copies and arrivals of the other one go by it.
  const uint32_t address = SharedAddress(shared_bytes);
  const Layout<Config> shared{(address + kTileAlignment - 1) / kTileAlignment * kTileAlignment};
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < Config::kStages; ++stage) {
      BarrierInit(shared.full(stage), 1);
      BarrierInit(shared.empty(stage), kCluster * kConsumerWarps);
    }
    for (int warp = 0; warp < kConsumers * kConsumerWarps; ++warp)
      BarrierInit(shared.residual(0, warp), 1);
    BarrierInitFence();
  }
  ClusterArrive();
  ClusterWait();
  const int clusters = static_cast<int>(gridDim.x) / kCluster;
  if (threadIdx.x < kWarpgroupSize) {
    LowerRegisters<kProducerRegisters>();
    // Two warps: the thread that did both needed 420 cycles for a step, of 512 for its product.
    if (threadIdx.x == 0) Produce<Config, true>(p, shared, clusters, ClusterRank());
    if (threadIdx.x == kWarpSize) Produce<Config, false>(p, shared, clusters, ClusterRank());
  } else {
    RaiseRegisters<kConsumerRegisters>();
    Consume<Config>(p, shared, clusters, ClusterRank());
  }
  __syncwarp();
  ClusterBarrier();  // nobody leaves while the other block may still arrive here
}

/// w_value, pre_value: of a gated layer, in which bias and residual are null.
template <typename Config>
Status LaunchHopper(const LinearForwardArgs& a, const void* w_value, void* pre_value,
                    const Launch& launch) {
  const bool transposed = Config::kMajor == Major::kK;
  const int64_t row_tiles = (a.rows + Config::kRows - 1) / Config::kRows;
  Params p{.x = {},
           .w = {},
           .w_value = {},
           .residual = {},
           .y = {},
           .pre = {},
           .pre_value = {},
           .args = a,
           .row_pairs = static_cast<int>((row_tiles + kCluster - 1) / kCluster),
           .col_tiles = static_cast<int>((a.n + Config::kOutCols - 1) / Config::kOutCols),
           .steps = static_cast<int>((a.k + Config::kDepth - 1) / Config::kDepth),
           // 2 is faster than 8 by 3 to 5 % at k = 768 and 0 to 4 % at 1024, slower by 6 % at 3072.
           .section = a.k <= 1024 ? 2 : 8};
  const auto matrix = [&](const void* base, int64_t rows, int64_t cols) {
    return HeadTensor{a.dtype, base, 1, 1, rows, cols, rows * cols, rows * cols, cols};
  };
  Status status = MakeTensorMap(matrix(a.x, a.rows, a.k), Config::kRows, p.x);
  const auto weights = [&](const void* base, CUtensorMap& map) {
    if (status.ok() && base != nullptr)
      status = MakeTensorMap(transposed ? matrix(base, a.n, a.k) : matrix(base, a.k, a.n),
                             Config::kWBoxRows, map);
  };
  weights(a.w, p.w);
  weights(w_value, p.w_value);
  const auto pieces = [&](const void* base, CUtensorMap& map) {
    if (status.ok() && base != nullptr)
      status = MakeTensorMap(matrix(base, a.rows, a.n), Pieces<Config>::kRows, map);
  };
  pieces(a.residual, p.residual);
  pieces(a.y, p.y);
  pieces(a.pre, p.pre);
  pieces(pre_value, p.pre_value);
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

/// A kernel for each activation: where they were all in one, gelu (erf) took 4 % longer, as it
/// seems by waits for instructions.
template <typename T, Major kMajor, bool kGated>
Status LaunchHopper(const LinearForwardArgs& a, const void* w_value, void* pre_value,
                    const Launch& launch) {
  const auto with = [&]<Body kBody>() {
    return LaunchHopper<Config<T, kMajor, kGated, kBody>>(a, w_value, pre_value, launch);
  };
  switch (a.epilogue) {
    case Epilogue::kSilu:
      return with.template operator()<Body::kSilu>();
    case Epilogue::kGeluTanh:
      return with.template operator()<Body::kGeluTanh>();
    case Epilogue::kGeluErf:
      return with.template operator()<Body::kGeluErf>();
    default:
      if constexpr (kGated)
        return {"linear: no gate has this epilogue"};
      else
        return a.epilogue == Epilogue::kTanh ? with.template operator()<Body::kTanh>()
                                             : with.template operator()<Body::kLinear>();
  }
}

template <typename T>
Status LaunchHopper(const LinearForwardArgs& args, const Launch& launch) {
  return args.layout == WeightLayout::kColumns
             ? LaunchHopper<T, Major::kK, false>(args, nullptr, nullptr, launch)
             : LaunchHopper<T, Major::kMN, false>(args, nullptr, nullptr, launch);
}

template <typename T>
Status LaunchHopper(const GatedLinearForwardArgs& a, const Launch& launch) {
  const LinearForwardArgs gate{
      .epilogue = a.epilogue,
      .dtype = a.dtype,
      .bias_dtype = a.dtype,
      .layout = a.transposed ? WeightLayout::kColumns : WeightLayout::kRows,
      .rows = a.rows,
      .k = a.k,
      .n = a.n,
      .x = a.x,
      .w = a.w_gate,
      .bias = nullptr,
      .residual = nullptr,
      .y = a.y,
      .pre = a.gate};
  return a.transposed ? LaunchHopper<T, Major::kK, true>(gate, a.w_value, a.value, launch)
                      : LaunchHopper<T, Major::kMN, true>(gate, a.w_value, a.value, launch);
}

}  // namespace zenith::linear
