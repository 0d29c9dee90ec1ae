#include "cuda/attention/forward.cuh"

namespace zenith::attention {

Status ForwardD128(const AttentionForwardArgs& args, const Launch& launch) {
  return ForwardWithConfig<ForwardConfig<128, 4, 2, 64, 2>>(args, launch);
}

}  // namespace zenith::attention
