#include "cuda/attention/backward.cuh"

namespace zenith::attention {

Status DqueryD64(const AttentionBackwardArgs& args, const Launch& launch) {
  return BackwardWithConfig<BackwardConfig<Gradient::kQuery, 64, 4, 2, 64, 2>>(args, launch);
}

}  // namespace zenith::attention
