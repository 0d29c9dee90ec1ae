// A linear layer with integer weights and few rows; the contract is ffi/kernels/quantized_linear.h.
//
// What bounds it is reading w once. The tensor cores' product is turned around, y' = w' x', so that
// w fills the 16 rows of a fragment and eight rows of x its 8 columns. Each warp copies w and x to
// a ring of stages of its own in shared memory, and widens w in registers: the integer is put into
// the mantissa of a number whose unit in the last place is 1, and that number's bias subtracted;
// exact. No weight is laid out anew: which k and which column a fragment's element is, is free as
// long as x is loaded to match.
//
// The warps of a block and, on a Hopper GPU, the blocks of a cluster share out k for a tile of
// columns; their float32 sums are added in one order in shared memory, so that results are the same
// in every run.
#include <array>

#include "cuda/core/cluster.cuh"
#include "cuda/core/convert.cuh"
#include "cuda/core/cp_async.cuh"
#include "cuda/core/launch.h"
#include "cuda/core/mma.cuh"
#include "cuda/core/reduce.cuh"
#include "cuda/core/vector.cuh"
#include "ffi/kernels/quantized_linear.h"

namespace zenith {
namespace {

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

__device__ __forceinline__ void PrefetchL2(const void* global) {
  asm volatile("prefetch.global.L2 [%0];\n" ::"l"(global));
}

// --- The two layouts of w. A `Tile` says what a warp does in one step of k:
//   kStep, kColumns   k that it goes ahead; columns of the warp's, and the block's, tile
//   kPieces           copies of 16 bytes a lane of w, 512 bytes of the step's stage each
//   kXPieces          the same of 8 rows of x, some lanes having none
//   kWords, kXWords   what a lane multiplies: `Words` of w, 16-bit pairs of one row of x
//   kAccumulators     fragments of sums, 16 columns each
//   kLineSteps        steps that read a line of w, where a row of w is k
//   Multiply          fragments += w' x'
//   Scales            a lane's columns' scales, of one group
//   Store             fragments to rows of sums
// Eight lanes that are neighbours copy whole lines, or halves of them: with a lane copying what it
// multiplies itself, scattered over 4 rows, w (k, n) of int8 came at 1.6 TB/s (H100, 11/2026). In
// what lanes multiply, row = lane / 4 and c = lane % 4 of the fragment. Offsets are in bytes.

/// w (k, n): a lane multiplies 4 rows of k, 16 columns of each.
template <typename T, int kBits>
struct RowTile {
  static constexpr int kStep = 16, kColumns = 128, kAccumulators = 8;
  static constexpr int kLineSteps = 0;
  static constexpr int kWords = 4, kXWords = 2;
  static constexpr int kPieces = kBits / 2, kXPieces = 1;
  static constexpr int kXBytes = 256;  // of 8 rows
  using Words = Vector<uint32_t, kBits / 2>;

  /// Of the lane's first piece: kBits neighbouring lanes have a row.
  __device__ static int64_t Offset(int64_t k, int64_t column, const QuantizedLinearArgs& args,
                                   int lane) {
    return ((k + lane / kBits) * args.n + column) * kBits / 8 + lane % kBits * 16;
  }
  __device__ static int64_t Stride(const QuantizedLinearArgs& args) { return args.n * 4; }
  /// Of a step after another.
  __device__ static int64_t Advance(const QuantizedLinearArgs& args) {
    return kStep * args.n * kBits / 8;
  }
  /// Pieces whose columns there are.
  __device__ static int Pieces(int64_t columns_left, int lane) {
    return lane % kBits * (128 / kBits) < columns_left ? kPieces : 0;
  }
  /// The rows of a lane's words are 4 c + i. In a stage of int8, chunk j of row r lies at j ^ (r /
  /// 4
  /// * 2). Of int4, whose rows are half as long, row r is in the place of r ^ (r / 4 % 2), chunk j
  /// at j ^ (r / 4 & 2). So no lanes meet in a bank.
  __device__ static int Place(int piece, int lane) {
    const int row = kBits == 8 ? lane / 8 : lane / 4 ^ lane / 16;
    return ((row * kBits + lane % kBits) * 16 ^ piece * 32) + piece * 512;
  }
  __device__ static Words Load(const unsigned char* stage, int i, int lane) {
    const int r = lane / 4, c = lane % 4;
    const int at = kBits == 8
                       ? (4 * c + i) * 128 + (r ^ 2 * c) * 16
                       : (c * 256 + (c & 1) * 64 + (r / 2 ^ (c & 2)) * 16 + r % 2 * 8) ^ i * 64;
    return *reinterpret_cast<const Words*>(stage + at);
  }

  /// Two lanes have a row of x.
  __device__ static int XRow(int, int lane) { return lane / 2; }
  __device__ static int XOffset(int lane) { return lane % 2 * 16; }
  __device__ static int XPlace(int, int lane) { return lane * 16; }
  /// Neighbours 4 c to 4 c + 3 of row `lane / 4`, as the widened weights have them.
  __device__ static void LoadX(const unsigned char* stage, int lane, uint32_t (&pairs)[kXWords]) {
    const auto words = *reinterpret_cast<const Vector<uint32_t, 2>*>(stage + lane * 8);
    pairs[0] = words.words[0], pairs[1] = words.words[1];
  }

  template <typename P>
  struct Scales {
    Vector<P, 16> columns;
    __device__ void Load(const P* scale, int64_t columns_left, int lane) {
      if (lane / 4 * 16 < columns_left) columns = LoadReadOnly<16>(scale + lane / 4 * 16);
    }
    __device__ void Get(float (&scales)[kAccumulators][2]) const {
      float values[16];
      ToFloat(columns, values);
#pragma unroll
      for (int i = 0; i < 16; ++i) scales[i / 2][i % 2] = values[i];
    }
  };

  /// sums: of row 0 of the tile, rows `stride` apart.
  __device__ static void Store(const float (&fragments)[kAccumulators][4], float* sums, int stride,
                               int lane) {
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int a = 0; a < kAccumulators; a += 2)
        *reinterpret_cast<float4*>(sums + (lane % 4 * 2 + i) * stride + lane / 4 * 16 + 2 * a) = {
            fragments[a][i], fragments[a][i + 2], fragments[a + 1][i], fragments[a + 1][i + 2]};
  }

  template <int kTiles, typename Fragments>
  __device__ static void Multiply(const Words (&w)[kWords], const uint32_t (&x)[kTiles][kXWords],
                                  Fragments& sums) {
    // Slots of `low` and `high`: row 4 c in the lower, 4 c + 1 in the upper half, two (four)
    // columns.
#pragma unroll
    for (int word = 0; word < Words::kWords; ++word) {
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        const uint32_t select = part == 0 ? 0x5410 : 0x7632;
        const uint32_t first = __byte_perm(w[0].words[word], w[1].words[word], select);
        const uint32_t second = __byte_perm(w[2].words[word], w[3].words[word], select);
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
};

/// w (n, k): a lane multiplies 16 neighbours along k of 8 columns.
template <typename T, int kBits>
struct ColumnTile {
  static constexpr int kStep = 64, kColumns = 64, kAccumulators = 4;
  static constexpr int kLineSteps = 16 / kBits;  // that read a line of 128 bytes
  static constexpr int kWords = 8, kXWords = 8;
  static constexpr int kPieces = kBits, kXPieces = 2;
  static constexpr int kXBytes = 1024;
  static constexpr int kLanes = kBits / 2;  // that share a column
  static constexpr int kColumnsOfPiece = kWarpSize / kLanes;
  using Words = Vector<uint32_t, kBits / 2>;

  __device__ static int64_t Offset(int64_t k, int64_t column, const QuantizedLinearArgs& args,
                                   int lane) {
    return ((column + lane / kLanes) * args.k + k) * kBits / 8 + lane % kLanes * 16;
  }
  __device__ static int64_t Stride(const QuantizedLinearArgs& args) { return args.k * 8; }
  __device__ static int64_t Advance(const QuantizedLinearArgs&) { return kStep * kBits / 8; }
  __device__ static int Pieces(int64_t columns_left, int) {
    return columns_left < kColumns ? static_cast<int>(columns_left) / kColumnsOfPiece : kPieces;
  }
  __device__ static int Place(int piece, int lane) { return piece * 512 + lane * 16; }
  __device__ static Words Load(const unsigned char* stage, int i, int lane) {
    return *reinterpret_cast<const Words*>(stage + (i * kWarpSize + lane) * int{sizeof(Words)});
  }

  /// Eight lanes have a row of x; odd rows have neighbouring chunks exchanged, for the banks.
  __device__ static int XRow(int piece, int lane) { return 4 * piece + lane / 8; }
  __device__ static int XOffset(int lane) { return lane % 8 * 16; }
  __device__ static int XPlace(int piece, int lane) {
    return piece * 512 + (lane ^ lane / 8 % 2) * 16;
  }
  /// Pairs of 16 neighbours as the widened weights have them: of bytes (0, 2), (1, 3) of each four,
  /// of nibbles (i, i + 4) of each eight.
  __device__ static void LoadX(const unsigned char* stage, int lane, uint32_t (&pairs)[kXWords]) {
    uint32_t row[8];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const auto chunk = *reinterpret_cast<const Vector<uint32_t, 4>*>(
          stage + lane / 4 * 128 + (lane % 4 * 2 + i ^ lane / 4 % 2) * 16);
#pragma unroll
      for (int j = 0; j < 4; ++j) row[4 * i + j] = chunk.words[j];
    }
    constexpr int kApart = kBits == 8 ? 1 : 2;  // words between the elements of a pair
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int group = i / (2 * kApart) * (2 * kApart), at = i % (2 * kApart);
      const int word = group + at / 2;
      pairs[i] = __byte_perm(row[word], row[word + kApart], at % 2 == 0 ? 0x5410 : 0x7632);
    }
  }

  template <typename P>
  struct Scales {
    P columns[kWords];
    __device__ void Load(const P* scale, int64_t columns_left, int lane) {
#pragma unroll
      for (int i = 0; i < kWords; ++i)
        if (8 * i < columns_left) columns[i] = scale[8 * i + lane / 4];
    }
    __device__ void Get(float (&scales)[kAccumulators][2]) const {
#pragma unroll
      for (int i = 0; i < kWords; ++i) scales[i / 2][i % 2] = ToFloat(columns[i]);
    }
  };

  __device__ static void Store(const float (&fragments)[kAccumulators][4], float* sums, int stride,
                               int lane) {
#pragma unroll
    for (int a = 0; a < kAccumulators; ++a)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        sums[(lane % 4 * 2 + i % 2) * stride + 16 * a + i / 2 * 8 + lane / 4] = fragments[a][i];
  }

  template <int kTiles, typename Fragments>
  __device__ static void Multiply(const Words (&w)[kWords], const uint32_t (&x)[kTiles][kXWords],
                                  Fragments& sums) {
#pragma unroll
    for (int fragment = 0; fragment < kAccumulators; ++fragment) {
      const Words& upper = w[2 * fragment];
      const Words& lower = w[2 * fragment + 1];
#pragma unroll
      for (int word = 0; word < Words::kWords; ++word) {
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
};

// --- The kernel.

#if __CUDA_ARCH__ >= 900
constexpr bool kHopperCode = true;
#else
constexpr bool kHopperCode = false;
#endif

/// How steps of k are dealt out to the warps of a cluster, in turn: in units of so many steps.
struct Split {
  int unit, ranges;         // ranges: warps of a cluster
  int units, longer;        // of each range; how many ranges have one more
  int last_range, missing;  // whose last unit lacks so many steps
  int units_of_group;
};

/// kTiles: tiles of 8 rows of x. kGrouped: more than one group, whose scale is applied in between.
/// kHopper: for compute capability 9.0, in its code alone; else what every newer GPU than 8.0 has
/// shared memory for, in the code for 8.0.
template <typename T_, typename P_, template <typename, int> typename TileOf, int kBits,
          int kTiles_, bool kGrouped_, bool kHopper_>
struct Config {
  using T = T_;
  using P = P_;
  using Tile = TileOf<T, kBits>;
  static constexpr bool kGrouped = kGrouped_, kHopper = kHopper_;
  static constexpr int kTiles = kTiles_;
  static constexpr int kRows = 8 * kTiles, kColumns = Tile::kColumns;
  static constexpr int kWBytes = 512 * Tile::kPieces;
  static constexpr int kStageBytes = kWBytes + kTiles * Tile::kXBytes;
  // Of w (k, n), which needs large clusters, one block a multiprocessor: where clusters do not fit
  // otherwise some share one, and end last, in twice the time. Eight warps where sums are kept
  // twice for 16 rows, in 210 registers, or a step is 5 KB; and two blocks of them for the many
  // tiles of (n, k) of 4 bits, 18 us for 22 of 14336 columns (H100, 11/2026).
  static constexpr bool kFat = (kGrouped && kTiles > 1) || kStageBytes > 4096;
  static constexpr int kBlocks = kHopper && Tile::kLineSteps > 0 && !kFat ? 2 : 1;  // at a time
  static constexpr int kWarps =
      !kHopper ? (kStageBytes > 3072 ? 4 : 8) : (kFat || kBlocks > 1 ? 8 : 16);
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kRingBytes = kHopper ? 200 * 1024 / kBlocks : 88 * 1024, kMaxStages = 8;
  static constexpr int kStages = kRingBytes / kWarps / kStageBytes < kMaxStages
                                     ? kRingBytes / kWarps / kStageBytes
                                     : kMaxStages;
  static constexpr int kWarpBytes = kStages * kStageBytes;
  static_assert(kTiles <= 2);
  // A warp's sums take the place of its ring.
  static constexpr int kStride = kColumns + 4;  // floats; rows begin in other banks
  static_assert(kStages > 2 && kRows * kStride * int{sizeof(float)} <= kWarpBytes);
  static constexpr int kParts = kRows * kColumns / 4;  // of a tile, 16 bytes each
  static constexpr int kSharedBytes = kWarps * kWarpBytes + (kParts + kMaxCluster) * 16;
  static_assert(kSharedBytes <= (kHopper ? 227 : 99) * 1024);
};

/// A block: kColumns columns, k shared out to its warps, and to those of all blocks of a cluster
/// (blockIdx.x). w crosses memory once, x once for each block. Warps do not meet on the way.
/// Little code, loops not unrolled: what runs once in 10 us is fetched while nothing else happens.
template <typename C>
__device__ __forceinline__ void Multiply(const QuantizedLinearArgs& args, const Split& split) {
  using T = typename C::T;
  using P = typename C::P;
  using Tile = typename C::Tile;
  constexpr int kTiles = C::kTiles;
  constexpr bool kGrouped = C::kGrouped;
  constexpr int kWarps = C::kWarps, kThreads = C::kThreads;
  extern __shared__ __align__(16) unsigned char shared[];
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  [[maybe_unused]] const int blocks = static_cast<int>(gridDim.x);
  const int rank = static_cast<int>(blockIdx.x);
  const int64_t column = int64_t{blockIdx.y} * C::kColumns, columns_left = args.n - column;

  unsigned char* const ring = shared + warp * C::kWarpBytes;
  const int range = warp * static_cast<int>(gridDim.x) + rank;
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

  const int parts = rows * (C::kColumns / 4);  // of the sums, dealt out to the blocks
#if __CUDA_ARCH__ >= 900
  // Sums of the other blocks come to `inbox`, and count at `arrived`.
  __shared__ uint64_t arrived_barrier;
  const uint32_t arrived = SharedAddress(&arrived_barrier);
  const int own_parts = (parts - rank + blocks - 1) / blocks;
  if (blocks > 1) {
    if (threadIdx.x == 0) {
      BarrierInit(arrived, 1);
      BarrierInitFence();
      BarrierExpect(arrived, static_cast<uint32_t>(own_parts * blocks * 16));
    }
    ClusterArrive();
  }
#endif

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

  // The warps' sums, then those of the cluster's blocks, each in one order.
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
#if __CUDA_ARCH__ >= 900
  float4* const inbox = reinterpret_cast<float4*>(shared + kWarps * C::kWarpBytes);
  const int most_parts = (parts + blocks - 1) / blocks;
  if (blocks > 1) ClusterWait();  // all have begun
#endif
#pragma unroll 1
  for (int part = threadIdx.x; part < parts; part += kThreads) {
    const int row = part / (C::kColumns / 4), at = part % (C::kColumns / 4) * 4;
    const unsigned char* from = shared + (row * C::kStride + at) * int{sizeof(float)};
    float4 sum = {};
#pragma unroll 8
    for (int i = 0; i < kWarps; ++i) {
      const float4 other = *reinterpret_cast<const float4*>(from + i * C::kWarpBytes);
      sum.x += other.x, sum.y += other.y, sum.z += other.z, sum.w += other.w;
    }
#if __CUDA_ARCH__ >= 900
    if (blocks > 1) {
      const int owner = part % blocks;
      StoreTo(owner, SharedAddress(inbox + rank * most_parts + part / blocks), arrived, sum);
      continue;
    }
#endif
    finish(part, sum);
  }
#if __CUDA_ARCH__ >= 900
  if (blocks == 1) return;
  BarrierWait(arrived, 0);
#pragma unroll 1
  for (int i = threadIdx.x; i < own_parts; i += kThreads) {
    float4 sum = {};
#pragma unroll 1
    for (int from = 0; from < blocks; ++from) {
      const float4 other = inbox[from * most_parts + i];
      sum.x += other.x, sum.y += other.y, sum.z += other.z, sum.w += other.w;
    }
    finish(i * blocks + rank, sum);
  }
#endif
}

template <typename C>
__global__ void __launch_bounds__(C::kThreads, C::kBlocks)
    quantized_linear_kernel(const __grid_constant__ QuantizedLinearArgs args, Split split) {
  if constexpr (C::kHopper == kHopperCode) Multiply<C>(args, split);
}

/// group_steps: of a group, or 0.
template <typename Tile>
Split SplitOf(int64_t steps, int64_t ranges, int64_t group_steps) {
  // Of (n, k) warps take neighbouring lines of a column; of (k, n) steps, and of groups as much as
  // leaves equal shares, so that they end seldom.
  const int64_t even = (steps + ranges - 1) / ranges;
  int64_t unit = Tile::kLineSteps > 0 ? Tile::kLineSteps : 1;
  if (group_steps > 0) {
    if (Tile::kLineSteps == 0) unit = group_steps;
    while (group_steps % unit != 0) --unit;
    const auto most = [&] { return (steps + unit * ranges - 1) / (unit * ranges) * unit; };
    while (unit % 2 == 0 && 16 * most() > 17 * even) unit /= 2;
  }
  const int64_t units = (steps + unit - 1) / unit;
  return {.unit = static_cast<int>(unit),
          .ranges = static_cast<int>(ranges),
          .units = static_cast<int>(units / ranges),
          .longer = static_cast<int>(units % ranges),
          .last_range = static_cast<int>((units - 1) % ranges),
          .missing = static_cast<int>(units * unit - steps),
          .units_of_group = static_cast<int>(group_steps > 0 ? group_steps / unit : 1)};
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
    if (cudaOccupancyMaxActiveClusters(&most[blocks], quantized_linear_kernel<C>, &config) !=
        cudaSuccess) {
      most[blocks] = 0;
      (void)cudaGetLastError();
    }
  }
  return most;
}

template <typename C>
Status LaunchKernel(const QuantizedLinearArgs& args, int device, const Launch& launch) {
  const auto kernel = quantized_linear_kernel<C>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, C::kSharedBytes);
  if (error != cudaSuccess) return {cudaGetErrorString(error)};

  const int64_t tiles = (args.n + C::kColumns - 1) / C::kColumns;
  if (tiles > 65535) return {"more than 65535 tiles of columns"};
  const int64_t steps = args.k / C::Tile::kStep;
  int64_t blocks = 1;
  if constexpr (C::kHopper) {
    // The smallest clusters that fill nine of ten multiprocessors: memory is then what is waited
    // for. They must all run at once, or the last ones double the time.
    static const std::array<int, kMaxCluster + 1> most = ClustersAtOnce<C>();
    int multiprocessors = 0;
    (void)cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
    for (int b = 2; b <= kMaxCluster && 10 * blocks * tiles < 9 * multiprocessors; ++b) {
      if (b * C::kWarps <= steps && most[b] >= tiles) blocks = b;
    }
  }
  const Split split = SplitOf<typename C::Tile>(steps, blocks * C::kWarps,
                                                args.groups > 1 ? steps / args.groups : 0);
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(tiles));
  config.blockDim = dim3(C::kThreads);
  config.dynamicSmemBytes = C::kSharedBytes;
  config.stream = launch.stream;
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = static_cast<unsigned>(blocks);
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  config.attrs = &cluster;
  config.numAttrs = blocks > 1 ? 1 : 0;
  const cudaError_t launched = cudaLaunchKernelEx(&config, kernel, args, split);
  return launched == cudaSuccess ? LastLaunch() : Status{cudaGetErrorString(launched)};
}

}  // namespace

Status QuantizedLinear(const QuantizedLinearArgs& args, const Launch& launch) {
  if (args.rows == 0) return {};
  if (args.rows > kQuantizedRows) return {"at most 16 rows"};
  const int64_t step = args.transposed ? 64 : 16;
  const int64_t columns = args.transposed || args.bits == 8 ? 16 : 32;
  if ((args.k / args.groups) % step != 0 || args.n % columns != 0) {
    return {
        "k / groups must be a multiple of 16, or of 64 if transposed, and n of 16, or of 32 of "
        "4-bit weights that are not"};
  }
  if (!AreAligned(static_cast<const char*>(args.x), static_cast<const char*>(args.w),
                  static_cast<const char*>(args.scale), static_cast<const char*>(args.y))) {
    return {"x, w, scale and y must begin at a multiple of 16 bytes"};
  }
  int device = 0;
  [[maybe_unused]] int major = 0;
  (void)cudaGetDevice(&device);
  (void)cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  return DispatchDTypes(args.dtype, args.param_dtype, [&]<typename T, typename P>() -> Status {
    if constexpr (std::is_same_v<T, float>) {
      return {"float16 and bfloat16 only"};
    } else {
      const auto launched =
          [&]<template <typename, int> typename TileOf, int kBits, int kTiles, bool kGrouped>() {
#ifdef ZENITH_HOPPER
            if (major == 9)
              return LaunchKernel<Config<T, P, TileOf, kBits, kTiles, kGrouped, true>>(args, device,
                                                                                       launch);
#endif
            return LaunchKernel<Config<T, P, TileOf, kBits, kTiles, kGrouped, false>>(args, device,
                                                                                      launch);
          };
      const auto grouped = [&]<template <typename, int> typename TileOf, int kBits, int kTiles>() {
        return args.groups > 1 ? launched.template operator()<TileOf, kBits, kTiles, true>()
                               : launched.template operator()<TileOf, kBits, kTiles, false>();
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
