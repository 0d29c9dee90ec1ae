#include "cuda/attention/forward.cuh"

namespace zenith::attention {

template <typename T>
using Config = ForwardConfig<T, 64, 4, 2, 96, 2>;

Status ForwardD64(const AttentionForwardArgs& args, const Launch& launch) {
  return args.dtype == DType::kF16 ? LaunchForward<Config<__half>>(args, launch)
                                   : LaunchForward<Config<__nv_bfloat16>>(args, launch);
}

}  // namespace zenith::attention
