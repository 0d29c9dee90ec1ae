// Gradients of norms of rows longer than a block holds, on Hopper: cuda/core/long_rows.cuh. The
// contract is ffi/kernels/norm.h.
//
// Each block sends its part's mean, sum of g, and the sums of (x - mean)^2 and g * (x - mean) about
// that mean; those about the row's mean follow (Chan, Golub and LeVeque 1979), so that one exchange
// a row is enough and nothing cancels.
#include "cuda/core/long_rows.cuh"
#include "cuda/norm/kernels.h"
#include "cuda/norm/statistics.cuh"

namespace zenith::norm {
namespace {

using long_rows::BlockSum;
using long_rows::kVectors;
using long_rows::Plan;
using long_rows::Slice;

template <typename T, typename P>
class Backward {
 public:
  using Element = T;
  using Contract = NormBackwardArgs;
  using Args = long_rows::Args<Contract>;
  using Rows = long_rows::Rows<T>;
  static constexpr int kSize = kVectorSize<T>;

  static __device__ const void* Array(const Contract& args, int i) {
    return i == 0 ? args.x : args.dy;
  }
  static __host__ __device__ const void* Late(const Contract& args) { return args.dsum; }

  __device__ __forceinline__ Backward(const Args& args, const Slice& slice)
      : args_(args), slice_(slice) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (!slice.has(i)) continue;
      scale_[i] = LoadReadOnly<kSize>(static_cast<const P*>(args.scale) + slice.in_row(i) * kSize);
    }
  }

  __device__ __forceinline__ float4 Sums(const Rows& rows, BlockSum& sum) {
    float4 result = {};
    if (args_.kind == NormKind::kLayer) {
      float2 sums = {};  // of x and g
      ForEach(rows, [&](int, const float (&x)[kSize], const float (&dy)[kSize],
                        const float (&scale)[kSize]) {
#pragma unroll
        for (int j = 0; j < kSize; ++j) {
          sums.x += x[j];
          sums.y += G(dy[j], scale[j]);
        }
      });
      sums = sum(sums);
      result.x = sums.x / static_cast<float>(slice_.vectors * kSize);
      result.y = sums.y;
    }
    float2 sums = {};
    ForEach(rows, [&](int, const float (&x)[kSize], const float (&dy)[kSize],
                      const float (&scale)[kSize]) {
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        const float centred = x[j] - result.x;
        sums.x += centred * centred;
        sums.y += G(dy[j], scale[j]) * centred;
      }
    });
    sums = sum(sums);
    result.z = sums.x;
    result.w = sums.y;
    return result;
  }

  __device__ __forceinline__ void Finish(const Rows& rows, const float4* sSums, int64_t row) {
    const float cols = static_cast<float>(args_.cols);
    const auto part = [&](int rank) {
      return static_cast<float>(args_.plan.part_of(rank) * kSize);
    };
    RowStatistics statistics = {};
    float sums[2] = {};
    for (int b = 0; b < args_.plan.blocks; ++b) {
      statistics.mean += sSums[b].x * part(b);
      statistics.mean_g += sSums[b].y;
    }
    statistics.mean /= cols;
    statistics.mean_g /= cols;
    for (int b = 0; b < args_.plan.blocks; ++b) {
      const float4 block = sSums[b];
      const float shift = block.x - statistics.mean;
      sums[0] += block.z + part(b) * shift * shift;
      sums[1] += block.w + block.y * shift;
    }
    statistics.Finish(sums, cols, args_.eps);

    T* gDx = static_cast<T*>(args_.dx) + row * args_.cols;
    ForEach(rows, [&](int i, const float (&x)[kSize], const float (&dy)[kSize],
                      const float (&scale)[kSize]) {
      float dx[kSize];
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        dx[j] = statistics.dx(x[j], G(dy[j], scale[j]));
        dscale_[i][j] += dy[j] * statistics.xhat(x[j]);
        dbias_[i][j] += dy[j];
      }
      if (args_.dsum != nullptr) {
        float dsum[kSize];
        ToFloat(rows.LoadLate(slice_.at(i)), dsum);
#pragma unroll
        for (int j = 0; j < kSize; ++j) dx[j] += dsum[j];
      }
      StoreVector(gDx + slice_.in_row(i) * kSize, FromFloat<T>(dx));
    });
  }

  __device__ __forceinline__ void End(int64_t group) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (!slice_.has(i)) continue;
      const int64_t out = group * args_.cols + slice_.in_row(i) * kSize;
      StoreVector(args_.dscale + out, FromFloat<float>(dscale_[i]));
      if (args_.dbias != nullptr) StoreVector(args_.dbias + out, FromFloat<float>(dbias_[i]));
    }
  }

 private:
  /// body(i, x, dy, scale) for each of the thread's vectors.
  template <typename Body>
  __device__ __forceinline__ void ForEach(const Rows& rows, Body&& body) {
    rows.ForEach(slice_, [&](int i, const float (&x)[kSize], const float (&dy)[kSize]) {
      float scale[kSize];
      ToFloat(scale_[i], scale);
      body(i, x, dy, scale);
      ForgetFloats(scale_[i]);
    });
  }

  const Args& args_;
  const Slice slice_;
  Vector<P, kSize> scale_[kVectors];
  float dscale_[kVectors][kSize] = {}, dbias_[kVectors][kSize] = {};
};

}  // namespace

Status HopperBackward(const NormBackwardArgs& args, const Launch& launch) {
  return DispatchDTypes(args.dtype, args.param_dtype, [&]<typename T, typename P>() {
    const Plan plan(args.rows, args.groups, args.cols / kVectorSize<T>);
    return long_rows::LaunchLongRows<Backward<T, P>>(args, plan, args.batch, launch);
  });
}

}  // namespace zenith::norm
