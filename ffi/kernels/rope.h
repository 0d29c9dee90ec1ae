// Contract of the rotary position embedding kernel, the same for every back end. Su et al. 2021,
// arXiv:2104.09864.
#pragma once

#include <cstdint>

#include "ffi/kernels/types.h"

namespace zenith {

/// Which row of the tables a row of x is rotated by. x's rows are an array of `sizes`, the last
/// fastest; the row of the tables is the sum of index * stride, 0 along what the tables lack.
struct TableRows {
  static constexpr int kRank = 4;
  int64_t sizes[kRank], strides[kRank];
};

/// Rotates pairs of the first `features` columns (an even number) of each row of x, by coefficients
/// c and s; the columns after them are copied. With h = features / 2, pair j is
///
///   columns j and j + h, or 2 j and 2 j + 1 if `interleaved`;   (x0, x1) its elements:
///   y0 = x0 * c0 - x1 * s0,   y1 = x1 * c1 + x0 * s1;
///   transposed:   y0 = x0 * c0 + x1 * s1,   y1 = x1 * c1 - x0 * s0.
///
/// Rows of cos and sin have one coefficient for each pair (c0 = c1, s0 = s1) or, with
/// `whole_tables`, one for each column, in the order of x. x, y: (rows, cols) dense, of `dtype`; y
/// may be x. cos, sin: float32. Float32 inside, one rounding.
struct RopeArgs {
  DType dtype;
  bool interleaved, transposed, whole_tables;
  int64_t rows, cols, features;
  TableRows table_rows;
  const void* x;
  const float *cos, *sin;
  void* y;
};
Status Rope(const RopeArgs& args, const Launch& launch);

}  // namespace zenith
