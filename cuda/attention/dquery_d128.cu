#include "cuda/attention/backward.cuh"

namespace zenith::attention {

Status DqueryD128(const AttentionBackwardArgs& args, const Launch& launch) {
  return BackwardWithConfig<BackwardConfig<Gradient::kQuery, 128, 4, 2, 32, 2>>(args, launch);
}

}  // namespace zenith::attention
