// Oracle of cross_entropy.cu: the formulas of ffi/kernels/cross_entropy.h, one thread per row.
#include "cuda/core/convert.cuh"
#include "cuda/core/launch.h"
#include "cuda/naive.h"

namespace zenith::naive {
namespace {

constexpr int kThreads = 64;

template <typename T>
__global__ void cross_entropy_forward_kernel(CrossEntropyForwardArgs args) {
  const int64_t row = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (row >= args.rows) return;
  const T* gX = static_cast<const T*>(args.logits) + row * args.cols;
  double max = -INFINITY, sum = 0, total = 0;
  for (int64_t c = 0; c < args.cols; ++c) max = fmax(max, ToFloat(gX[c]));
  if (isinf(max)) max = 0;
  for (int64_t c = 0; c < args.cols; ++c) {
    sum += exp(ToFloat(gX[c]) - max);
    total += ToFloat(gX[c]);
  }
  const int64_t label = args.labels[row];
  args.lse[row] = static_cast<float>(max + log(sum));
  args.picked[row] = label >= 0 && label < args.cols ? ToFloat(gX[label]) : 0.0f;
  args.total[row] = static_cast<float>(total);
}

template <typename T>
__global__ void cross_entropy_backward_kernel(CrossEntropyBackwardArgs args) {
  const int64_t row = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (row >= args.rows) return;
  const T* gX = static_cast<const T*>(args.logits) + row * args.cols;
  T* gDx = static_cast<T*>(args.dlogits) + row * args.cols;
  for (int64_t c = 0; c < args.cols; ++c) {
    double dx = exp(double{ToFloat(gX[c])} - args.lse[row]) * args.dlse[row] + args.dtotal[row];
    if (c == args.labels[row]) dx += args.dpicked[row];
    gDx[c] = FromFloat<T>(static_cast<float>(dx));
  }
}

unsigned Blocks(int64_t rows) { return static_cast<unsigned>((rows + kThreads - 1) / kThreads); }

}  // namespace

Status CrossEntropyForward(const CrossEntropyForwardArgs& args, const Launch& launch) {
  if (args.rows == 0) return {};
  return DispatchDType(args.dtype, [&]<typename T>() {
    cross_entropy_forward_kernel<T><<<Blocks(args.rows), kThreads, 0, launch.stream>>>(args);
    return LastLaunch();
  });
}

Status CrossEntropyBackward(const CrossEntropyBackwardArgs& args, const Launch& launch) {
  if (args.rows == 0) return {};
  return DispatchDType(args.dtype, [&]<typename T>() {
    cross_entropy_backward_kernel<T><<<Blocks(args.rows), kThreads, 0, launch.stream>>>(args);
    return LastLaunch();
  });
}

}  // namespace zenith::naive
