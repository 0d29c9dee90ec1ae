#include "cuda/attention/hopper/dkey_dvalue.cuh"

namespace zenith::attention::hopper {

// 96 queries: 519 TFLOP/s (four products) at 4096 causal positions; 128 spill: 299; three consumers
// with 64 362 (H200, bfloat16, 11/2026).
template <typename T>
using Config = DkeyDvalueConfig<T, 64, 64, 2, 96, 3>;

Status DkeyDvalueD64(const AttentionBackwardArgs& args, const Launch& launch) {
  return args.dtype == DType::kF16 ? LaunchDkeyDvalue<Config<__half>>(args, launch)
                                   : LaunchDkeyDvalue<Config<__nv_bfloat16>>(args, launch);
}

}  // namespace zenith::attention::hopper
