#include "cuda/attention/backward.cuh"

namespace zenith::attention {

Status DqueryD256(const AttentionBackwardArgs& args, const Launch& launch) {
  return BackwardWithConfig<BackwardConfig<Gradient::kQuery, 256, 4, 1, 32, 1>>(args, launch);
}

}  // namespace zenith::attention
