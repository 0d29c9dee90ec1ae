// Contract of the elementwise activation kernels, the same for every back end.
#pragma once

#include <cstdint>

#include "ffi/kernels/types.h"

namespace zenith {

/// Hendrycks and Gimpel 2016, arXiv:1606.08415 (both GELUs and, under another name, SiLU).
enum class Activation : int32_t {
  kGeluErf = 0,   // x/2 * (1 + erf(x/sqrt(2)))
  kGeluTanh = 1,  // x/2 * (1 + tanh(sqrt(2/pi) * (x + 0.044715 x^3)))
  kSilu = 2,      // x / (1 + exp(-x))
};

/// x, y: (size,) dense, `dtype`; float32 inside. NaN in, NaN out; inf gives inf, and -inf
/// NaN, as -inf * 0 does in JAX's formulas.
struct ActivationForwardArgs {
  Activation kind;
  DType dtype;
  int64_t size;
  const void* x;
  void* y;
};
Status ActivationForward(const ActivationForwardArgs& args, const Launch& launch);

/// dx = dy * f'(x).
struct ActivationBackwardArgs {
  Activation kind;
  DType dtype;
  int64_t size;
  const void *x, *dy;
  void* dx;
};
Status ActivationBackward(const ActivationBackwardArgs& args, const Launch& launch);

}  // namespace zenith
