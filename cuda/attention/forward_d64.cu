#include "cuda/attention/forward.cuh"

namespace zenith::attention {

// 96 keys: 329 TFLOP/s at b4 h16 s4096 (H100, bfloat16), 64 keys 304, 128 keys 322 (spills).
template <typename T>
using Config = ForwardConfig<T, 64, 4, 2, 96, 2>;

Status ForwardD64(const AttentionForwardArgs& args, const Launch& launch) {
  return args.dtype == DType::kF16 ? LaunchForward<Config<__half>>(args, launch)
                                   : LaunchForward<Config<__nv_bfloat16>>(args, launch);
}

}  // namespace zenith::attention
