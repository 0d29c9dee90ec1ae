#include "cuda/attention/backward.cuh"

namespace zenith::attention {

// 64 queries: 3.5 ms at b4 h16 s4096 (H100, 11/2026). 32 queries took a tenth more; 32 with both
// stationary tiles in registers 4.1.
template <typename T>
using Config = BackwardConfig<T, Gradient::kKeyValue, 128, 4, 1, 64, 2>;

Status DkeyDvalueD128(const AttentionBackwardArgs& args, const Launch& launch) {
  return args.dtype == DType::kF16 ? LaunchBackward<Config<__half>>(args, launch)
                                   : LaunchBackward<Config<__nv_bfloat16>>(args, launch);
}

}  // namespace zenith::attention
