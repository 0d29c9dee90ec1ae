// Gated activations, forward and backward; the contract is ffi/kernels/gated.h.
#include "cuda/activation.cuh"
#include "cuda/core/convert.cuh"
#include "cuda/core/launch.h"
#include "cuda/core/vector.cuh"
#include "ffi/kernels/gated.h"

namespace zenith {
namespace {

constexpr int kThreads = 256;

/// Each thread takes kSize neighbours of a row; the grid covers `rows` x `pieces` of them. Columns
/// left over after the last whole vector do not exist: kSize is 1 where rows are no multiple of it.
struct Place {
  int64_t dense, strided;  // offsets of the elements in dense rows and in rows of `stride`
};
template <int kSize, typename Args>
__device__ __forceinline__ bool Locate(const Args& args, Place& place) {
  const int64_t pieces = args.cols / kSize;
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= args.rows * pieces) return false;
  const int64_t row = i / pieces, column = i % pieces * kSize;
  place = {row * args.cols + column, row * args.stride + column};
  return true;
}

/// gate and value are read once, y is written once.
template <Activation kKind, typename T, int kSize>
__global__ void __launch_bounds__(kThreads) gated_forward_kernel(GatedForwardArgs args) {
  Place at;
  if (!Locate<kSize>(args, at)) return;
  float gate[kSize], value[kSize];
  ToFloat(LoadReadOnly<kSize>(static_cast<const T*>(args.gate) + at.strided), gate);
  ToFloat(LoadReadOnly<kSize>(static_cast<const T*>(args.value) + at.strided), value);
#pragma unroll
  for (int j = 0; j < kSize; ++j) value[j] *= ActivationFunction<kKind, T>::Value(gate[j]);
  StoreVector(static_cast<T*>(args.y) + at.dense, FromFloat<T>(value));
}

/// gate, value and dy are read once, dgate and dvalue written once.
template <Activation kKind, typename T, int kSize>
__global__ void __launch_bounds__(kThreads) gated_backward_kernel(GatedBackwardArgs args) {
  using Function = ActivationFunction<kKind, T>;
  Place at;
  if (!Locate<kSize>(args, at)) return;
  float gate[kSize], value[kSize], dy[kSize];
  ToFloat(LoadReadOnly<kSize>(static_cast<const T*>(args.gate) + at.strided), gate);
  ToFloat(LoadReadOnly<kSize>(static_cast<const T*>(args.value) + at.strided), value);
  ToFloat(LoadReadOnly<kSize>(static_cast<const T*>(args.dy) + at.dense), dy);
#pragma unroll
  for (int j = 0; j < kSize; ++j) {
    value[j] *= dy[j] * Function::Derivative(gate[j]);
    dy[j] *= Function::Value(gate[j]);
  }
  StoreVector(static_cast<T*>(args.dgate) + at.strided, FromFloat<T>(value));
  StoreVector(static_cast<T*>(args.dvalue) + at.strided, FromFloat<T>(dy));
}

/// Calls `body.template operator()<kKind, T, kSize>(blocks)` with the widest vectors that every row
/// begins and ends with.
template <typename Args, typename Body, typename... Pointers>
Status Dispatch(const Args& args, Body&& body, const Pointers*... pointers) {
  if (args.rows == 0 || args.cols == 0) return {};
  return DispatchDType(args.dtype, [&]<typename T>() -> Status {
    const auto sized = [&]<Activation kKind, int kSize>() -> Status {
      const int64_t threads = args.rows * (args.cols / kSize);
      const int64_t blocks = (threads + kThreads - 1) / kThreads;
      if (blocks > 0x7fffffff) return {"more than 2^31 - 1 blocks"};
      body.template operator()<kKind, T, kSize>(static_cast<unsigned>(blocks));
      return LastLaunch();
    };
    const bool wide = AreAligned(pointers...) && args.cols % kVectorSize<T> == 0 &&
                      args.stride % kVectorSize<T> == 0;
    const auto of_kind = [&]<Activation kKind>() {
      return wide ? sized.template operator()<kKind, kVectorSize<T>>()
                  : sized.template operator()<kKind, 1>();
    };
    switch (args.kind) {
      case Activation::kGeluErf:
        return of_kind.template operator()<Activation::kGeluErf>();
      case Activation::kGeluTanh:
        return of_kind.template operator()<Activation::kGeluTanh>();
      case Activation::kSilu:
        return of_kind.template operator()<Activation::kSilu>();
    }
    return {"kind must be kGeluErf, kGeluTanh or kSilu"};
  });
}

}  // namespace

Status GatedForward(const GatedForwardArgs& args, const Launch& launch) {
  return Dispatch(
      args,
      [&]<Activation kKind, typename T, int kSize>(unsigned blocks) {
        gated_forward_kernel<kKind, T, kSize><<<blocks, kThreads, 0, launch.stream>>>(args);
      },
      static_cast<const char*>(args.gate), static_cast<const char*>(args.value),
      static_cast<const char*>(args.y));
}

Status GatedBackward(const GatedBackwardArgs& args, const Launch& launch) {
  return Dispatch(
      args,
      [&]<Activation kKind, typename T, int kSize>(unsigned blocks) {
        gated_backward_kernel<kKind, T, kSize><<<blocks, kThreads, 0, launch.stream>>>(args);
      },
      static_cast<const char*>(args.gate), static_cast<const char*>(args.value),
      static_cast<const char*>(args.dy), static_cast<const char*>(args.dgate),
      static_cast<const char*>(args.dvalue));
}

}  // namespace zenith
