#include "cuda/attention/backward_float32.cuh"

namespace zenith::attention {

Status DkeyDvalueF32(const AttentionBackwardArgs& args, const Launch& launch) {
  return DkeyDvalueFloat32<float>(args, launch);
}

}  // namespace zenith::attention
