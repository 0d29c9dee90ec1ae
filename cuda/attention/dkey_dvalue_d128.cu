#include "cuda/attention/backward.cuh"

namespace zenith::attention {

Status DkeyDvalueD128(const AttentionBackwardArgs& args, const Launch& launch) {
  return BackwardWithConfig<BackwardConfig<Gradient::kKeyValue, 128, 4, 1, 64, 2>>(args, launch);
}

}  // namespace zenith::attention
