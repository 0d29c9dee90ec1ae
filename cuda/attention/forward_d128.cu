#include "cuda/attention/forward.cuh"

namespace zenith::attention {

// 64 keys: 347 TFLOP/s at b4 h16 s4096 (H100, bfloat16); 8 warps of one row tile 283.
template <typename T>
using Config = ForwardConfig<T, 128, 4, 2, 64, 2>;

Status ForwardD128(const AttentionForwardArgs& args, const Launch& launch) {
  return args.dtype == DType::kF16 ? LaunchForward<Config<__half>>(args, launch)
                                   : LaunchForward<Config<__nv_bfloat16>>(args, launch);
}

}  // namespace zenith::attention
