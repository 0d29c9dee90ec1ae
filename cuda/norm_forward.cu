// Layer and RMS normalisation, forward; the contract is ffi/kernels/norm.h.
#include "cuda/core/convert.cuh"
#include "cuda/core/device.h"
#include "cuda/core/launch.h"
#include "cuda/core/reduce.cuh"
#include "cuda/core/rows.cuh"
#include "cuda/core/vector.cuh"
#include "cuda/norm/affine.cuh"
#include "cuda/norm/kernels.h"
#include "ffi/kernels/norm.h"

namespace zenith {
namespace {

using norm::Affine;
using norm::Sum;

/// One team per row, the row in registers: x (and residual) read once, y (and sum) written once;
/// scale and bias come from the caches. The statistics are two passes over the registers.
template <typename T, typename P, int kSize, int kVectors>
__global__ void __launch_bounds__(kVectors == 1 ? kNarrowThreads : kMaxBlockThreads,
                                  kVectors == 1 ? 4 : 1)  // all 2048 threads of an SM
    norm_forward_kernel(NormForwardArgs args, int width) {
  __shared__ TeamScratch<1> scratch;
  Team team(width);
  const int cols = static_cast<int>(args.cols);
  const int64_t row = int64_t{blockIdx.x} * team.count() + team.index();
  const RowSlice<kSize> slice{row < args.rows ? cols : 0, width, team.rank()};
  const T* gX = static_cast<const T*>(args.x) + row * cols;
  T* gY = static_cast<T*>(args.y) + row * cols;

  // Short rows load them early: their latency would be a third of the row's time. Long ones have
  // no registers for that, and enough loads in flight.
  Affine<P, kSize> first_affine;
  if (kVectors == 1 && slice.has(0)) first_affine = Affine<P, kSize>::Load(args, slice.col(0));

  Vector<T, kSize> x[kVectors];
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    if (slice.has(i)) x[i] = LoadVector<kSize>(gX + slice.col(i));
  }
  if (args.residual != nullptr) {
    const T* gResidual = static_cast<const T*>(args.residual) + row * cols;
    T* gSum = static_cast<T*>(args.sum) + row * cols;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (slice.has(i)) x[i] = Sum(x[i], LoadVector<kSize>(gResidual + slice.col(i)));
    }
    // A loop of its own: sum might be residual's buffer, so no load moves up across these stores.
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (slice.has(i)) StoreVector(gSum + slice.col(i), x[i]);
    }
  }

  float mean = 0;  // stays 0 for kRms, whose formulas are kLayer's without it
  if (args.kind == NormKind::kLayer) {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (slice.has(i)) ForEachValue(x[i], [&](float value) { sum += value; });
    }
    mean = team.AllReduce<Add>(sum, scratch) / cols;
  }

  float squares = 0;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    if (!slice.has(i)) continue;
    ForEachValue(x[i], [&, mean](float value) { squares += (value - mean) * (value - mean); });
  }
  const float rstd = rsqrtf(team.AllReduce<Add>(squares, scratch) / cols + args.eps);

#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    if (!slice.has(i)) continue;
    ForgetFloats(x[i]);
    const Affine<P, kSize> affine =
        kVectors == 1 ? first_affine : Affine<P, kSize>::Load(args, slice.col(i));
    StoreVector(gY + slice.col(i), affine.Normalized(x[i], mean, rstd));
  }
}

/// Any number of columns: one team per row, which reads x three times (kRms: twice).
template <typename T, typename P, int kSize>
__global__ void __launch_bounds__(kMaxBlockThreads)
    norm_forward_looped_kernel(NormForwardArgs args, int width) {
  __shared__ TeamScratch<1> scratch;
  Team team(width);
  const int64_t row = int64_t{blockIdx.x} * team.count() + team.index();
  const int64_t cols = row < args.rows ? args.cols : 0;
  const int64_t first = team.rank() * kSize;
  const int64_t step = int64_t{width} * kSize;
  const T* gX = static_cast<const T*>(args.x) + row * args.cols;
  T* gY = static_cast<T*>(args.y) + row * args.cols;

  if (args.residual != nullptr) {
    const T* gResidual = static_cast<const T*>(args.residual) + row * args.cols;
    T* gSum = static_cast<T*>(args.sum) + row * args.cols;
#pragma unroll 4
    for (int64_t col = first; col < cols; col += step) {
      StoreVector(gSum + col, Sum(LoadVector<kSize>(gX + col), LoadVector<kSize>(gResidual + col)));
    }
    gX = gSum;  // no barrier: each thread reads back what it wrote itself
  }

  float mean = 0;
  if (args.kind == NormKind::kLayer) {
    float sum = 0;
#pragma unroll 4
    for (int64_t col = first; col < cols; col += step) {
      float values[kSize];
      ToFloat(LoadVector<kSize>(gX + col), values);
#pragma unroll
      for (float value : values) sum += value;
    }
    mean = team.AllReduce<Add>(sum, scratch) / static_cast<float>(args.cols);
  }

  float squares = 0;
#pragma unroll 4
  for (int64_t col = first; col < cols; col += step) {
    float values[kSize];
    ToFloat(LoadVector<kSize>(gX + col), values);
#pragma unroll
    for (float value : values) squares += (value - mean) * (value - mean);
  }
  const float variance = team.AllReduce<Add>(squares, scratch) / static_cast<float>(args.cols);
  const float rstd = rsqrtf(variance + args.eps);

#pragma unroll 4
  for (int64_t col = first; col < cols; col += step) {
    const auto affine = Affine<P, kSize>::Load(args, col);
    StoreVector(gY + col, affine.Normalized(LoadVector<kSize>(gX + col), mean, rstd));
  }
}

}  // namespace

Status NormForward(const NormForwardArgs& args, const Launch& launch) {
  if (args.rows == 0 || args.cols == 0) return {};
  const bool aligned = AreAligned(args.x, args.residual, args.scale, args.bias, args.y, args.sum);
  return DispatchDTypes(args.dtype, args.param_dtype, [&]<typename T, typename P>() -> Status {
    return DispatchRow<T, 8, false>(
        args.cols, aligned, [&]<int kSize, int kVectors>(RowShape shape) {
#ifdef ZENITH_HOPPER
          if (kSize > 1 && norm::ForwardTakes<T, P>(args.cols / kSize) && ChoosesHopper()) {
            return norm::HopperForward(args, launch);
          }
#endif
          if constexpr (kVectors == kLooped) {
            norm_forward_looped_kernel<T, P, kSize>
                <<<shape.blocks(args.rows), shape.threads(), 0, launch.stream>>>(args, shape.width);
          } else {
            norm_forward_kernel<T, P, kSize, kVectors>
                <<<shape.blocks(args.rows), shape.threads(), 0, launch.stream>>>(args, shape.width);
          }
          return LastLaunch();
        });
  });
}

}  // namespace zenith
