// Rotary position embeddings: each row read once, written once. See ffi/kernels/rope.h.
#pragma once

#include "ffi/cpu/parallel.h"
#include "ffi/kernels/rope.h"

namespace zenith::ZENITH_ISA {

/// 0, 0, 1, 1, 2, 2, ...: each of the first lanes twice.
template <int... kI>
ZENITH_INLINE F32 Doubled(F32 v, std::integer_sequence<int, kI...>) {
  return __builtin_shufflevector(v, v, (kI / 2)...);
}

/// -v in even lanes, v in odd ones.
ZENITH_INLINE F32 NegatedEven(F32 v) {
  return (F32)((I32)v ^ ((Iota() & SplatI(1)) == SplatI(0) ? SplatI(INT32_MIN) : I32{}));
}

/// Coefficients of the features [i, i + n) of a row, both of each pair. i and n are even.
ZENITH_INLINE F32 OfPairs(const float* table, int64_t i, Whole) {
  return Doubled(Load(table + i / 2, Part{kLanes / 2}), Lanes{});
}
ZENITH_INLINE F32 OfPairs(const float* table, int64_t i, Part part) {
  return Doubled(Load(table + i / 2, Part{part.n / 2}), Lanes{});
}

/// Columns j and j + h of one row; x, y and the tables start at column 0.
template <bool kTransposed, typename T>
ZENITH_INLINE void RotateHalves(int64_t h, int64_t second, const T* x, const float* cos,
                                const float* sin, T* y) {
  ForVectors(h, [=](int64_t j, auto part) {
    const F32 x0 = Load(x + j, part), x1 = Load(x + h + j, part);
    const F32 c0 = Load(cos + j, part), s0 = Load(sin + j, part);
    const F32 c1 = Load(cos + second + j, part), s1 = Load(sin + second + j, part);
    Store(y + j, kTransposed ? x0 * c0 + x1 * s1 : x0 * c0 - x1 * s0, part);
    Store(y + h + j, kTransposed ? x1 * c1 - x0 * s0 : x1 * c1 + x0 * s1, part);
  });
}

/// Columns 2 j and 2 j + 1 of one row.
template <bool kTransposed, typename T>
ZENITH_INLINE void RotatePairs(int64_t features, bool whole, const T* x, const float* cos,
                               const float* sin, T* y) {
  ForVectors(features, [=](int64_t i, auto part) {
    const F32 v = Load(x + i, part);
    const F32 c = whole ? Load(cos + i, part) : OfPairs(cos, i, part);
    const F32 s = whole ? Load(sin + i, part) : OfPairs(sin, i, part);
    // s0 is the coefficient of x1, and s1 of x0: of the transpose they change places.
    const F32 crossed = kTransposed ? Swap<1>(v * s, Lanes{}) : Swap<1>(v, Lanes{}) * s;
    Store(y + i, v * c + (kTransposed ? NegatedEven(-crossed) : NegatedEven(crossed)), part);
  });
}

/// Rows [first, last) of x.
template <bool kInterleaved, bool kTransposed, typename T>
ZENITH_NOINLINE void RotateRows(const RopeArgs& args, int64_t first, int64_t last) {
  const TableRows& map = args.table_rows;
  constexpr int kInner = TableRows::kRank - 1;
  const int64_t h = args.features / 2, width = args.whole_tables ? args.features : h;
  for (int64_t row = first; row < last;) {
    int64_t table_row = row % map.sizes[kInner] * map.strides[kInner];
    const int64_t end = Min(last, row - row % map.sizes[kInner] + map.sizes[kInner]);
    int64_t outer = row / map.sizes[kInner];
    for (int axis = kInner - 1; axis >= 0; --axis) {
      table_row += outer % map.sizes[axis] * map.strides[axis];
      outer /= map.sizes[axis];
    }
    for (; row < end; ++row, table_row += map.strides[kInner]) {
      const T* const x = static_cast<const T*>(args.x) + row * args.cols;
      T* const y = static_cast<T*>(args.y) + row * args.cols;
      const float* const cos = args.cos + table_row * width;
      const float* const sin = args.sin + table_row * width;
      if constexpr (kInterleaved) {
        RotatePairs<kTransposed>(args.features, args.whole_tables, x, cos, sin, y);
      } else {
        RotateHalves<kTransposed>(h, width - h, x, cos, sin, y);
      }
      ForVectors(args.cols - args.features, [=, &args](int64_t i, auto part) {
        Store(y + args.features + i, Load(x + args.features + i, part), part);
      });
    }
  }
}

inline Status Rope(const RopeArgs& args, const Launch& launch) {
  WithStorage(args.dtype, [&]<typename T>(T) {
    const auto run = [&]<bool kInterleaved, bool kTransposed>() {
      ForRows(launch, args.rows, args.cols, [=](int64_t first, int64_t last) {
        RotateRows<kInterleaved, kTransposed, T>(args, first, last);
      });
    };
    if (args.interleaved) {
      args.transposed ? run.template operator()<true, true>()
                      : run.template operator()<true, false>();
    } else {
      args.transposed ? run.template operator()<false, true>()
                      : run.template operator()<false, false>();
    }
  });
  return {};
}

}  // namespace zenith::ZENITH_ISA
