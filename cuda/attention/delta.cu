// delta[b,h,t] = sum_e dout * out - dlse, which every backward kernel starts from.
#include "cuda/attention/kernels.h"
#include "cuda/attention/problem.cuh"
#include "cuda/core/vector.cuh"

namespace zenith::attention {
namespace {

constexpr int kThreads = 256;

/// kLanes lanes per query row, kElements elements per load; `out` and `dout` are read once.
template <typename T, int kLanes, int kElements>
__global__ void __launch_bounds__(kThreads)
    attention_delta_kernel(const __grid_constant__ AttentionBackwardArgs args) {
  const int64_t rows = args.batch * args.kv_heads * args.groups * args.q_len;
  const int64_t row = (int64_t{blockIdx.x} * kThreads + threadIdx.x) / kLanes;
  const int lane = threadIdx.x % kLanes;
  float sum = 0;
  if (row < rows) {  // no return: all lanes of the warp take part in the reduction
    const int64_t t = row % args.q_len;
    const HeadIndex head = HeadIndex::Of(args, row / args.q_len);
    const T* out =
        RowPointer(static_cast<const T*>(args.out), args.out_strides, head.batch, head.head, t);
    const T* dout =
        RowPointer(static_cast<const T*>(args.dout), args.out_strides, head.batch, head.head, t);
    for (int64_t e = lane * kElements; e < args.v_dim; e += kLanes * kElements) {
      float x[kElements], dx[kElements];
      ToFloat(LoadVector<kElements>(out + e), x);
      ToFloat(LoadVector<kElements>(dout + e), dx);
#pragma unroll
      for (int i = 0; i < kElements; ++i) sum += x[i] * dx[i];
    }
  }
  sum = WarpAllReduce<Add>(sum, kLanes);
  if (row < rows && lane == 0) args.delta[row] = args.dlse ? sum - args.dlse[row] : sum;
}

template <typename T, int kLanes, int kElements>
Status LaunchDelta(const AttentionBackwardArgs& args, int64_t rows, const Launch& launch) {
  constexpr int kRowsPerBlock = kThreads / kLanes;
  const auto blocks = static_cast<unsigned>((rows + kRowsPerBlock - 1) / kRowsPerBlock);
  attention_delta_kernel<T, kLanes, kElements><<<blocks, kThreads, 0, launch.stream>>>(args);
  return LastLaunch();
}

}  // namespace

Status RowDelta(const AttentionBackwardArgs& args, const Launch& launch) {
  const int64_t rows = args.batch * args.kv_heads * args.groups * args.q_len;
  if (rows == 0) return {};
  return DispatchDType(args.dtype, [&]<typename T>() {
    constexpr int kElements = kVectorSize<T>;
    // 8 lanes take one row of 64 features of 16 bits at once; 32 lanes would leave 24 idle.
    return args.v_dim % kElements == 0 && HasAlignedRows(args.out, args.out_strides, sizeof(T)) &&
                   HasAlignedRows(args.dout, args.out_strides, sizeof(T))
               ? LaunchDelta<T, 8, kElements>(args, rows, launch)
               : LaunchDelta<T, kWarpSize, 1>(args, rows, launch);
  });
}

}  // namespace zenith::attention
