#include "cuda/attention/backward_float32.cuh"

namespace zenith::attention {

Status DqueryF32(const AttentionBackwardArgs& args, const Launch& launch) {
  return DqueryFloat32<float>(args, launch);
}

}  // namespace zenith::attention
