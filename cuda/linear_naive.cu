// Oracle of linear.cu: the formulas of ffi/kernels/linear.h, one thread per element of y.
#include "cuda/core/convert.cuh"
#include "cuda/core/launch.h"
#include "cuda/naive.h"

namespace zenith::naive {
namespace {

constexpr int kThreads = 128;

__device__ double Value(Epilogue epilogue, double x) {
  switch (epilogue) {
    case Epilogue::kNone:
      return x;
    case Epilogue::kRelu:
      return x < 0 ? 0 : x;
    case Epilogue::kReluSquared:
      return x < 0 ? 0 : x * x;
    case Epilogue::kTanh:
      return tanh(x);
    case Epilogue::kSilu:
      return x / (1 + exp(-x));
    case Epilogue::kGeluTanh:
      return x / (1 + exp(-2 * 0.7978845608028654 * (x + 0.044715 * x * x * x)));
    case Epilogue::kGeluErf:
      return x / 2 * erfc(-x * 0.7071067811865476);
  }
  return NAN;
}

__device__ bool IsTransposed(const LinearForwardArgs& args) {
  return args.layout == WeightLayout::kColumns;
}
__device__ bool IsTransposed(const GatedLinearForwardArgs& args) { return args.transposed; }

/// Element (row, col) of x w.
template <typename T, typename Args>
__device__ double Product(const Args& args, const void* w, int64_t row, int64_t col) {
  const T* gX = static_cast<const T*>(args.x) + row * args.k;
  const T* gW = static_cast<const T*>(w);
  const bool transposed = IsTransposed(args);
  double sum = 0;
  for (int64_t i = 0; i < args.k; ++i)
    sum += double{ToFloat(gX[i])} * ToFloat(gW[transposed ? col * args.k + i : i * args.n + col]);
  return sum;
}

template <typename T>
__global__ void linear_forward_kernel(LinearForwardArgs args) {
  const int64_t index = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (index >= args.rows * args.n) return;
  const int64_t row = index / args.n, col = index % args.n;
  const double bias = args.bias_dtype == DType::kF32
                          ? static_cast<const float*>(args.bias)[col]
                          : ToFloat(static_cast<const T*>(args.bias)[col]);
  const double sum = bias + Product<T>(args, args.w, row, col);
  if (args.pre != nullptr) static_cast<T*>(args.pre)[index] = FromFloat<T>(static_cast<float>(sum));
  double y = Value(args.epilogue, sum);
  if (args.residual != nullptr) y += ToFloat(static_cast<const T*>(args.residual)[index]);
  static_cast<T*>(args.y)[index] = FromFloat<T>(static_cast<float>(y));
}

template <typename T>
__global__ void gated_linear_forward_kernel(GatedLinearForwardArgs args) {
  const int64_t index = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (index >= args.rows * args.n) return;
  const int64_t row = index / args.n, col = index % args.n;
  const double gate = Product<T>(args, args.w_gate, row, col);
  const double value = Product<T>(args, args.w_value, row, col);
  const auto store = [&](void* array, double result) {
    if (array != nullptr) static_cast<T*>(array)[index] = FromFloat<T>(static_cast<float>(result));
  };
  store(args.y, Value(args.epilogue, gate) * value);
  store(args.gate, gate);
  store(args.value, value);
}

}  // namespace

Status LinearForward(const LinearForwardArgs& args, const Launch& launch) {
  if (args.rows == 0 || args.n == 0) return {};
  const auto blocks = static_cast<unsigned>((args.rows * args.n + kThreads - 1) / kThreads);
  return DispatchDType(args.dtype, [&]<typename T>() {
    linear_forward_kernel<T><<<blocks, kThreads, 0, launch.stream>>>(args);
    return LastLaunch();
  });
}

Status GatedLinearForward(const GatedLinearForwardArgs& args, const Launch& launch) {
  if (args.rows == 0 || args.n == 0) return {};
  const auto blocks = static_cast<unsigned>((args.rows * args.n + kThreads - 1) / kThreads);
  return DispatchDType(args.dtype, [&]<typename T>() {
    gated_linear_forward_kernel<T><<<blocks, kThreads, 0, launch.stream>>>(args);
    return LastLaunch();
  });
}

}  // namespace zenith::naive
