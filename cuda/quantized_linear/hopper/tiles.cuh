// The two layouts of w on Hopper: what a warp multiplies of a stage that the copy engine has
// filled.
//
// The tensor cores' product is turned around, y' = w' x': w fills the 16 rows of a fragment, eight
// rows of x its 8 columns. In a fragment, r = lane / 4 and c = lane % 4. No weight is laid out
// anew: which k and which column an element of a fragment is, is free as long as x is loaded to
// match. A tile has
//   kStageK, kColumns         k and columns of a stage
//   kWBytes, kXBytes          of w, and of 8 rows of x, in a stage
//   kBoxBytes, kBoxRows       of w, a box of the copy engine, swizzled by kBoxBytes or not
//   kXBox                     elements of x in a row of a box, swizzled by as many bytes
//   kAccumulators             fragments of sums, 16 columns each
//   Lane                      a lane's places, worked out once
//   Multiply                  fragments += w' x', of a stage
//   Scales                    a lane's columns' scales, from shared memory
//   Store                     fragments to rows of sums
// Offsets are in bytes.
#pragma once

#include "cuda/core/mma.cuh"
#include "cuda/core/vector.cuh"
#include "cuda/quantized_linear/widen.cuh"

namespace zenith::quantized_linear {

template <typename Words>
__device__ __forceinline__ Words LoadWords(uint32_t shared) {
  Words words;
  if constexpr (Words::kWords == 4) {
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(words.words[0]), "=r"(words.words[1]), "=r"(words.words[2]),
                   "=r"(words.words[3])
                 : "r"(shared)
                 : "memory");
  } else if constexpr (Words::kWords == 1) {
    words.words[0] = LoadShared32(shared);
  } else {
    asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];\n"
                 : "=r"(words.words[0]), "=r"(words.words[1])
                 : "r"(shared)
                 : "memory");
  }
  return words;
}

/// Keeps a value in its register: the compiler would work out lanes' places anew in each step, 40
/// instructions beside 230.
__device__ __forceinline__ void Keep(uint32_t& value) { asm volatile("" : "+r"(value)); }

/// w (k, n): a lane multiplies 4 of 16 rows of k, an eighth of the columns of each. kStageK: 32 or
/// 64. kColumns: 64 or 128.
template <typename T, int kBits, int kStageK_, int kColumns_>
struct HopperRowTile {
  static constexpr int kStageK = kStageK_, kColumns = kColumns_, kAccumulators = kColumns / 16;
  static constexpr int kBoxBytes = kColumns * kBits / 8, kBoxRows = kStageK;
  static constexpr bool kSwizzled = kBoxBytes > 32;
  static constexpr int kWBytes = kBoxBytes * kBoxRows;
  static constexpr int kXBox = kStageK, kXBytes = 8 * kStageK * 2;
  using Words = Vector<uint32_t, kBoxBytes / 32>;

  __device__ static int BoxColumn(int, int column) { return column * kBits / 8; }
  __device__ static int BoxRow(int k, int) { return k; }

  /// Rows 2 c, 2 c + 1, 2 c + 8 and 2 c + 9 of 16. Half of the lanes have the rows of a pair
  /// exchanged: so none meet in a bank.
  struct Lane {
    uint32_t even, odd, select[2], x;
    __device__ explicit Lane(int lane) {
      const int r = lane / 4, c = lane % 4;
      const int exchanged = kBoxBytes == 128 ? 0 : kBoxBytes == 64 ? c % 2 : c / 2;
      even = (2 * c + exchanged) * kBoxBytes;
      even += kBoxBytes == 128  ? (r ^ 2 * c) * 16
              : kBoxBytes == 64 ? (r / 2 ^ c) * 16 + r % 2 * 8
                                : r * 4;
      odd = kBoxBytes == 128 ? (even ^ 16) + kBoxBytes : even ^ kBoxBytes;
      select[0] = exchanged == 0 ? 0x5410 : 0x1054;
      select[1] = exchanged == 0 ? 0x7632 : 0x3276;
      const int row = lane % 8;
      x = kStageK == 32 ? row * 64 + (lane / 8 ^ row / 2) * 16 : row * 128 + (lane / 8 ^ row) * 16;
      Keep(even), Keep(odd), Keep(x), Keep(select[0]), Keep(select[1]);
    }
  };

  template <int kTiles>
  __device__ static void Multiply(uint32_t gW, uint32_t gX, const Lane& lane,
                                  float (&sums)[kTiles][kAccumulators][4]) {
    uint32_t x[kTiles][4];
    const uint32_t odd = gW + lane.odd, even = gW + lane.even;
#pragma unroll
    for (int step = 0; step < kStageK / 16; ++step) {
      if (step % 2 == 0) {
#pragma unroll
        for (int t = 0; t < kTiles; ++t)
          LoadMatrix4(x[t], (gX + (step == 0 ? lane.x : lane.x ^ 64)) + t * kXBytes);
      }
      Words w[4];
#pragma unroll
      for (int i = 0; i < 4; ++i)
        w[i] = LoadWords<Words>((i % 2 == 0 ? even : odd) + (16 * step + i / 2 * 8) * kBoxBytes);
#pragma unroll
      for (int word = 0; word < Words::kWords; ++word)
#pragma unroll
        for (int part = 0; part < 2; ++part) {
          // Slots: row 2 c (2 c + 8) in the lower, the next in the upper half; two (four) columns.
          const uint32_t first = __byte_perm(w[0].words[word], w[1].words[word], lane.select[part]);
          const uint32_t second =
              __byte_perm(w[2].words[word], w[3].words[word], lane.select[part]);
          if constexpr (kBits == 8) {
            const uint32_t a[4] = {WidenByte<T>(first), WidenByte<T>(first >> 8),
                                   WidenByte<T>(second), WidenByte<T>(second >> 8)};
            Apply(a, x, sums, 2 * word + part, step);
          } else {
            uint32_t a[4], b[4];
            WidenNibbles<T>(first, a);
            WidenNibbles<T>(second, b);
            Apply({a[0], a[1], b[0], b[1]}, x, sums, 4 * word + 2 * part, step);
            Apply({a[2], a[3], b[2], b[3]}, x, sums, 4 * word + 2 * part + 1, step);
          }
        }
    }
  }
  template <int kTiles>
  __device__ static void Apply(const uint32_t (&a)[4], const uint32_t (&x)[kTiles][4],
                               float (&sums)[kTiles][kAccumulators][4], int fragment, int step) {
#pragma unroll
    for (int t = 0; t < kTiles; ++t)
      Mma16x8x16<T>(sums[t][fragment], a, x[t][step % 2 * 2], x[t][step % 2 * 2 + 1]);
  }

  template <typename P>
  __device__ static void Scales(const unsigned char* shared, int lane,
                                float (&scales)[kAccumulators][2]) {
    constexpr int kOfLane = kColumns / 8;
    const auto columns =
        LoadVector<kOfLane>(reinterpret_cast<const P*>(shared) + lane / 4 * kOfLane);
    float values[kOfLane];
    ToFloat(columns, values);
#pragma unroll
    for (int i = 0; i < kOfLane; ++i) scales[i / 2][i % 2] = values[i];
  }

  /// sums: of row 0 of the tile, rows `stride` apart; the first `rows` of them.
  __device__ static void Store(const float (&fragments)[kAccumulators][4], float* sums, int stride,
                               int rows, int lane) {
#pragma unroll
    for (int i = 0; i < 2; ++i)
      if (lane % 4 * 2 + i < rows)
#pragma unroll
        for (int a = 0; a < kAccumulators; a += 2)
          *reinterpret_cast<float4*>(sums + (lane % 4 * 2 + i) * stride +
                                     lane / 4 * (kColumns / 8) + 2 * a) = {
              fragments[a][i], fragments[a][i + 2], fragments[a + 1][i], fragments[a + 1][i + 2]};
  }
};

/// w (n, k): a lane multiplies 16 bytes along k of 8 columns.
template <typename T, int kBits>
struct HopperColumnTile {
  static constexpr int kStageK = 512 / kBits, kColumns = 64, kAccumulators = 4;
  static constexpr int kBoxBytes = 64, kBoxRows = kColumns;
  static constexpr bool kSwizzled = false;  // eight lanes read 128 bytes on end
  static constexpr int kWBytes = kBoxBytes * kBoxRows;
  static constexpr int kXBox = 64, kXBoxBytes = 8 * kXBox * 2;  // of 8 rows
  static constexpr int kXBoxes = kStageK / kXBox, kXBytes = kXBoxes * kXBoxBytes;
  static constexpr int kPairs = 64 / kBits;  // of x, that a lane multiplies of a row
  using Words = Vector<uint32_t, 4>;

  __device__ static int BoxColumn(int k, int) { return k * kBits / 8; }
  __device__ static int BoxRow(int, int column) { return column; }

  struct Lane {
    uint32_t w, x, row;
    __device__ explicit Lane(int lane) {
      w = lane * 16;
      row = lane / 4;
      // 8 or 16 pairs from 32 c or 64 c on, of rows of 128 bytes.
      x = row * 128;
      x += kBits == 8 ? 0 : lane % 4 / 2 * kXBoxBytes;
      chunk = kBits == 8 ? lane % 4 * 2 : lane % 2 * 4;
      Keep(w), Keep(x), Keep(row), Keep(chunk);
    }
    uint32_t chunk;
  };

  /// Pairs of neighbours as the widened weights have them: of bytes (0, 2), (1, 3) of each four, of
  /// nibbles (i, i + 4) of each eight.
  __device__ static void LoadX(uint32_t gX, const Lane& lane, uint32_t (&pairs)[kPairs]) {
    uint32_t row[kPairs];
#pragma unroll
    for (int i = 0; i < kPairs / 4; ++i) {
      const auto chunk =
          LoadWords<Vector<uint32_t, 4>>(gX + lane.x + ((lane.chunk + i) ^ lane.row) * 16);
#pragma unroll
      for (int j = 0; j < 4; ++j) row[4 * i + j] = chunk.words[j];
    }
    constexpr int kApart = kBits == 8 ? 1 : 2;  // words between the elements of a pair
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const int group = i / (2 * kApart) * (2 * kApart), at = i % (2 * kApart);
      const int word = group + at / 2;
      pairs[i] = __byte_perm(row[word], row[word + kApart], at % 2 == 0 ? 0x5410 : 0x7632);
    }
  }

  template <int kTiles>
  __device__ static void Multiply(uint32_t gW, uint32_t gX, const Lane& lane,
                                  float (&sums)[kTiles][kAccumulators][4]) {
    uint32_t x[kTiles][kPairs];
#pragma unroll
    for (int t = 0; t < kTiles; ++t) LoadX(gX + t * kXBoxBytes * kXBoxes, lane, x[t]);
#pragma unroll
    for (int fragment = 0; fragment < kAccumulators; ++fragment) {
      const Words upper = LoadWords<Words>(gW + lane.w + 2 * fragment * 512);
      const Words lower = LoadWords<Words>(gW + lane.w + (2 * fragment + 1) * 512);
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
  template <int kTiles>
  __device__ static void Apply(const uint32_t (&a)[4], const uint32_t (&x)[kTiles][kPairs],
                               float (&sums)[kTiles][kAccumulators][4], int fragment, int pair) {
#pragma unroll
    for (int t = 0; t < kTiles; ++t)
      Mma16x8x16<T>(sums[t][fragment], a, x[t][pair], x[t][pair + 1]);
  }

  template <typename P>
  __device__ static void Scales(const unsigned char* shared, int lane,
                                float (&scales)[kAccumulators][2]) {
#pragma unroll
    for (int i = 0; i < 2 * kAccumulators; ++i)
      scales[i / 2][i % 2] = ToFloat(reinterpret_cast<const P*>(shared)[8 * i + lane / 4]);
  }

  __device__ static void Store(const float (&fragments)[kAccumulators][4], float* sums, int stride,
                               int rows, int lane) {
#pragma unroll
    for (int a = 0; a < kAccumulators; ++a)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (lane % 4 * 2 + i % 2 < rows)
          sums[(lane % 4 * 2 + i % 2) * stride + 16 * a + i / 2 * 8 + lane / 4] = fragments[a][i];
  }
};

}  // namespace zenith::quantized_linear
