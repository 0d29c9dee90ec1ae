// Contract of the softmax kernels: y = exp(x - max(x)) / sum(exp(x - max(x))) along the last axis.
#pragma once

#include <cstdint>

#include "ffi/kernels/types.h"

namespace zenith {

/// x, y: (rows, cols) dense, `dtype`; float32 inside. A row that is all -inf, or holds a NaN, gives
/// NaN. Milakov and Gimelshein 2018, arXiv:1805.02867.
struct SoftmaxForwardArgs {
  DType dtype;
  int64_t rows, cols;
  const void* x;
  void* y;
};
Status SoftmaxForward(const SoftmaxForwardArgs& args, const Launch& launch);

/// dx = y * (dy - sum(dy * y)). All (rows, cols), `dtype`.
struct SoftmaxBackwardArgs {
  DType dtype;
  int64_t rows, cols;
  const void *y, *dy;
  void* dx;
};
Status SoftmaxBackward(const SoftmaxBackwardArgs& args, const Launch& launch);

}  // namespace zenith
