// Contract of the group normalisation kernels, the same for every back end.
//
//   y = f((x - mean) * rstd * scale + bias),  mean and variance over the rows and the channels of a
//   group, rstd = 1/sqrt(variance + eps),  f the identity or silu
//
// Wu and He 2018, arXiv:1803.08494.
#pragma once

#include <cstdint>

#include "ffi/kernels/types.h"

namespace zenith {

/// Samples of rows x (groups x channels): rows are the positions of an image, all of them. In
/// memory a sample is (rows, groups, channels) where `channels_last`, else (groups, channels,
/// rows). Any size may be 0.
struct GroupNormShape {
  bool channels_last;
  int64_t samples, rows, groups, channels;

  constexpr int64_t width() const { return groups * channels; }
  constexpr int64_t sample_size() const { return rows * width(); }
};

/// x, y: `dtype`. scale, bias: (groups * channels,), `param_dtype`, which is `dtype` or kF32. mean,
/// rstd: (samples, groups), float32, for the backward pass. Statistics in float32 about a mean,
/// never E[x^2]-E[x]^2.
struct GroupNormForwardArgs {
  GroupNormShape shape;
  DType dtype, param_dtype;
  bool silu;
  float eps;
  const void *x, *scale, *bias;
  void* y;
  float *mean, *rstd;
};
Status GroupNormForward(const GroupNormForwardArgs& args, const Launch& launch);

/// Cotangents, with the forward pass's mean and rstd.
///   xhat = (x - mean) * rstd;  dz = dy * f'(xhat * scale + bias);  g = dz * scale
///   dx = rstd * (g - mean(g) - xhat * mean(g * xhat)), means over the group
///   dscale[sample] = sum over rows of dz * xhat;  dbias[sample] = sum over rows of dz
/// dscale, dbias: (samples, groups * channels), float32; the caller sums over samples, so that a
/// sharded batch stays sharded. Bit-reproducible.
struct GroupNormBackwardArgs {
  GroupNormShape shape;
  DType dtype, param_dtype;
  bool silu;
  const void *x, *scale, *bias, *dy;
  const float *mean, *rstd;
  void* dx;
  float *dscale, *dbias;
};
Status GroupNormBackward(const GroupNormBackwardArgs& args, const Launch& launch);

}  // namespace zenith
