#include "cuda/attention/forward.cuh"

namespace zenith::attention {

template <typename T>
using Config = ForwardConfig<T, 256, 8, 1, 32, 1>;

Status ForwardD256(const AttentionForwardArgs& args, const Launch& launch) {
  return args.dtype == DType::kF16 ? LaunchForward<Config<__half>>(args, launch)
                                   : LaunchForward<Config<__nv_bfloat16>>(args, launch);
}

}  // namespace zenith::attention
