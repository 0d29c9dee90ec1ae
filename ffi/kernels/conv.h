// Contract of the convolution: of images, channels last, with what follows it in its epilogue.
#pragma once

#include <cstdint>

#include "ffi/kernels/types.h"

namespace zenith {

/// Along one spatial axis. The first element of the filter lies on element -before of the image.
struct ConvAxis {
  int64_t size;    // of x
  int64_t out;     // of the convolution, as far as y is made of it: `pool` times that of y
  int64_t kernel;  // elements of the filter, `dilation` apart
  int64_t stride, dilation, before;
  int64_t pool = 1;  // pixels of the convolution, side by side, whose maximum one of y is
};

/// y = f(scale * conv(x, w) + bias + residual), f the identity or, with `relu`, max(., 0), which
/// keeps NaN; float32. With `pool` above 1 the maximum of each such window, NaN where it has one;
/// there is no residual then. Elements beyond the image are 0, and are multiplied with the filter.
/// x: (images, height, width, channels); w: (height.kernel, width.kernel, channels, features);
/// y and residual: (images, height.out / height.pool, width.out / width.pool, features); scale and
/// bias: (features,); all row-major. scale and residual may be null. Kernels and channels > 0. y
/// aliases no operand. CPU only.
struct ConvForwardArgs {
  bool relu;
  int64_t images, channels, features;
  ConvAxis height, width;
  const float *x, *w, *scale, *bias, *residual;
  float* y;
};
Status ConvForward(const ConvForwardArgs& args, const Launch& launch);

}  // namespace zenith
