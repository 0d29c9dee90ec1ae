// The gradient of a softmax of rows longer than a block holds, on Hopper: cuda/core/long_rows.cuh.
// The contract is ffi/kernels/softmax.h.
#include <algorithm>

#include "cuda/core/long_rows.cuh"
#include "cuda/softmax/kernels.h"

namespace zenith::softmax {
namespace {

using long_rows::BlockSum;
using long_rows::Plan;
using long_rows::Slice;

template <typename T>
class Backward {
 public:
  using Element = T;
  using Contract = SoftmaxBackwardArgs;
  using Args = long_rows::Args<Contract>;
  using Rows = long_rows::Rows<T>;
  static constexpr int kSize = kVectorSize<T>;

  static __device__ const void* Array(const Contract& args, int i) {
    return i == 0 ? args.y : args.dy;
  }
  static __host__ __device__ const void* Late(const Contract&) { return nullptr; }

  __device__ __forceinline__ Backward(const Args& args, const Slice& slice)
      : args_(args), slice_(slice) {}

  __device__ __forceinline__ float4 Sums(const Rows& rows, BlockSum& sum) {
    float dot = 0;
    rows.ForEach(slice_, [&](int, const float (&y)[kSize], const float (&dy)[kSize]) {
#pragma unroll
      for (int j = 0; j < kSize; ++j) dot += y[j] * dy[j];
    });
    return {sum({dot, 0}).x, 0, 0, 0};
  }

  __device__ __forceinline__ void Finish(const Rows& rows, const float4* sSums, int64_t row) {
    float dot = 0;
    for (int b = 0; b < args_.plan.blocks; ++b) dot += sSums[b].x;
    T* gDx = static_cast<T*>(args_.dx) + row * args_.cols;
    rows.ForEach(slice_, [&](int i, const float (&y)[kSize], const float (&dy)[kSize]) {
      float dx[kSize];
#pragma unroll
      for (int j = 0; j < kSize; ++j) dx[j] = y[j] * (dy[j] - dot);
      StoreVector(gDx + slice_.in_row(i) * kSize, FromFloat<T>(dx));
    });
  }

  __device__ __forceinline__ void End(int64_t) {}

 private:
  const Args& args_;
  const Slice slice_;
};

}  // namespace

Status HopperBackward(const SoftmaxBackwardArgs& args, const Launch& launch) {
  return DispatchDType(args.dtype, [&]<typename T>() {
    Plan plan(args.rows, 1, args.cols / kVectorSize<T>);
    plan.groups = std::min(args.rows, int64_t{long_rows::Clusters(plan.blocks)});
    return long_rows::LaunchLongRows<Backward<T>>(args, plan, 1, launch);
  });
}

}  // namespace zenith::softmax
