// Elementwise activations, forward and backward; the contract is ffi/kernels/activation.h.
#include "cuda/activation.cuh"
#include "cuda/core/convert.cuh"
#include "cuda/core/launch.h"
#include "cuda/core/vector.cuh"

namespace zenith {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocksPerSm = 2048 / kThreads;  // 32 registers a thread: no thread slot stays empty

/// Calls vector(i) for each 16-byte vector of the array and scalar(i) for each element left over,
/// which is all of them if the pointers are not aligned. Both indices count elements.
template <int kSize, typename VectorBody, typename ScalarBody>
__device__ __forceinline__ void ForEach(int64_t size, bool aligned, VectorBody&& vector,
                                        ScalarBody&& scalar) {
  const int64_t thread = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int64_t threads = int64_t{gridDim.x} * kThreads;
  const int64_t vectors_end = aligned ? size / kSize * kSize : 0;
  for (int64_t i = thread * kSize; i < vectors_end; i += threads * kSize) vector(i);
  for (int64_t i = vectors_end + thread; i < size; i += threads) scalar(i);
}

/// x is read once, y written once.
template <Activation kKind, typename T>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    activation_forward_kernel(ActivationForwardArgs args, bool aligned) {
  using Function = ActivationFunction<kKind, T>;
  const T* gX = static_cast<const T*>(args.x);
  T* gY = static_cast<T*>(args.y);
  const auto apply = [&]<int kSize>(int64_t i) {
    float values[kSize];
    ToFloat(LoadVector<kSize>(gX + i), values);
#pragma unroll
    for (float& value : values) value = Function::Value(value);
    StoreVector(gY + i, FromFloat<T>(values));
  };
  ForEach<kVectorSize<T>>(
      args.size, aligned, [&](int64_t i) { apply.template operator()<kVectorSize<T>>(i); },
      [&](int64_t i) { apply.template operator()<1>(i); });
}

/// x and dy are read once, dx written once.
template <Activation kKind, typename T>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    activation_backward_kernel(ActivationBackwardArgs args, bool aligned) {
  using Function = ActivationFunction<kKind, T>;
  const T* gX = static_cast<const T*>(args.x);
  const T* gDy = static_cast<const T*>(args.dy);
  T* gDx = static_cast<T*>(args.dx);
  const auto apply = [&]<int kSize>(int64_t i) {
    float x[kSize], dy[kSize];
    const Vector<T, kSize> x_vector = LoadVector<kSize>(gX + i);
    const Vector<T, kSize> dy_vector = LoadVector<kSize>(gDy + i);
    ToFloat(x_vector, x);
    ToFloat(dy_vector, dy);
#pragma unroll
    for (int j = 0; j < kSize; ++j) dy[j] *= Function::Derivative(x[j]);
    StoreVector(gDx + i, FromFloat<T>(dy));
  };
  ForEach<kVectorSize<T>>(
      args.size, aligned, [&](int64_t i) { apply.template operator()<kVectorSize<T>>(i); },
      [&](int64_t i) { apply.template operator()<1>(i); });
}

/// One vector a thread; the kernels' loop covers what a grid of 2^31 - 1 blocks cannot.
template <typename T>
unsigned Blocks(int64_t size) {
  constexpr int64_t kMaxBlocks = 0x7fffffff;
  constexpr int64_t kBlockElements = int64_t{kThreads} * kVectorSize<T>;
  const int64_t blocks = (size + kBlockElements - 1) / kBlockElements;
  return static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks);
}

/// Calls `body.template operator()<kKind, T>()`.
template <typename Body>
Status Dispatch(Activation kind, DType dtype, Body&& body) {
  return DispatchDType(dtype, [&]<typename T>() -> Status {
    switch (kind) {
      case Activation::kGeluErf:
        return body.template operator()<Activation::kGeluErf, T>();
      case Activation::kGeluTanh:
        return body.template operator()<Activation::kGeluTanh, T>();
      case Activation::kSilu:
        return body.template operator()<Activation::kSilu, T>();
    }
    return {"kind must be kGeluErf, kGeluTanh or kSilu"};
  });
}

}  // namespace

Status ActivationForward(const ActivationForwardArgs& args, const Launch& launch) {
  if (args.size == 0) return {};
  const bool aligned = AreAligned(args.x, args.y);
  return Dispatch(args.kind, args.dtype, [&]<Activation kKind, typename T>() {
    activation_forward_kernel<kKind, T>
        <<<Blocks<T>(args.size), kThreads, 0, launch.stream>>>(args, aligned);
    return LastLaunch();
  });
}

Status ActivationBackward(const ActivationBackwardArgs& args, const Launch& launch) {
  if (args.size == 0) return {};
  const bool aligned = AreAligned(args.x, args.dy, args.dx);
  return Dispatch(args.kind, args.dtype, [&]<Activation kKind, typename T>() {
    activation_backward_kernel<kKind, T>
        <<<Blocks<T>(args.size), kThreads, 0, launch.stream>>>(args, aligned);
    return LastLaunch();
  });
}

}  // namespace zenith
