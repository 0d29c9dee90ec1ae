#include "cuda/attention/forward.cuh"

namespace zenith::attention {

Status ForwardD64(const AttentionForwardArgs& args, const Launch& launch) {
  return ForwardWithConfig<ForwardConfig<64, 4, 2, 64, 2>>(args, launch);
}

}  // namespace zenith::attention
