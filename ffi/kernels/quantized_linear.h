// Contract of the linear layer with integer weights (weight-only quantisation).
#pragma once

#include <cstdint>

#include "ffi/kernels/types.h"

namespace zenith {

/// y = x (w * scale) + bias; float32 inside, rounded once.
///
/// x: (rows, k), y: (rows, n), row-major, `dtype`. w: (k, n) or, if `transposed`, (n, k), row-major
/// integers of `bits`, 8 or 4, two's complement; of 4 bits, element 2 i is the lower half of byte
/// i. scale: (groups, n), `param_dtype`: rows [i * k / groups, (i + 1) * k / groups) of w as (k, n)
/// have scale i. bias: (n,), `param_dtype`, or null. k, n and groups > 0, groups divides k, and of
/// 4 bits the number of elements in a row of w is even. y aliases no operand. param_dtype: `dtype`
/// or float32.
///
/// CUDA: float16 and bfloat16, at most kQuantizedRows rows; k / groups a multiple of 16, or of 64
/// if `transposed`; n of 16, or of 32 of 4 bits if not `transposed`; both up to 2^24; all arrays
/// begin at a multiple of 16 bytes.
struct QuantizedLinearArgs {
  DType dtype, param_dtype;
  int32_t bits;
  bool transposed;
  int64_t rows, k, n, groups;
  const void *x, *w, *scale, *bias;
  void* y;
};
inline constexpr int64_t kQuantizedRows = 16;
Status QuantizedLinear(const QuantizedLinearArgs& args, const Launch& launch);

}  // namespace zenith
