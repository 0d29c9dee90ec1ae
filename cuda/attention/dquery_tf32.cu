#include <algorithm>

#include "cuda/attention/backward.cuh"

namespace zenith::attention {

template <int kDim, int kWarps, int kCols, int kBlocksPerSm>
using Config = BackwardConfig<Tf32, Gradient::kQuery, kDim, kWarps, 1, kCols, kBlocksPerSm>;

Status DqueryTf32(const AttentionBackwardArgs& args, const Launch& launch) {
  const int64_t dim = std::max(args.qk_dim, args.v_dim);
  return dim <= 64    ? LaunchBackward<Config<64, 4, 32, 3>>(args, launch)
         : dim <= 128 ? LaunchBackward<Config<128, 4, 16, 2>>(args, launch)
                      : LaunchBackward<Config<256, 2, 16, 1>>(args, launch);
}

}  // namespace zenith::attention
