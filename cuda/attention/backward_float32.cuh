// The gradients of float32: with T float in three tf32 products for one, with Tf32 in one.
#pragma once

#include <algorithm>

#include "cuda/attention/backward.cuh"

namespace zenith::attention {

template <typename T, Gradient kGradient, int kDim, int kWarps, int kCols, int kBlocksPerSm>
using Float32Config = BackwardConfig<T, kGradient, kDim, kWarps, 1, kCols, kBlocksPerSm>;

template <typename T>
Status DqueryFloat32(const AttentionBackwardArgs& args, const Launch& launch) {
  constexpr Gradient kQuery = Gradient::kQuery;
  const int64_t dim = std::max(args.qk_dim, args.v_dim);
  return dim <= 64    ? LaunchBackward<Float32Config<T, kQuery, 64, 4, 32, 3>>(args, launch)
         : dim <= 128 ? LaunchBackward<Float32Config<T, kQuery, 128, 4, 16, 2>>(args, launch)
                      : LaunchBackward<Float32Config<T, kQuery, 256, 2, 16, 1>>(args, launch);
}

template <typename T>
Status DkeyDvalueFloat32(const AttentionBackwardArgs& args, const Launch& launch) {
  constexpr Gradient kBoth = Gradient::kKeyValue;
  const int64_t dim = std::max(args.qk_dim, args.v_dim);
  if (dim <= 64) return LaunchBackward<Float32Config<T, kBoth, 64, 4, 32, 2>>(args, launch);
  if (dim <= 128) return LaunchBackward<Float32Config<T, kBoth, 128, 4, 16, 2>>(args, launch);
  // Two kernels: 16 rows of both gradients would take 256 accumulators per lane.
  const Status status =
      LaunchBackward<Float32Config<T, Gradient::kKey, 256, 2, 16, 1>>(args, launch);
  return status.ok()
             ? LaunchBackward<Float32Config<T, Gradient::kValue, 256, 2, 16, 1>>(args, launch)
             : status;
}

}  // namespace zenith::attention
