#include "cuda/attention/backward.cuh"

namespace zenith::attention {

Status DkeyDvalueD64(const AttentionBackwardArgs& args, const Launch& launch) {
  return BackwardWithConfig<BackwardConfig<Gradient::kKeyValue, 64, 4, 2, 32, 2>>(args, launch);
}

}  // namespace zenith::attention
