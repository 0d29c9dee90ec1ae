// NormForward of long rows, on Hopper: cuda/core/row_cluster.h. The contract is ffi/kernels/norm.h.
#include "cuda/core/cluster_team.cuh"
#include "cuda/core/row_cluster_launch.h"
#include "cuda/core/rows.cuh"
#include "cuda/norm/affine.cuh"
#include "cuda/norm/kernels.h"

namespace zenith::norm {
namespace {

constexpr int kVectors = 4;

/// As norm_forward_kernel (one source for both costs norms of up to 256 columns up to a quarter of
/// their time, by what the compiler spills), in 32 registers a thread (40 where parameters are
/// wide), 16 of them a row's.
template <typename T, typename P>
__global__ void __launch_bounds__(row_cluster::kThreads, kIsWidened<T, P> ? 3 : 4)
    norm_forward_cluster_kernel(NormForwardArgs args, int width) {
  constexpr int kSize = kVectorSize<T>;
  __shared__ ClusterTeam::Scratch scratch;
  ClusterTeam team(width, scratch);
  const int cols = static_cast<int>(args.cols);
  const int64_t row = team.row();
  const RowSlice<kSize> slice{cols, width, team.rank()};
  const T* gX = static_cast<const T*>(args.x) + row * cols;
  T* gY = static_cast<T*>(args.y) + row * cols;
  // Always; but then the compiler computes anew what it spilled without (97.6 us for 101.4 of 2730
  // x 24576 bfloat16s, H100, 11/2026).
  const bool has_row = row < args.rows;
  /// body(i) for each of the thread's vectors.
  const auto for_each = [&](auto&& body) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (has_row && slice.has(i)) body(i);
    }
  };

  Vector<T, kSize> x[kVectors];
  for_each([&](int i) { x[i] = LoadVector<kSize>(gX + slice.col(i)); });
  if (args.residual != nullptr) {
    const T* gResidual = static_cast<const T*>(args.residual) + row * cols;
    T* gSum = static_cast<T*>(args.sum) + row * cols;
    for_each([&](int i) { x[i] = Sum(x[i], LoadVector<kSize>(gResidual + slice.col(i))); });
    // A loop of its own: sum might be residual's buffer, so no load moves up across these stores.
    for_each([&](int i) { StoreVector(gSum + slice.col(i), x[i]); });
  }

  /// body(value) for each of the thread's elements.
  const auto for_each_value = [&](auto&& body) {
    for_each([&](int i) { ForEachValue(x[i], body); });
  };
  float mean = 0;  // stays 0 for kRms, whose formulas are kLayer's without it
  if (args.kind == NormKind::kLayer) {
    for_each_value([&](float value) { mean += value; });
    mean = team.AllReduce<Add>(mean) / cols;
  }
  float squares = 0;
  for_each_value([&](float value) { squares += (value - mean) * (value - mean); });
  const float rstd = rsqrtf(team.AllReduce<Add>(squares) / cols + args.eps);

  for_each([&](int i) {
    const auto affine = Affine<P, kSize>::Load(args, slice.col(i));
    ForgetFloats(x[i]);
    StoreVector(gY + slice.col(i), affine.Normalized(x[i], mean, rstd));
  });
}

}  // namespace

Status HopperForward(const NormForwardArgs& args, const Launch& launch) {
  return DispatchDTypes(args.dtype, args.param_dtype, [&]<typename T, typename P>() {
    return row_cluster::LaunchRows<kVectors>(norm_forward_cluster_kernel<T, P>, args,
                                             args.cols / kVectorSize<T>, launch);
  });
}

}  // namespace zenith::norm
