// Oracle of norm_forward.cu and norm_backward.cu: the formulas of ffi/kernels/norm.h, row by row.
#include "cuda/core/convert.cuh"
#include "cuda/core/launch.h"
#include "cuda/naive.h"

namespace zenith::naive {
namespace {

constexpr int kThreads = 64;

struct Moments {
  double mean, rstd;
};

template <typename T>
__device__ Moments RowMoments(NormKind kind, const T* gX, int64_t cols, double eps) {
  double mean = 0;
  if (kind == NormKind::kLayer) {
    for (int64_t c = 0; c < cols; ++c) mean += ToFloat(gX[c]);
    mean /= static_cast<double>(cols);
  }
  double variance = 0;
  for (int64_t c = 0; c < cols; ++c) {
    variance += (ToFloat(gX[c]) - mean) * (ToFloat(gX[c]) - mean);
  }
  variance /= static_cast<double>(cols);
  return {mean, 1 / sqrt(variance + eps)};
}

/// One thread per row.
template <typename T, typename P>
__global__ void norm_forward_kernel(NormForwardArgs args) {
  const int64_t row = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (row >= args.rows) return;
  const T* gX = static_cast<const T*>(args.x) + row * args.cols;
  const P* gScale = static_cast<const P*>(args.scale);
  const P* gBias = static_cast<const P*>(args.bias);
  T* gY = static_cast<T*>(args.y) + row * args.cols;
  if (args.residual != nullptr) {
    const T* gResidual = static_cast<const T*>(args.residual) + row * args.cols;
    T* gSum = static_cast<T*>(args.sum) + row * args.cols;
    for (int64_t c = 0; c < args.cols; ++c) {
      gSum[c] = FromFloat<T>(ToFloat(gX[c]) + ToFloat(gResidual[c]));
    }
    gX = gSum;
  }
  const Moments moments = RowMoments(args.kind, gX, args.cols, args.eps);
  for (int64_t c = 0; c < args.cols; ++c) {
    const double xhat = (ToFloat(gX[c]) - moments.mean) * moments.rstd;
    const double bias = gBias == nullptr ? 0 : ToFloat(gBias[c]);
    gY[c] = FromFloat<T>(static_cast<float>(xhat * ToFloat(gScale[c]) + bias));
  }
}

/// One thread per group.
template <typename T, typename P>
__global__ void norm_backward_kernel(NormBackwardArgs args) {
  const int64_t group = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (group >= args.batch * args.groups) return;
  const P* gScale = static_cast<const P*>(args.scale);
  float* gDscale = args.dscale + group * args.cols;
  float* gDbias = args.dbias == nullptr ? nullptr : args.dbias + group * args.cols;
  for (int64_t c = 0; c < args.cols; ++c) {
    gDscale[c] = 0;
    if (gDbias != nullptr) gDbias[c] = 0;
  }
  const NormRows rows = RowsOfGroup(args, group);
  for (int64_t row = rows.first; row < rows.end; ++row) {
    const int64_t offset = row * args.cols;
    const T* gX = static_cast<const T*>(args.x) + offset;
    const T* gDy = static_cast<const T*>(args.dy) + offset;
    const T* gDsum = args.dsum == nullptr ? nullptr : static_cast<const T*>(args.dsum) + offset;
    T* gDx = static_cast<T*>(args.dx) + offset;
    const Moments moments = RowMoments(args.kind, gX, args.cols, args.eps);
    const auto xhat = [&](int64_t c) { return (ToFloat(gX[c]) - moments.mean) * moments.rstd; };
    const auto g = [&](int64_t c) { return double{ToFloat(gDy[c])} * ToFloat(gScale[c]); };
    double mean_g = 0, mean_g_xhat = 0;
    for (int64_t c = 0; c < args.cols; ++c) {
      if (args.kind == NormKind::kLayer) mean_g += g(c) / static_cast<double>(args.cols);
      mean_g_xhat += g(c) * xhat(c) / static_cast<double>(args.cols);
    }
    for (int64_t c = 0; c < args.cols; ++c) {
      const double dsum = gDsum == nullptr ? 0 : ToFloat(gDsum[c]);
      const double dx = moments.rstd * (g(c) - mean_g - xhat(c) * mean_g_xhat) + dsum;
      gDscale[c] += static_cast<float>(ToFloat(gDy[c]) * xhat(c));
      if (gDbias != nullptr) gDbias[c] += ToFloat(gDy[c]);
      gDx[c] = FromFloat<T>(static_cast<float>(dx));
    }
  }
}

unsigned Blocks(int64_t threads) {
  return static_cast<unsigned>((threads + kThreads - 1) / kThreads);
}

}  // namespace

Status NormForward(const NormForwardArgs& args, const Launch& launch) {
  if (args.rows == 0 || args.cols == 0) return {};
  return DispatchDTypes(args.dtype, args.param_dtype, [&]<typename T, typename P>() {
    norm_forward_kernel<T, P><<<Blocks(args.rows), kThreads, 0, launch.stream>>>(args);
    return LastLaunch();
  });
}

Status NormBackward(const NormBackwardArgs& args, const Launch& launch) {
  if (args.batch == 0 || args.cols == 0) return {};
  return DispatchDTypes(args.dtype, args.param_dtype, [&]<typename T, typename P>() {
    norm_backward_kernel<T, P>
        <<<Blocks(args.batch * args.groups), kThreads, 0, launch.stream>>>(args);
    return LastLaunch();
  });
}

}  // namespace zenith::naive
