// What the norms' forward kernels do to an element.
#pragma once

#include "cuda/core/convert.cuh"
#include "cuda/core/vector.cuh"
#include "ffi/kernels/norm.h"

namespace zenith::norm {

/// scale and bias of kSize neighbouring columns; a null bias is zeros, which change no bit that
/// matters (-0 + 0 = 0).
template <typename P, int kSize>
struct Affine {
  Vector<P, kSize> scale, bias;

  static __device__ __forceinline__ Affine Load(const NormForwardArgs& args, int64_t col) {
    Affine affine = {};
    affine.scale = LoadReadOnly<kSize>(static_cast<const P*>(args.scale) + col);
    if (args.bias != nullptr) {
      affine.bias = LoadReadOnly<kSize>(static_cast<const P*>(args.bias) + col);
    }
    return affine;
  }

  /// (x - mean) * rstd * scale + bias
  template <typename T>
  __device__ __forceinline__ Vector<T, kSize> Normalized(const Vector<T, kSize>& x, float mean,
                                                         float rstd) const {
    float values[kSize], scales[kSize], biases[kSize];
    ToFloat(x, values);
    ToFloat(scale, scales);
    ToFloat(bias, biases);
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
      values[j] = fmaf((values[j] - mean) * rstd, scales[j], biases[j]);
    }
    return FromFloat<T>(values);
  }
};

/// x + residual, rounded to T.
template <typename T, int kSize>
__device__ __forceinline__ Vector<T, kSize> Sum(const Vector<T, kSize>& x,
                                                const Vector<T, kSize>& residual) {
  float x_values[kSize], residual_values[kSize];
  ToFloat(x, x_values);
  ToFloat(residual, residual_values);
#pragma unroll
  for (int j = 0; j < kSize; ++j) x_values[j] += residual_values[j];
  return FromFloat<T>(x_values);
}

}  // namespace zenith::norm
