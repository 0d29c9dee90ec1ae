// A linear layer with integer weights and few rows on GPUs before Hopper, and on Hopper where a
// group is no multiple of a stage of its kernel; the contract is ffi/kernels/quantized_linear.h.
//
// What bounds it is reading w once. The tensor cores' product is turned around, y' = w' x', so that
// w fills the 16 rows of a fragment and eight rows of x its 8 columns. Each warp copies w and x to
// a ring of stages of its own in shared memory, and widens w in registers. No weight is laid out
// anew: which k and which column a fragment's element is, is free as long as x is loaded to match.
//
// The warps of a block share out k for a tile of columns; their float32 sums are added in one order
// in shared memory, so that results are the same in every run.
#include "cuda/core/convert.cuh"
#include "cuda/core/cp_async.cuh"
#include "cuda/core/launch.h"
#include "cuda/quantized_linear/kernels.h"
#include "cuda/quantized_linear/split.h"
#include "cuda/quantized_linear/tiles.cuh"

namespace zenith::quantized_linear {
namespace {

__device__ __forceinline__ void PrefetchL2(const void* global) {
  asm volatile("prefetch.global.L2 [%0];\n" ::"l"(global));
}

/// kTiles: tiles of 8 rows of x. kGrouped: more than one group, whose scale is applied in between.
template <typename T_, typename P_, template <typename, int> typename TileOf, int kBits,
          int kTiles_, bool kGrouped_>
struct Config {
  using T = T_;
  using P = P_;
  using Tile = TileOf<T, kBits>;
  static constexpr bool kGrouped = kGrouped_;
  static constexpr int kTiles = kTiles_;
  static constexpr int kRows = 8 * kTiles, kColumns = Tile::kColumns;
  static constexpr int kWBytes = 512 * Tile::kPieces;
  static constexpr int kStageBytes = kWBytes + kTiles * Tile::kXBytes;
  static constexpr int kWarps = kStageBytes > 3072 ? 4 : 8;
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kRingBytes = 88 * 1024, kMaxStages = 8;
  static constexpr int kStages = kRingBytes / kWarps / kStageBytes < kMaxStages
                                     ? kRingBytes / kWarps / kStageBytes
                                     : kMaxStages;
  static constexpr int kWarpBytes = kStages * kStageBytes;
  static_assert(kTiles <= 2);
  // A warp's sums take the place of its ring.
  static constexpr int kStride = kColumns + 4;  // floats; rows begin in other banks
  static_assert(kStages > 2 && kRows * kStride * int{sizeof(float)} <= kWarpBytes);
  static constexpr int kSharedBytes = kWarps * kWarpBytes;
  static_assert(kSharedBytes <= 99 * 1024);  // what every newer GPU than 8.0 has
};

/// A block: kColumns columns, k shared out to its warps. w crosses memory once, x once for each
/// block. Warps do not meet on the way. Little code, loops not unrolled: what runs once in 10 us is
/// fetched while nothing else happens.
template <typename C>
__global__ void __launch_bounds__(C::kThreads, 1)
    quantized_linear_kernel(const __grid_constant__ QuantizedLinearArgs args, Split split) {
  using T = typename C::T;
  using P = typename C::P;
  using Tile = typename C::Tile;
  constexpr int kTiles = C::kTiles;
  constexpr bool kGrouped = C::kGrouped;
  constexpr int kWarps = C::kWarps, kThreads = C::kThreads;
  extern __shared__ __align__(16) unsigned char shared[];
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int64_t column = int64_t{blockIdx.x} * C::kColumns, columns_left = args.n - column;

  unsigned char* const ring = shared + warp * C::kWarpBytes;
  const int range = warp;
  const int steps = (split.units + (range < split.longer)) * split.unit -
                    (range == split.last_range ? split.missing : 0);
  const int64_t first_k = int64_t{range} * split.unit * Tile::kStep;
  const char* gW = static_cast<const char*>(args.w) + Tile::Offset(first_k, column, args, lane);
  const int64_t w_stride = Tile::Stride(args), w_advance = Tile::Advance(args);
  const int pieces = Tile::Pieces(columns_left, lane);
  // Rows that are missing give sums that nobody reads, whatever stands in their place.
  const int rows = static_cast<int>(args.rows);
  const int64_t x_row_bytes = args.k * int{sizeof(T)};
  const char* gX = static_cast<const char*>(args.x) + Tile::XRow(0, lane) * x_row_bytes +
                   first_k * int{sizeof(T)} + Tile::XOffset(lane);
  const int64_t jump = int64_t{split.ranges - 1} * split.unit;  // steps from unit to unit
  int ahead = 0, ahead_of_unit = split.unit;
  uint32_t slot = SharedAddress(ring);
  const uint32_t ring_end = slot + C::kWarpBytes;
  const auto copy_next = [&] {
    if (ahead < steps) {
#pragma unroll
      for (int i = 0; i < Tile::kPieces; ++i)
        if (i < pieces) CpAsync16(slot + Tile::Place(i, lane), gW + i * w_stride, true);
      // 8 rows, or 16 where one piece has them all.
      constexpr int kPieces = Tile::kXPieces == 1 ? 1 : Tile::kXPieces * kTiles;
#pragma unroll
      for (int i = 0; i < kPieces; ++i)
        if (Tile::XRow(i, lane) < rows)
          CpAsync16(slot + C::kWBytes + Tile::XPlace(i, lane), gX + Tile::XRow(i, 0) * x_row_bytes,
                    true);
    }
    CpAsyncCommit();
    ++ahead;
    gW += w_advance;
    gX += Tile::kStep * int{sizeof(T)};
    if (--ahead_of_unit == 0) {
      ahead_of_unit = split.unit;
      gW += jump * w_advance;
      gX += jump * (Tile::kStep * int{sizeof(T)});
    }
    slot += C::kStageBytes;
    if (slot == ring_end) slot -= C::kWarpBytes;
  };
#pragma unroll 1
  for (int i = 0; i < C::kStages - 1; ++i) copy_next();

  // What the end reads once, into the second-level cache: 16 elements of 2 bytes are a sector.
  if (const int at = 16 * static_cast<int>(threadIdx.x); at < C::kColumns && at < columns_left) {
    if constexpr (!kGrouped) PrefetchL2(static_cast<const P*>(args.scale) + column + at);
    if (args.bias != nullptr) PrefetchL2(static_cast<const P*>(args.bias) + column + at);
  }

  float sums[kTiles][Tile::kAccumulators][4] = {};
  float total[kTiles][Tile::kAccumulators][4] = {};
  const P* const gScale = static_cast<const P*>(args.scale) + column;
  typename Tile::template Scales<P> scales;
  int unit = range, of_unit = split.unit;
  const auto load_scales = [&] {
    scales.Load(gScale + unit / split.units_of_group * args.n, columns_left, lane);
  };
  if (kGrouped && steps > 0) load_scales();
  const unsigned char* stage = ring;
#pragma unroll 1
  for (int step = 1; step <= steps; ++step) {
    CpAsyncWait<C::kStages - 2>();
    __syncwarp();  // of all lanes; and none reads the stage before any more
    typename Tile::Words w[Tile::kWords];
    uint32_t x[kTiles][Tile::kXWords];
#pragma unroll
    for (int i = 0; i < Tile::kWords; ++i) w[i] = Tile::Load(stage, i, lane);
#pragma unroll
    for (int t = 0; t < kTiles; ++t)
      Tile::LoadX(stage + C::kWBytes + t * Tile::kXBytes, lane, x[t]);
    stage += C::kStageBytes;
    if (stage == ring + C::kWarpBytes) stage = ring;
    copy_next();  // over what the step before has read
    Tile::Multiply(w, x, sums);
    if (kGrouped && (--of_unit == 0 || step == steps)) {  // total += scale * sums
      float scale[Tile::kAccumulators][2];
      scales.Get(scale);
      unit += split.ranges, of_unit = split.unit;
      if (step < steps) load_scales();
#pragma unroll
      for (int t = 0; t < kTiles; ++t)
#pragma unroll
        for (int a = 0; a < Tile::kAccumulators; ++a)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            total[t][a][i] += scale[a][i / 2] * sums[t][a][i];
            sums[t][a][i] = 0.0f;
          }
    }
  }
  CpAsyncWait<0>();

  // The warps' sums, in one order.
  float* const own_sums = reinterpret_cast<float*>(ring);
#pragma unroll
  for (int t = 0; t < kTiles; ++t)
    Tile::Store(kGrouped ? total[t] : sums[t], own_sums + 8 * t * C::kStride, C::kStride, lane);
  __syncthreads();
  const auto finish = [&](int part, float4 sum) {
    const int row = part / (C::kColumns / 4), at = part % (C::kColumns / 4) * 4;
    if (at >= columns_left) return;
    float values[4] = {sum.x, sum.y, sum.z, sum.w};
    const int64_t n = column + at;
    if constexpr (!kGrouped) {
#pragma unroll
      for (int i = 0; i < 4; ++i) values[i] *= ToFloat(static_cast<const P*>(args.scale)[n + i]);
    }
    if (args.bias != nullptr)
#pragma unroll
      for (int i = 0; i < 4; ++i) values[i] += ToFloat(static_cast<const P*>(args.bias)[n + i]);
    *reinterpret_cast<uint2*>(static_cast<T*>(args.y) + row * args.n + n) = {
        PackPair<T>(values[0], values[1]), PackPair<T>(values[2], values[3])};
  };
#pragma unroll 1
  for (int part = threadIdx.x; part < rows * (C::kColumns / 4); part += kThreads) {
    const int row = part / (C::kColumns / 4), at = part % (C::kColumns / 4) * 4;
    const unsigned char* from = shared + (row * C::kStride + at) * int{sizeof(float)};
    float4 sum = {};
#pragma unroll 8
    for (int i = 0; i < kWarps; ++i) {
      const float4 other = *reinterpret_cast<const float4*>(from + i * C::kWarpBytes);
      sum.x += other.x, sum.y += other.y, sum.z += other.z, sum.w += other.w;
    }
    finish(part, sum);
  }
}

template <typename C>
Status LaunchKernel(const QuantizedLinearArgs& args, const Launch& launch) {
  const auto kernel = quantized_linear_kernel<C>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, C::kSharedBytes);
  if (error != cudaSuccess) return {cudaGetErrorString(error)};
  const int64_t tiles = (args.n + C::kColumns - 1) / C::kColumns;
  const int64_t steps = args.k / C::Tile::kStep;
  constexpr bool kColumnTile = C::Tile::kLineSteps > 0;
  const Split split = EvenSplitOf(steps, C::kWarps, args.groups > 1 ? steps / args.groups : 0,
                                  !kColumnTile, kColumnTile ? C::Tile::kLineSteps : 1);
  kernel<<<static_cast<unsigned>(tiles), C::kThreads, C::kSharedBytes, launch.stream>>>(args,
                                                                                        split);
  return LastLaunch();
}

template <typename T, typename P, template <typename, int> typename TileOf, int kBits, int kTiles>
Status LaunchGroups(const QuantizedLinearArgs& args, const Launch& launch) {
  return args.groups > 1 ? LaunchKernel<Config<T, P, TileOf, kBits, kTiles, true>>(args, launch)
                         : LaunchKernel<Config<T, P, TileOf, kBits, kTiles, false>>(args, launch);
}

template <typename T, typename P, template <typename, int> typename TileOf, int kBits>
Status LaunchRows(const QuantizedLinearArgs& args, const Launch& launch) {
  return args.rows > 8 ? LaunchGroups<T, P, TileOf, kBits, 2>(args, launch)
                       : LaunchGroups<T, P, TileOf, kBits, 1>(args, launch);
}

template <typename T, typename P, template <typename, int> typename TileOf>
Status LaunchBits(const QuantizedLinearArgs& args, const Launch& launch) {
  return args.bits == 8 ? LaunchRows<T, P, TileOf, 8>(args, launch)
                        : LaunchRows<T, P, TileOf, 4>(args, launch);
}

}  // namespace

Status General(const QuantizedLinearArgs& args, const Launch& launch) {
  return DispatchDTypes(args.dtype, args.param_dtype, [&]<typename T, typename P>() -> Status {
    if constexpr (std::is_same_v<T, float>) {
      return {"float16 and bfloat16 only"};
    } else {
      return args.transposed ? LaunchBits<T, P, ColumnTile>(args, launch)
                             : LaunchBits<T, P, RowTile>(args, launch);
    }
  });
}

}  // namespace zenith::quantized_linear
