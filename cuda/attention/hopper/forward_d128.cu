#include "cuda/attention/hopper/forward.cuh"

namespace zenith::attention::hopper {

// 128 keys: 656 TFLOP/s at 16384 causal positions, 160 keys 667 but 445 against 412 at 1024; three
// consumers do not have the registers for more than 64 keys: 595 (H200, bfloat16, 11/2026).
template <typename T>
using Config = ForwardConfig<T, 128, 128, 2, 128>;

Status ForwardD128(const AttentionForwardArgs& args, const Launch& launch) {
  return args.dtype == DType::kF16 ? LaunchForward<Config<__half>>(args, launch)
                                   : LaunchForward<Config<__nv_bfloat16>>(args, launch);
}

}  // namespace zenith::attention::hopper
