#include <algorithm>

#include "cuda/attention/forward.cuh"

namespace zenith::attention {

Status ForwardF32(const AttentionForwardArgs& args, const Launch& launch) {
  const int64_t dim = std::max(args.qk_dim, args.v_dim);
  return dim <= 64    ? LaunchForward<ForwardConfig<float, 64, 4, 2, 32, 2>>(args, launch)
         : dim <= 128 ? LaunchForward<ForwardConfig<float, 128, 4, 1, 32, 2>>(args, launch)
                      : LaunchForward<ForwardConfig<float, 256, 4, 1, 16, 1>>(args, launch);
}

}  // namespace zenith::attention
