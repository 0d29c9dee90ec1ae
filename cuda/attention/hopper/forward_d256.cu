#include "cuda/attention/hopper/forward.cuh"

namespace zenith::attention::hopper {

// 80 keys, all that shared memory has room for: 627 TFLOP/s at 4096 positions, 64 keys 570 (H200,
// bfloat16, 11/2026).
template <typename T>
using Config = ForwardConfig<T, 256, 256, 2, 80>;

Status ForwardD256(const AttentionForwardArgs& args, const Launch& launch) {
  return args.dtype == DType::kF16 ? LaunchForward<Config<__half>>(args, launch)
                                   : LaunchForward<Config<__nv_bfloat16>>(args, launch);
}

}  // namespace zenith::attention::hopper
