#include "cuda/attention/hopper/dquery.cuh"

namespace zenith::attention::hopper {

// 192 queries a block, 96 keys: 545 TFLOP/s (three products) at 4096 causal positions and 604 at
// 16384; 128 x 128 528 and 578, but 390 against 363 at 1024 (H200, bfloat16, 11/2026).
template <typename T>
Status LaunchByLength(const AttentionBackwardArgs& args, const Launch& launch) {
  return args.q_len <= 1536 ? LaunchDquery<DqueryConfig<T, 64, 64, 2, 128>>(args, launch)
                            : LaunchDquery<DqueryConfig<T, 64, 64, 3, 96>>(args, launch);
}

Status DqueryD64(const AttentionBackwardArgs& args, const Launch& launch) {
  return args.dtype == DType::kF16 ? LaunchByLength<__half>(args, launch)
                                   : LaunchByLength<__nv_bfloat16>(args, launch);
}

}  // namespace zenith::attention::hopper
