// Oracle of group_norm_forward.cu and group_norm_backward.cu: the formulas of
// ffi/kernels/group_norm.h, group by group.
#include "cuda/core/convert.cuh"
#include "cuda/core/launch.h"
#include "cuda/naive.h"

namespace zenith::naive {
namespace {

constexpr int kThreads = 32;

template <typename P>
__device__ double At(const void* gValues, int64_t i) {
  return ToFloat(static_cast<const P*>(gValues)[i]);
}

/// Of silu(z) = z / (1 + exp(-z)).
__device__ double Silu(double z) { return z / (1 + exp(-z)); }
__device__ double SiluDerivative(double z) {
  const double s = 1 / (1 + exp(-z));
  return s + z * s * (1 - s);
}

/// One group of one sample, a thread's.
struct Group {
  GroupNormShape shape;
  int64_t sample, group;

  __device__ bool exists() const { return sample < shape.samples; }
  __device__ int64_t channel(int64_t k) const { return group * shape.channels + k; }
  __device__ int64_t at(int64_t row, int64_t k) const {
    return sample * shape.sample_size() +
           (shape.channels_last ? row * shape.width() + channel(k) : channel(k) * shape.rows + row);
  }
  __device__ int64_t statistic() const { return sample * shape.groups + group; }
  __device__ double size() const { return static_cast<double>(shape.rows * shape.channels); }
  template <typename Body>
  __device__ void ForEach(Body&& body) const {
    for (int64_t row = 0; row < shape.rows; ++row) {
      for (int64_t k = 0; k < shape.channels; ++k) body(at(row, k), channel(k));
    }
  }
};

__device__ Group OwnGroup(const GroupNormShape& shape) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  return {shape, i / shape.groups, i % shape.groups};
}

template <typename T, typename P>
__global__ void group_norm_forward_kernel(GroupNormForwardArgs args) {
  const Group group = OwnGroup(args.shape);
  if (!group.exists()) return;
  double mean = 0, variance = 0;
  group.ForEach([&](int64_t i, int64_t) { mean += At<T>(args.x, i) / group.size(); });
  group.ForEach([&](int64_t i, int64_t) {
    variance += (At<T>(args.x, i) - mean) * (At<T>(args.x, i) - mean) / group.size();
  });
  const double rstd = 1 / sqrt(variance + args.eps);
  args.mean[group.statistic()] = static_cast<float>(mean);
  args.rstd[group.statistic()] = static_cast<float>(rstd);
  group.ForEach([&](int64_t i, int64_t c) {
    const double z = (At<T>(args.x, i) - mean) * rstd * At<P>(args.scale, c) + At<P>(args.bias, c);
    static_cast<T*>(args.y)[i] = FromFloat<T>(static_cast<float>(args.silu ? Silu(z) : z));
  });
}

template <typename T, typename P>
__global__ void group_norm_backward_kernel(GroupNormBackwardArgs args) {
  const Group group = OwnGroup(args.shape);
  if (!group.exists()) return;
  const double mean = args.mean[group.statistic()], rstd = args.rstd[group.statistic()];
  const auto xhat = [&](int64_t i) { return (At<T>(args.x, i) - mean) * rstd; };
  const auto dz = [&](int64_t i, int64_t c) {
    const double z = xhat(i) * At<P>(args.scale, c) + At<P>(args.bias, c);
    return At<T>(args.dy, i) * (args.silu ? SiluDerivative(z) : 1.0);
  };
  double mean_g = 0, mean_g_xhat = 0;
  for (int64_t k = 0; k < args.shape.channels; ++k) {
    const int64_t c = group.channel(k);
    double products = 0, sum = 0;
    for (int64_t row = 0; row < args.shape.rows; ++row) {
      products += dz(group.at(row, k), c) * xhat(group.at(row, k));
      sum += dz(group.at(row, k), c);
    }
    args.dscale[group.sample * args.shape.width() + c] = static_cast<float>(products);
    args.dbias[group.sample * args.shape.width() + c] = static_cast<float>(sum);
    mean_g += At<P>(args.scale, c) * sum / group.size();
    mean_g_xhat += At<P>(args.scale, c) * products / group.size();
  }
  group.ForEach([&](int64_t i, int64_t c) {
    const double dx = rstd * (dz(i, c) * At<P>(args.scale, c) - mean_g - xhat(i) * mean_g_xhat);
    static_cast<T*>(args.dx)[i] = FromFloat<T>(static_cast<float>(dx));
  });
}

unsigned Blocks(const GroupNormShape& shape) {
  return static_cast<unsigned>((shape.samples * shape.groups + kThreads - 1) / kThreads);
}

}  // namespace

Status GroupNormForward(const GroupNormForwardArgs& args, const Launch& launch) {
  if (args.shape.samples * args.shape.groups == 0) return {};
  return DispatchDTypes(args.dtype, args.param_dtype, [&]<typename T, typename P>() {
    group_norm_forward_kernel<T, P><<<Blocks(args.shape), kThreads, 0, launch.stream>>>(args);
    return LastLaunch();
  });
}

Status GroupNormBackward(const GroupNormBackwardArgs& args, const Launch& launch) {
  if (args.shape.samples * args.shape.groups == 0) return {};
  return DispatchDTypes(args.dtype, args.param_dtype, [&]<typename T, typename P>() {
    group_norm_backward_kernel<T, P><<<Blocks(args.shape), kThreads, 0, launch.stream>>>(args);
    return LastLaunch();
  });
}

}  // namespace zenith::naive
