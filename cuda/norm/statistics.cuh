// What the kernels of the norms' gradients share.
#pragma once

#include "ffi/kernels/norm.h"

namespace zenith::norm {

/// What one row's dx and its share of dscale need. With mean = mean_g = 0 both kinds are the same.
struct RowStatistics {
  float mean, rstd, mean_g, mean_g_xhat;

  /// `sums` holds sum((x - mean)^2) and sum(g * (x - mean)).
  __device__ __forceinline__ void Finish(const float (&sums)[2], float cols, float eps) {
    rstd = rsqrtf(sums[0] / cols + eps);
    mean_g_xhat = rstd * sums[1] / cols;
  }

  __device__ __forceinline__ float xhat(float x) const { return (x - mean) * rstd; }
  __device__ __forceinline__ float dx(float x, float g) const {
    return rstd * (g - mean_g - xhat(x) * mean_g_xhat);
  }
};

/// dy * scale, rounded. A product fused into g - mean(g) would leave its own rounding error there,
/// times rstd, where all g are equal.
__device__ __forceinline__ float G(float dy, float scale) { return __fmul_rn(dy, scale); }

}  // namespace zenith::norm
