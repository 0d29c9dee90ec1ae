// Contract of the normalisation kernels, the same for every back end.
//
//   layer: y = (x - mean) * rstd * scale + bias,  mean = sum(x)/cols, rstd = 1/sqrt(sum((x -
//   mean)^2)/cols + eps) rms:   y = x * rrms * scale,                  rrms = 1/sqrt(sum(x^2)/cols
//   + eps)
//
// with x replaced by x + residual where a residual is given (the sum is rounded to `dtype` first,
// and that is what both the result `sum` and the normalisation see). Ba, Kiros and Hinton 2016,
// arXiv:1607.06450; Zhang and Sennrich 2019, arXiv:1910.07467.
#pragma once

#include <cstdint>

#include "ffi/kernels/types.h"

namespace zenith {

enum class NormKind : int32_t { kLayer = 0, kRms = 1 };

/// x, residual, y, sum: (rows, cols) dense, `dtype`. scale, bias: (cols,), `param_dtype`, which is
/// `dtype` or kF32. Statistics in float32; the variance is two-pass (mean first), never
/// E[x^2]-E[x]^2. residual and sum are given together or both null. bias is null for kRms. rows or
/// cols may be 0.
struct NormForwardArgs {
  NormKind kind;
  DType dtype, param_dtype;
  int64_t rows, cols;
  float eps;
  const void *x, *residual, *scale, *bias;
  void *y, *sum;
};
Status NormForward(const NormForwardArgs& args, const Launch& launch);

/// Cotangents. x is what was normalised (the sum, where there was a residual); statistics are
/// recomputed from it.
///   xhat = (x - mean) * rstd;  g = dy * scale
///   layer: dx = rstd * (g - mean(g) - xhat * mean(g * xhat));   rms: dx = rrms * (g - xhat *
///   mean(g * xhat)) dx += dsum where dsum is given (the cotangent that reached `sum` directly)
///   dscale[group] = sum over the group's rows of dy * xhat;  dbias[group] = sum of dy
/// x, dy, dsum, dx: (batch, rows, cols), `dtype`. dscale, dbias: (batch, groups, cols), float32;
/// the caller sums over groups, which keeps this deterministic and lets a sharded batch stay
/// sharded. Groups are runs of rows, as long as each other or one row longer. groups > 0. dbias is
/// null for kRms.
struct NormBackwardArgs {
  NormKind kind;
  DType dtype, param_dtype;
  int64_t batch, rows, groups, cols;
  float eps;
  const void *x, *scale, *dy, *dsum;
  void* dx;
  float *dscale, *dbias;
};
struct NormRows {  // first <= row < end, counted through the whole batch
  int64_t first, end;
};
/// Of the group `index` of all batch * groups.
constexpr NormRows RowsOfGroup(const NormBackwardArgs& args, int64_t index) {
  const int64_t before = index / args.groups * args.rows, group = index % args.groups;
  return {before + args.rows * group / args.groups, before + args.rows * (group + 1) / args.groups};
}
Status NormBackward(const NormBackwardArgs& args, const Launch& launch);

}  // namespace zenith
