#include <algorithm>

#include "cuda/attention/backward.cuh"

namespace zenith::attention {

template <Gradient kGradient, int kDim, int kWarps, int kCols, int kBlocksPerSm>
using Config = BackwardConfig<Tf32, kGradient, kDim, kWarps, 1, kCols, kBlocksPerSm>;

Status DkeyDvalueTf32(const AttentionBackwardArgs& args, const Launch& launch) {
  const int64_t dim = std::max(args.qk_dim, args.v_dim);
  if (dim <= 64) return LaunchBackward<Config<Gradient::kKeyValue, 64, 4, 32, 2>>(args, launch);
  if (dim <= 128) return LaunchBackward<Config<Gradient::kKeyValue, 128, 4, 16, 2>>(args, launch);
  // Two kernels: 16 rows of both gradients would take 256 accumulators per lane.
  const Status status = LaunchBackward<Config<Gradient::kKey, 256, 2, 16, 1>>(args, launch);
  return status.ok() ? LaunchBackward<Config<Gradient::kValue, 256, 2, 16, 1>>(args, launch)
                     : status;
}

}  // namespace zenith::attention
