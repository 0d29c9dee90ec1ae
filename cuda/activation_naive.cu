// Oracle of activation.cu, gated.cu and linear_backward.cu: the formulas of ffi/kernels/, one
// thread per element.
#include "cuda/core/convert.cuh"
#include "cuda/core/launch.h"
#include "cuda/naive.h"

namespace zenith::naive {
namespace {

constexpr int kThreads = 256;
constexpr double kSqrtHalf = 0.70710678118654752440;
constexpr double kSqrtTwoOverPi = 0.79788456080286535588;
constexpr double kInverseSqrtTwoPi = 0.39894228040143267794;

/// f(x) and f'(x); at +-infinity their limits, but for f(-inf): NaN.
struct Point {
  double value, derivative;
};

__device__ Point Evaluate(Activation kind, double x) {
  if (isinf(x)) return x > 0 ? Point{x, 1} : Point{nan(""), 0};
  switch (kind) {
    case Activation::kGeluErf: {
      const double cumulative = erfc(-x * kSqrtHalf) / 2;
      return {x * cumulative, cumulative + x * kInverseSqrtTwoPi * exp(-x * x / 2)};
    }
    case Activation::kGeluTanh: {
      // (1 + tanh(w)) / 2 = 1 / (1 + exp(-2 w)): 1 + tanh(w) has no digits left from w = -19 on.
      const double w = kSqrtTwoOverPi * (x + 0.044715 * x * x * x);
      const double slope = kSqrtTwoOverPi * (1 + 3 * 0.044715 * x * x);
      const double cumulative = 1 / (1 + exp(-2 * w));
      return {x * cumulative, cumulative + 2 * x * cumulative * (1 - cumulative) * slope};
    }
    case Activation::kSilu: {
      const double sigmoid = 1 / (1 + exp(-x));
      return {x * sigmoid, sigmoid * (1 + x * (1 - sigmoid))};
    }
  }
  return {};
}

template <typename T>
__global__ void activation_forward_kernel(ActivationForwardArgs args) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= args.size) return;
  const double x = ToFloat(static_cast<const T*>(args.x)[i]);
  static_cast<T*>(args.y)[i] = FromFloat<T>(static_cast<float>(Evaluate(args.kind, x).value));
}

template <typename T>
__global__ void activation_backward_kernel(ActivationBackwardArgs args) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= args.size) return;
  const double x = ToFloat(static_cast<const T*>(args.x)[i]);
  const double dy = ToFloat(static_cast<const T*>(args.dy)[i]);
  static_cast<T*>(args.dx)[i] =
      FromFloat<T>(static_cast<float>(dy * Evaluate(args.kind, x).derivative));
}

template <typename T>
__global__ void gated_forward_kernel(GatedForwardArgs args) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= args.rows * args.cols) return;
  const int64_t at = i / args.cols * args.stride + i % args.cols;
  const double gate = ToFloat(static_cast<const T*>(args.gate)[at]);
  const double value = ToFloat(static_cast<const T*>(args.value)[at]);
  static_cast<T*>(args.y)[i] =
      FromFloat<T>(static_cast<float>(Evaluate(args.kind, gate).value * value));
}

template <typename T>
__global__ void gated_backward_kernel(GatedBackwardArgs args) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= args.rows * args.cols) return;
  const int64_t at = i / args.cols * args.stride + i % args.cols;
  const Point point = Evaluate(args.kind, ToFloat(static_cast<const T*>(args.gate)[at]));
  const double value = ToFloat(static_cast<const T*>(args.value)[at]);
  const double dy = ToFloat(static_cast<const T*>(args.dy)[i]);
  static_cast<T*>(args.dgate)[at] = FromFloat<T>(static_cast<float>(dy * value * point.derivative));
  static_cast<T*>(args.dvalue)[at] = FromFloat<T>(static_cast<float>(dy * point.value));
}

/// One thread per column of a group.
template <typename T>
__global__ void linear_backward_kernel(LinearBackwardArgs args) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= args.groups * args.n) return;
  const int64_t first = i / args.n * args.rows_per_group * args.n + i % args.n;
  double sum = 0;
  for (int64_t row = 0; row < args.rows_per_group; ++row) {
    const int64_t at = first + row * args.n;
    const double pre = ToFloat(static_cast<const T*>(args.pre)[at]);
    const double dpre =
        ToFloat(static_cast<const T*>(args.dy)[at]) * Evaluate(args.kind, pre).derivative;
    static_cast<T*>(args.dpre)[at] = FromFloat<T>(static_cast<float>(dpre));
    sum += dpre;
  }
  args.dbias[i] = static_cast<float>(sum);
}

unsigned Blocks(int64_t size) { return static_cast<unsigned>((size + kThreads - 1) / kThreads); }

}  // namespace

Status ActivationForward(const ActivationForwardArgs& args, const Launch& launch) {
  if (args.size == 0) return {};
  return DispatchDType(args.dtype, [&]<typename T>() {
    activation_forward_kernel<T><<<Blocks(args.size), kThreads, 0, launch.stream>>>(args);
    return LastLaunch();
  });
}

Status ActivationBackward(const ActivationBackwardArgs& args, const Launch& launch) {
  if (args.size == 0) return {};
  return DispatchDType(args.dtype, [&]<typename T>() {
    activation_backward_kernel<T><<<Blocks(args.size), kThreads, 0, launch.stream>>>(args);
    return LastLaunch();
  });
}

Status GatedForward(const GatedForwardArgs& args, const Launch& launch) {
  const int64_t size = args.rows * args.cols;
  if (size == 0) return {};
  return DispatchDType(args.dtype, [&]<typename T>() {
    gated_forward_kernel<T><<<Blocks(size), kThreads, 0, launch.stream>>>(args);
    return LastLaunch();
  });
}

Status GatedBackward(const GatedBackwardArgs& args, const Launch& launch) {
  const int64_t size = args.rows * args.cols;
  if (size == 0) return {};
  return DispatchDType(args.dtype, [&]<typename T>() {
    gated_backward_kernel<T><<<Blocks(size), kThreads, 0, launch.stream>>>(args);
    return LastLaunch();
  });
}

Status LinearBackward(const LinearBackwardArgs& args, const Launch& launch) {
  const int64_t size = args.groups * args.n;
  if (size == 0) return {};
  return DispatchDType(args.dtype, [&]<typename T>() {
    linear_backward_kernel<T><<<Blocks(size), kThreads, 0, launch.stream>>>(args);
    return LastLaunch();
  });
}

}  // namespace zenith::naive
