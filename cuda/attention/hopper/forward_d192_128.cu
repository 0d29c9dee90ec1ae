#include "cuda/attention/hopper/forward.cuh"

namespace zenith::attention::hopper {

template <typename T>
using Config = ForwardConfig<T, 192, 128, 2, 128>;

Status ForwardD192V128(const AttentionForwardArgs& args, const Launch& launch) {
  return args.dtype == DType::kF16 ? LaunchForward<Config<__half>>(args, launch)
                                   : LaunchForward<Config<__nv_bfloat16>>(args, launch);
}

}  // namespace zenith::attention::hopper
