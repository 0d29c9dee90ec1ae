#include "cuda/attention/forward.cuh"

namespace zenith::attention {

Status ForwardD256(const AttentionForwardArgs& args, const Launch& launch) {
  return ForwardWithConfig<ForwardConfig<256, 8, 1, 32, 1>>(args, launch);
}

}  // namespace zenith::attention
