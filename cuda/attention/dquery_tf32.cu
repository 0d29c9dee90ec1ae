#include "cuda/attention/backward_float32.cuh"

namespace zenith::attention {

Status DqueryTf32(const AttentionBackwardArgs& args, const Launch& launch) {
  return DqueryFloat32<Tf32>(args, launch);
}

}  // namespace zenith::attention
