#include "cuda/attention/forward.cuh"

namespace zenith::attention {

template <typename T>
using Config = ForwardConfig<T, 128, 4, 2, 64, 2>;

Status ForwardD128(const AttentionForwardArgs& args, const Launch& launch) {
  return args.dtype == DType::kF16 ? LaunchForward<Config<__half>>(args, launch)
                                   : LaunchForward<Config<__nv_bfloat16>>(args, launch);
}

}  // namespace zenith::attention
