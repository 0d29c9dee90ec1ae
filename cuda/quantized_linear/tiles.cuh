// The two layouts of w, for GPUs before Hopper and for what its kernel does not take.
//
// A `Tile` says what a warp does in one step of k:
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

#pragma once

#include "cuda/core/mma.cuh"
#include "cuda/core/reduce.cuh"
#include "cuda/core/vector.cuh"
#include "cuda/quantized_linear/widen.cuh"
#include "ffi/kernels/quantized_linear.h"

namespace zenith::quantized_linear {

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
  /// The rows of a lane's words are 4 c + i. In a stage of int8, chunk j of row r lies at
  /// j ^ (r / 4 * 2). Of int4, whose rows are half as long, row r is in the place of r ^ (r / 4 %
  /// 2), chunk j at j ^ (r / 4 & 2). So no lanes meet in a bank.
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
    // Slots of `first`: row 4 c in the lower, 4 c + 1 in the upper half, two (four) columns.
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
          uint32_t a[4], b[4];
          WidenNibbles<T>(first, a);
          WidenNibbles<T>(second, b);
          Apply({a[0], a[1], b[0], b[1]}, x, sums, 4 * word + 2 * part);
          Apply({a[2], a[3], b[2], b[3]}, x, sums, 4 * word + 2 * part + 1);
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
          uint32_t a[4], b[4];
          WidenNibbles<T>(u, a);
          WidenNibbles<T>(l, b);
          Apply({a[0], b[0], a[1], b[1]}, x, sums, fragment, 4 * word);
          Apply({a[2], b[2], a[3], b[3]}, x, sums, fragment, 4 * word + 2);
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

}  // namespace zenith::quantized_linear
