// kLanes x kLanes transposes in registers, and the row gathers and scatters made of them.
//
// A "lane tile" holds one column per row of a source: tile[j * stride + r] = row r, element j. The
// attention kernels compute with queries in lanes, so that maxima and sums over keys need no step
// across lanes.
#pragma once

#include "ffi/cpu/simd.h"

namespace zenith::ZENITH_ISA {

template <int kStep, int... kI>
ZENITH_INLINE void ExchangeBlocks(F32& a, F32& b, std::integer_sequence<int, kI...>) {
  const F32 upper = __builtin_shufflevector(a, b, (kI & kStep ? kI - kStep + kLanes : kI)...);
  b = __builtin_shufflevector(a, b, (kI & kStep ? kI + kLanes : kI + kStep)...);
  a = upper;
}
template <int kStep>
ZENITH_INLINE void ExchangeAll(F32 (&rows)[kLanes]) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if ((i & kStep) == 0) ExchangeBlocks<kStep>(rows[i], rows[i + kStep], Lanes{});
  }
}
ZENITH_INLINE void Transpose(F32 (&rows)[kLanes]) {
  if constexpr (kLanes >= 16) ExchangeAll<8>(rows);
  if constexpr (kLanes >= 8) ExchangeAll<4>(rows);
  ExchangeAll<2>(rows);
  ExchangeAll<1>(rows);
}

/// tile[j * stride + r] = load(r, j, part)[...] for r < rows, j < cols: `load` gives kLanes
/// elements of row r from j on. Lanes from `rows` to the next multiple of kLanes become 0.
template <typename LoadRow>
ZENITH_INLINE void GatherLaneTile(int64_t rows, int64_t cols, float* tile, int64_t stride,
                                  LoadRow load) {
  for (int64_t first = 0; first < rows; first += kLanes) {
    ForVectors(cols, [&](int64_t j, auto part) {
      F32 block[kLanes];
      if (first + kLanes <= rows) {
#pragma GCC unroll 16
        for (int r = 0; r < kLanes; ++r) block[r] = load(first + r, j, part);
      } else {
#pragma GCC unroll 16
        for (int r = 0; r < kLanes; ++r) {
          block[r] = first + r < rows ? load(first + r, j, part) : F32{};
        }
      }
      Transpose(block);
      const int64_t count = Min(kLanes, cols - j);
#pragma GCC unroll 16
      for (int c = 0; c < kLanes; ++c) {
        if (c < count) Store(tile + (j + c) * stride + first, block[c]);
      }
    });
  }
}

/// store(r, j, tile[j.. * stride + r], part) for r < rows, j < cols: the reverse.
template <typename StoreRow>
ZENITH_INLINE void ScatterLaneTile(int64_t rows, int64_t cols, const float* tile, int64_t stride,
                                   StoreRow store) {
  for (int64_t first = 0; first < rows; first += kLanes) {
    ForVectors(cols, [&](int64_t j, auto part) {
      F32 block[kLanes];
      const int64_t count = Min(kLanes, cols - j);
#pragma GCC unroll 16
      for (int c = 0; c < kLanes; ++c) {
        block[c] = c < count ? Load(tile + (j + c) * stride + first) : F32{};
      }
      Transpose(block);
#pragma GCC unroll 16
      for (int r = 0; r < kLanes; ++r) {
        if (first + r < rows) store(first + r, j, block[r], part);
      }
    });
  }
}

}  // namespace zenith::ZENITH_ISA
