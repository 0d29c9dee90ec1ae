// Register-blocked products of small float32 matrices that lie in cache.
//
//   acc[i, j] = sum_k A[i, k] * B[k, j]
//
// A is read one element at a time and broadcast, B and C by vectors of kLanes columns. So A needs
// no packing in either layout, and B and C rows are padded to whole vectors.
#pragma once

#include "ffi/cpu/simd.h"

namespace zenith::ZENITH_ISA {

/// Accumulators of the largest tile: kTileRows x kTileVectors registers, enough to hide the latency
/// of a fused product (8 with two ports and 4 cycles), and few enough to leave room for the vectors
/// of B and one element of A.
#if defined(ZENITH_AVX512) || defined(__aarch64__)
inline constexpr int kTileRows = 6, kTileVectors = 4;  // of 32 registers
#elif defined(ZENITH_AVX2)
inline constexpr int kTileRows = 6, kTileVectors = 2;  // of 16 registers
#else
inline constexpr int kTileRows = 4, kTileVectors = 2;  // of 16; products need one of their own
#endif

enum class ALayout {
  kRowMajor,  // A[i, k] = a[i * stride + k]
  kColMajor,  // A[i, k] = a[k * stride + i]
};

/// What becomes of acc.
enum class Update {
  kStore,     // c = acc
  kAdd,       // c = c + acc
  kScaleAdd,  // c = c * factor[j] + acc
};

struct GemmArgs {
  int64_t depth;
  const float* a;
  int64_t a_stride;
  const float* b;
  int64_t b_stride;
  float* c;
  int64_t c_stride;
  const float* factor = nullptr;
};

/// kRows rows from `row` on, kVectors vectors of columns from `column` on.
template <ALayout kLayout, Update kUpdate, int kRows, int kVectors>
ZENITH_INLINE void GemmTile(const GemmArgs& args, int64_t row, int64_t column) {
  const int64_t a_row = kLayout == ALayout::kRowMajor ? args.a_stride : 1;
  const int64_t a_step = kLayout == ALayout::kRowMajor ? 1 : args.a_stride;
  const float* a = args.a + row * a_row;
  const float* b = args.b + column;
  F32 acc[kRows][kVectors] = {};
  for (int64_t k = 0; k < args.depth; ++k) {
    F32 rb[kVectors];
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) rb[j] = Load(b + j * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const F32 ra = Splat(a[i * a_row]);
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; ++j) acc[i][j] = Fma(ra, rb[j], acc[i][j]);
    }
    a += a_step;
    b += args.b_stride;
  }
  float* const c = args.c + row * args.c_stride + column;
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) {
      float* const at = c + i * args.c_stride + j * kLanes;
      if constexpr (kUpdate == Update::kAdd) acc[i][j] += Load(at);
      if constexpr (kUpdate == Update::kScaleAdd) {
        acc[i][j] = Fma(Load(at), Load(args.factor + column + j * kLanes), acc[i][j]);
      }
      Store(at, acc[i][j]);
    }
  }
}

template <ALayout kLayout, Update kUpdate, int kVectors>
ZENITH_NOINLINE void GemmStrip(const GemmArgs& args, int64_t rows, int64_t column) {
  // Fewer vectors leave registers for more rows.
  constexpr int kRows = kVectors * 2 > kTileVectors ? kTileRows : 8;
  int64_t row = 0;
  for (; row + kRows <= rows; row += kRows) {
    GemmTile<kLayout, kUpdate, kRows, kVectors>(args, row, column);
  }
  if constexpr (kRows > 4) {
    if (row + 4 <= rows) {
      GemmTile<kLayout, kUpdate, 4, kVectors>(args, row, column);
      row += 4;
    }
  }
  if (row + 2 <= rows) {
    GemmTile<kLayout, kUpdate, 2, kVectors>(args, row, column);
    row += 2;
  }
  if (row < rows) GemmTile<kLayout, kUpdate, 1, kVectors>(args, row, column);
}

/// `rows` rows and `vectors` * kLanes columns.
template <ALayout kLayout, Update kUpdate>
void Gemm(int64_t rows, int64_t vectors, const GemmArgs& args) {
  int64_t v = 0;
  for (; v + kTileVectors <= vectors; v += kTileVectors) {
    GemmStrip<kLayout, kUpdate, kTileVectors>(args, rows, v * kLanes);
  }
  if constexpr (kTileVectors > 2) {
    if (vectors - v == 3) return GemmStrip<kLayout, kUpdate, 3>(args, rows, v * kLanes);
    if (vectors - v == 2) return GemmStrip<kLayout, kUpdate, 2>(args, rows, v * kLanes);
  }
  if (vectors - v == 1) GemmStrip<kLayout, kUpdate, 1>(args, rows, v * kLanes);
}

}  // namespace zenith::ZENITH_ISA
