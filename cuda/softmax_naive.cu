// Oracle of softmax.cu: the formulas of ffi/kernels/softmax.h, one thread per row.
#include "cuda/core/convert.cuh"
#include "cuda/core/launch.h"
#include "cuda/naive.h"

namespace zenith::naive {
namespace {

constexpr int kThreads = 64;

template <typename T>
__global__ void softmax_forward_kernel(SoftmaxForwardArgs args) {
  const int64_t row = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (row >= args.rows) return;
  const T* gX = static_cast<const T*>(args.x) + row * args.cols;
  T* gY = static_cast<T*>(args.y) + row * args.cols;
  double max = ToFloat(gX[0]);
  for (int64_t c = 1; c < args.cols; ++c) max = fmax(max, ToFloat(gX[c]));
  double sum = 0;
  for (int64_t c = 0; c < args.cols; ++c) sum += exp(ToFloat(gX[c]) - max);
  for (int64_t c = 0; c < args.cols; ++c) {
    gY[c] = FromFloat<T>(static_cast<float>(exp(ToFloat(gX[c]) - max) / sum));
  }
}

template <typename T>
__global__ void softmax_backward_kernel(SoftmaxBackwardArgs args) {
  const int64_t row = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (row >= args.rows) return;
  const T* gY = static_cast<const T*>(args.y) + row * args.cols;
  const T* gDy = static_cast<const T*>(args.dy) + row * args.cols;
  T* gDx = static_cast<T*>(args.dx) + row * args.cols;
  double dot = 0;
  for (int64_t c = 0; c < args.cols; ++c) dot += double{ToFloat(gDy[c])} * ToFloat(gY[c]);
  for (int64_t c = 0; c < args.cols; ++c) {
    gDx[c] = FromFloat<T>(static_cast<float>(ToFloat(gY[c]) * (ToFloat(gDy[c]) - dot)));
  }
}

unsigned Blocks(int64_t rows) { return static_cast<unsigned>((rows + kThreads - 1) / kThreads); }

}  // namespace

Status SoftmaxForward(const SoftmaxForwardArgs& args, const Launch& launch) {
  if (args.rows == 0 || args.cols == 0) return {};
  return DispatchDType(args.dtype, [&]<typename T>() {
    softmax_forward_kernel<T><<<Blocks(args.rows), kThreads, 0, launch.stream>>>(args);
    return LastLaunch();
  });
}

Status SoftmaxBackward(const SoftmaxBackwardArgs& args, const Launch& launch) {
  if (args.rows == 0 || args.cols == 0) return {};
  return DispatchDType(args.dtype, [&]<typename T>() {
    softmax_backward_kernel<T><<<Blocks(args.rows), kThreads, 0, launch.stream>>>(args);
    return LastLaunch();
  });
}

}  // namespace zenith::naive
