// A linear layer with integer weights and few rows; the contract is ffi/kernels/quantized_linear.h.
//
// What bounds it is reading w once. The tensor cores' product is turned around, y' = w' x', so that
// w fills the 16 rows of a fragment and eight rows of x its 8 columns. A thread loads 16 bytes of w
// (8 of 4-bit weights) at a time, several loads ahead of their use, and widens them in registers:
// the integer is put into the mantissa of a number whose unit in the last place is 1, and that
// number's bias subtracted; exact. No weight goes through shared memory, and none is laid out anew
// ahead of time: which k and which column a fragment's element is, is free as long as x is loaded
// to match.
//
// A warp takes a range of k for a tile of columns, the warps of a block and, on a Hopper GPU, the
// blocks of a cluster the ranges one after another; their float32 sums are added in that order in
// shared memory, so that results are the same in every run.
#include <cooperative_groups.h>

#include "cuda/core/convert.cuh"
#include "cuda/core/launch.h"
#include "cuda/core/mma.cuh"
#include "cuda/core/vector.cuh"
#include "ffi/kernels/quantized_linear.h"

namespace zenith {
namespace {

namespace cg = cooperative_groups;

constexpr int kWarpSize = 32;
constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kMaxCluster = 8;  // the largest that every Hopper GPU can place

// --- Widening. A word has two slots of 16 bits; what comes out is a pair in T, of the integers in
// the named bits of both slots.

/// (word & kMask) ^ kBits
template <uint32_t kMask, uint32_t kBits>
__device__ __forceinline__ uint32_t MaskXor(uint32_t word) {
  uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, 0x6a;\n" : "=r"(result) : "r"(word), "n"(kMask), "n"(kBits));
  return result;
}
template <typename T>
__device__ __forceinline__ uint32_t Subtract(uint32_t a, uint32_t b) {
  using Pair = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
  Pair pa, pb;
  memcpy(&pa, &a, sizeof(a));
  memcpy(&pb, &b, sizeof(b));
  pa = __hsub2(pa, pb);
  memcpy(&a, &pa, sizeof(a));
  return a;
}

/// Bits 0 to 7 of each slot.
template <typename T>
__device__ __forceinline__ uint32_t WidenByte(uint32_t word) {
  if constexpr (std::is_same_v<T, __half>) {
    // 1024 + (s + 128), its unit in the last place is 1
    return Subtract<T>(MaskXor<0x00ff00ffu, 0x64806480u>(word), 0x64806480u);
  } else {
    // bfloat16 has 7 bits of mantissa: 128 + (s & 127), less 128, or 256 where the sign is set,
    // which is the lowest bit of the exponent.
    return Subtract<T>(MaskXor<0x007f007fu, 0x43004300u>(word),
                       MaskXor<0x00800080u, 0x43004300u>(word));
  }
}
/// Bits 4 * kNibble to 4 * kNibble + 3 of each slot.
template <typename T, int kNibble>
__device__ __forceinline__ uint32_t WidenNibble(uint32_t word) {
  const uint32_t shifted = kNibble == 0 ? word : word >> (4 * kNibble);
  constexpr uint32_t kBits = std::is_same_v<T, __half> ? 0x64086408u : 0x43084308u;
  return Subtract<T>(MaskXor<0x000f000fu, kBits>(shifted), kBits);  // base + (s + 8)
}

/// 16 or 8 bytes that are read once: they leave the first-level cache to x.
template <typename Words>
__device__ __forceinline__ Words LoadOnce(const char* address) {
  Words words;
  if constexpr (Words::kWords == 4) {
    asm("ld.global.nc.L1::no_allocate.v4.b32 {%0, %1, %2, %3}, [%4];\n"
        : "=r"(words.words[0]), "=r"(words.words[1]), "=r"(words.words[2]), "=r"(words.words[3])
        : "l"(address));
  } else {
    static_assert(Words::kWords == 2);
    asm("ld.global.nc.L1::no_allocate.v2.b32 {%0, %1}, [%2];\n"
        : "=r"(words.words[0]), "=r"(words.words[1])
        : "l"(address));
  }
  return words;
}

// --- The two layouts of w. A `Tile` says what a warp does in one step of k:
//   kStep           k that the warp goes ahead
//   kColumns        columns of the warp's (and the block's) tile
//   kAccumulators   fragments of sums, 16 columns each
//   kXWords         16-bit pairs of one row of x that a thread takes
//   Words           what a thread loads of w
//   Load            it, from row or column `lane_k` / `lane_n` on
//   Multiply        fragments += w' x'
//   Column(a, half) the column of a fragment's row lane / 4 (half 0) or that + 8 (half 1)
// In all of them row = lane / 4 and c = lane % 4 of the fragment.

/// w (k, n): a thread holds 4 rows of k, 16 columns of each.
template <typename T, int kBits>
struct RowTile {
  static constexpr int kStep = 16, kColumns = 128, kAccumulators = 8, kXWords = 2;
  static constexpr int kWordsOfRow = kBits / 2;  // of 16 columns
  using Words = Vector<uint32_t, kWordsOfRow>;
  struct Weights {
    Words rows[4];
  };

  __device__ static Weights Load(const char* w, int64_t k, int64_t column, int64_t k_size,
                                 int64_t n_size, int lane) {
    Weights weights = {};
    const int64_t n = column + lane / 4 * 16;
    if (n >= n_size) return weights;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t at = (k + lane % 4 * 4 + i) * n_size + n;
      weights.rows[i] = LoadOnce<Words>(w + at * kBits / 8);
    }
    return weights;
  }

  /// Pairs of x: (4 c, 4 c + 1), (4 c + 2, 4 c + 3).
  __device__ static void LoadX(const T* x, int64_t k, int lane, uint32_t (&pairs)[kXWords]) {
    const uint2 words = __ldg(reinterpret_cast<const uint2*>(x + k + lane % 4 * 4));
    pairs[0] = words.x;
    pairs[1] = words.y;
  }

  template <int kTiles, typename Fragments>
  __device__ static void Multiply(const Weights& w, const uint32_t (&x)[kTiles][kXWords],
                                  Fragments& sums) {
    // Slots of `low` and `high`: row 4 c in the lower, 4 c + 1 in the upper half, two (four)
    // columns.
#pragma unroll
    for (int word = 0; word < kWordsOfRow; ++word) {
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        const uint32_t select = part == 0 ? 0x5410 : 0x7632;
        const uint32_t first = __byte_perm(w.rows[0].words[word], w.rows[1].words[word], select);
        const uint32_t second = __byte_perm(w.rows[2].words[word], w.rows[3].words[word], select);
        if constexpr (kBits == 8) {
          const uint32_t a[4] = {WidenByte<T>(first), WidenByte<T>(first >> 8),
                                 WidenByte<T>(second), WidenByte<T>(second >> 8)};
          Apply(a, x, sums, 2 * word + part);
        } else {
          const uint32_t a[4] = {WidenNibble<T, 0>(first), WidenNibble<T, 1>(first),
                                 WidenNibble<T, 0>(second), WidenNibble<T, 1>(second)};
          Apply(a, x, sums, 4 * word + 2 * part);
          const uint32_t b[4] = {WidenNibble<T, 2>(first), WidenNibble<T, 3>(first),
                                 WidenNibble<T, 2>(second), WidenNibble<T, 3>(second)};
          Apply(b, x, sums, 4 * word + 2 * part + 1);
        }
      }
    }
  }
  template <int kTiles, typename Fragments>
  __device__ static void Apply(const uint32_t (&a)[4], const uint32_t (&x)[kTiles][kXWords],
                               Fragments& sums, int fragment) {
#pragma unroll
    for (int t = 0; t < kTiles; ++t) Mma16x8x16<T>(sums[t][fragment], a, x[t][0], x[t][1]);
  }

  __device__ static int Column(int fragment, int half, int lane) {
    return lane / 4 * 16 + 2 * fragment + half;
  }
};

/// w (n, k): a thread holds 16 neighbours along k of 8 columns.
template <typename T, int kBits>
struct ColumnTile {
  static constexpr int kStep = 64, kColumns = 64, kAccumulators = 4, kXWords = 8;
  static constexpr int kWordsOfColumn = kBits / 2;
  using Words = Vector<uint32_t, kWordsOfColumn>;
  struct Weights {
    Words columns[2 * kAccumulators];
  };

  __device__ static Weights Load(const char* w, int64_t k, int64_t column, int64_t k_size,
                                 int64_t n_size, int lane) {
    Weights weights = {};
#pragma unroll
    for (int i = 0; i < 2 * kAccumulators; ++i) {
      const int64_t n = column + 8 * i + lane / 4;
      if (n < n_size) {
        const int64_t at = n * k_size + k + lane % 4 * 16;
        weights.columns[i] = LoadOnce<Words>(w + at * kBits / 8);
      }
    }
    return weights;
  }

  /// Pairs of the 16 elements from 16 c on as the widened weights have them: of bytes (0, 2), (1,
  /// 3) of each four, of nibbles (i, i + 4) of each eight.
  __device__ static void LoadX(const T* x, int64_t k, int lane, uint32_t (&pairs)[kXWords]) {
    const Vector<T, 16> row = LoadReadOnly<16>(x + k + lane % 4 * 16);
    constexpr int kApart = kBits == 8 ? 1 : 2;  // words between the elements of a pair
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int group = i / (2 * kApart) * (2 * kApart), at = i % (2 * kApart);
      const int word = group + at / 2;
      pairs[i] =
          __byte_perm(row.words[word], row.words[word + kApart], at % 2 == 0 ? 0x5410 : 0x7632);
    }
  }

  template <int kTiles, typename Fragments>
  __device__ static void Multiply(const Weights& w, const uint32_t (&x)[kTiles][kXWords],
                                  Fragments& sums) {
#pragma unroll
    for (int fragment = 0; fragment < kAccumulators; ++fragment) {
      const Words& upper = w.columns[2 * fragment];
      const Words& lower = w.columns[2 * fragment + 1];
#pragma unroll
      for (int word = 0; word < kWordsOfColumn; ++word) {
        const uint32_t u = upper.words[word], l = lower.words[word];
        if constexpr (kBits == 8) {
          const uint32_t a[4] = {WidenByte<T>(u), WidenByte<T>(l), WidenByte<T>(u >> 8),
                                 WidenByte<T>(l >> 8)};
          Apply(a, x, sums, fragment, 2 * word);
        } else {
          const uint32_t a[4] = {WidenNibble<T, 0>(u), WidenNibble<T, 0>(l), WidenNibble<T, 1>(u),
                                 WidenNibble<T, 1>(l)};
          Apply(a, x, sums, fragment, 4 * word);
          const uint32_t b[4] = {WidenNibble<T, 2>(u), WidenNibble<T, 2>(l), WidenNibble<T, 3>(u),
                                 WidenNibble<T, 3>(l)};
          Apply(b, x, sums, fragment, 4 * word + 2);
        }
      }
    }
  }
  template <int kTiles, typename Fragments>
  __device__ static void Apply(const uint32_t (&a)[4], const uint32_t (&x)[kTiles][kXWords],
                               Fragments& sums, int fragment, int pair) {
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      Mma16x8x16<T>(sums[t][fragment], a, x[t][pair], x[t][pair + 1]);
    }
  }

  __device__ static int Column(int fragment, int half, int lane) {
    return 16 * fragment + 8 * half + lane / 4;
  }
};

// --- The kernel.

template <typename Tile, int kTiles>
struct Shared {
  static constexpr int kRows = 8 * kTiles;
  static constexpr int kStride = Tile::kColumns + 4;  // rows of x begin in other banks
  float sums[kWarps][kRows][kStride];
  float block[kRows][kStride];
};

/// A block: kWarps ranges of k for Tile::kColumns columns; a cluster: the block's ranges one after
/// another. w is read once, x once for each block.
/// kTiles: tiles of 8 rows of x. kGrouped: more than one group, whose scale is applied in between.
template <typename T, typename P, template <typename, int> typename TileOf, int kBits, int kTiles,
          bool kGrouped>
__global__ void __launch_bounds__(kThreads, kGrouped&& kTiles > 1 ? 1 : 2)
    quantized_linear_kernel(QuantizedLinearArgs args, int splits) {
  using Tile = TileOf<T, kBits>;
  constexpr int kRows = 8 * kTiles;
  // Steps of w in flight: 4 KB of a warp, 64 KB of a multiprocessor at two blocks, where 16 KB
  // cover the latency of memory at its bandwidth. 3 KB where sums are kept twice, in 128 registers.
  constexpr int kBytesAhead = kGrouped && kTiles == 1 ? 96 : 128;
  constexpr int kWeightBytes = sizeof(typename Tile::Weights);
  constexpr int kAhead = kWeightBytes < kBytesAhead ? kBytesAhead / kWeightBytes : 1;
  extern __shared__ __align__(16) unsigned char memory[];
  Shared<Tile, kTiles>& shared = *reinterpret_cast<Shared<Tile, kTiles>*>(memory);

  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int split = static_cast<int>(blockIdx.x) % splits;
  const int64_t column = int64_t{blockIdx.x} / splits * Tile::kColumns;
  const int64_t steps = args.k / Tile::kStep, ranges = int64_t{splits} * kWarps;
  const int64_t range = int64_t{split} * kWarps + warp;
  const int64_t first = steps * range / ranges, last = steps * (range + 1) / ranges;
  const char* const gW = static_cast<const char*>(args.w);
  const P* const gScale = static_cast<const P*>(args.scale);

  const T* gX[kTiles];
  bool has_row[kTiles];
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
    const int64_t row = 8 * t + lane / 4;
    has_row[t] = row < args.rows;
    gX[t] = static_cast<const T*>(args.x) + (has_row[t] ? row : 0) * args.k;
  }

  float sums[kTiles][Tile::kAccumulators][4] = {};
  float total[kTiles][Tile::kAccumulators][4] = {};
  const int64_t group_steps = args.k / args.groups / Tile::kStep;
  const auto flush = [&](int64_t group) {  // total += scale * sums
#pragma unroll
    for (int a = 0; a < Tile::kAccumulators; ++a) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t n = column + Tile::Column(a, half, lane);
        const float scale = n < args.n ? ToFloat(gScale[group * args.n + n]) : 0.0f;
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
#pragma unroll
          for (int i = 2 * half; i < 2 * half + 2; ++i) {
            total[t][a][i] += scale * sums[t][a][i];
            sums[t][a][i] = 0.0f;
          }
        }
      }
    }
  };

  struct Stage {
    typename Tile::Weights w;
    uint32_t x[kTiles][Tile::kXWords];
  };
  Stage stages[kAhead] = {};
  const auto load = [&](Stage& stage, int64_t step) {
    if (step >= last) return;
    const int64_t k = step * Tile::kStep;
    stage.w = Tile::Load(gW, k, column, args.k, args.n, lane);
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      if (has_row[t]) Tile::LoadX(gX[t], k, lane, stage.x[t]);  // else it stays 0
    }
  };
#pragma unroll
  for (int i = 0; i < kAhead; ++i) load(stages[i], first + i);
  int64_t group = kGrouped ? first / group_steps : 0;
  int64_t group_end = (group + 1) * group_steps;
  for (int64_t step = first; step < last; step += kAhead) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (step + i < last) {
        if (kGrouped && step + i == group_end) {
          flush(group++);
          group_end += group_steps;
        }
        Tile::Multiply(stages[i].w, stages[i].x, sums);
        load(stages[i], step + i + kAhead);
      }
    }
  }
  if (kGrouped && first < last) flush(group);

  // The warps' sums, then those of the cluster's blocks, each in order.
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
#pragma unroll
    for (int a = 0; a < Tile::kAccumulators; ++a) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = 8 * t + lane % 4 * 2 + i % 2;
        shared.sums[warp][row][Tile::Column(a, i / 2, lane)] =
            kGrouped ? total[t][a][i] : sums[t][a][i];
      }
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kRows * Tile::kColumns; i += kThreads) {
    const int row = i / Tile::kColumns, n = i % Tile::kColumns;
    float sum = shared.sums[0][row][n];
#pragma unroll
    for (int from = 1; from < kWarps; ++from) sum += shared.sums[from][row][n];
    shared.block[row][n] = sum;
  }
#if __CUDA_ARCH__ >= 900
  cg::cluster_group cluster = cg::this_cluster();
  cluster.sync();
#else
  __syncthreads();
#endif
  // Each block of a cluster finishes a part of the tile.
  for (int i = split * kThreads + static_cast<int>(threadIdx.x); i < kRows * Tile::kColumns;
       i += splits * kThreads) {
    const int row = i / Tile::kColumns, at = i % Tile::kColumns;
    const int64_t n = column + at;
    float sum = 0.0f;
#if __CUDA_ARCH__ >= 900
#pragma unroll
    for (int from = 0; from < kMaxCluster; ++from) {
      if (from < splits) sum += *cluster.map_shared_rank(&shared.block[row][at], from);
    }
#else
    sum = shared.block[row][at];
#endif
    if (row >= args.rows || n >= args.n) continue;
    if constexpr (!kGrouped) sum *= ToFloat(gScale[n]);
    if (args.bias != nullptr) sum += ToFloat(static_cast<const P*>(args.bias)[n]);
    static_cast<T*>(args.y)[row * args.n + n] = FromFloat<T>(sum);
  }
#if __CUDA_ARCH__ >= 900
  cluster.sync();  // no block leaves while another reads its sums
#endif
}

struct Device {
  int multiprocessors = 0;
  bool has_clusters = false;
};
Device CurrentDevice() {
  int device = 0, major = 0;
  Device found;
  (void)cudaGetDevice(&device);
  (void)cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  (void)cudaDeviceGetAttribute(&found.multiprocessors, cudaDevAttrMultiProcessorCount, device);
  found.has_clusters = major == 9;  // what other code than PTX of 8.0 is compiled for
  return found;
}

template <typename T, typename P, template <typename, int> typename TileOf, int kBits, int kTiles,
          bool kGrouped>
Status LaunchKernel(const QuantizedLinearArgs& args, const Launch& launch) {
  using Tile = TileOf<T, kBits>;
  constexpr int kBlocksPerMultiprocessor = 2;
  const auto kernel = quantized_linear_kernel<T, P, TileOf, kBits, kTiles, kGrouped>;
  constexpr size_t kSharedBytes = sizeof(Shared<Tile, kTiles>);
  const cudaError_t error = cudaFuncSetAttribute(
      kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(kSharedBytes));
  if (error != cudaSuccess) return {cudaGetErrorString(error)};

  const Device device = CurrentDevice();
  const int64_t tiles = (args.n + Tile::kColumns - 1) / Tile::kColumns;
  const int64_t steps = args.k / Tile::kStep;
  int splits = 1;
  while (device.has_clusters && splits < kMaxCluster && 2 * splits * kWarps <= steps &&
         2 * splits * tiles <= kBlocksPerMultiprocessor * device.multiprocessors) {
    splits *= 2;
  }
  if (tiles * splits > 0x7fffffff) return {"more than 2^31 - 1 blocks"};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(tiles * splits));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = kSharedBytes;
  config.stream = launch.stream;
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = static_cast<unsigned>(splits);
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  config.attrs = &cluster;
  config.numAttrs = splits > 1 ? 1 : 0;
  const cudaError_t launched = cudaLaunchKernelEx(&config, kernel, args, splits);
  return launched == cudaSuccess ? LastLaunch() : Status{cudaGetErrorString(launched)};
}

}  // namespace

Status QuantizedLinear(const QuantizedLinearArgs& args, const Launch& launch) {
  if (args.rows == 0) return {};
  if (args.rows > kQuantizedRows) return {"at most 16 rows"};
  const int64_t step = args.transposed ? 64 : 16;
  if ((args.k / args.groups) % step != 0 || args.n % 16 != 0) {
    return {"k / groups must be a multiple of 16, or of 64 if transposed, and n of 16"};
  }
  if (!AreAligned(static_cast<const char*>(args.x), static_cast<const char*>(args.w))) {
    return {"x and w must begin at a multiple of 16 bytes"};
  }
  return DispatchDTypes(args.dtype, args.param_dtype, [&]<typename T, typename P>() -> Status {
    if constexpr (std::is_same_v<T, float>) {
      return {"float16 and bfloat16 only"};
    } else {
      const auto grouped = [&]<template <typename, int> typename TileOf, int kBits, int kTiles>() {
        return args.groups > 1 ? LaunchKernel<T, P, TileOf, kBits, kTiles, true>(args, launch)
                               : LaunchKernel<T, P, TileOf, kBits, kTiles, false>(args, launch);
      };
      const auto tiled = [&]<template <typename, int> typename TileOf, int kBits>() {
        return args.rows > 8 ? grouped.template operator()<TileOf, kBits, 2>()
                             : grouped.template operator()<TileOf, kBits, 1>();
      };
      const auto laid = [&]<template <typename, int> typename TileOf>() {
        return args.bits == 8 ? tiled.template operator()<TileOf, 8>()
                              : tiled.template operator()<TileOf, 4>();
      };
      return args.transposed ? laid.template operator()<ColumnTile>()
                             : laid.template operator()<RowTile>();
    }
  });
}

}  // namespace zenith
