#include "cuda/attention/backward_float32.cuh"

namespace zenith::attention {

Status DkeyDvalueTf32(const AttentionBackwardArgs& args, const Launch& launch) {
  return DkeyDvalueFloat32<Tf32>(args, launch);
}

}  // namespace zenith::attention
