#include "cuda/attention/hopper/dquery.cuh"

namespace zenith::attention::hopper {

// 128 queries a block, 128 keys: 615 TFLOP/s (three products) at 4096 causal positions, 192 x 64
// 601. Without a band 192 x 64, which read less from L2, are ahead: 710 against 676 at 16384 (H200,
// bfloat16, 11/2026).
template <typename T>
Status LaunchByLength(const AttentionBackwardArgs& args, const Launch& launch) {
  return args.q_len <= 1536 || args.right < args.kv_len || args.left < args.q_len
             ? LaunchDquery<DqueryConfig<T, 128, 128, 2, 128>>(args, launch)
             : LaunchDquery<DqueryConfig<T, 128, 128, 3, 64>>(args, launch);
}

Status DqueryD128(const AttentionBackwardArgs& args, const Launch& launch) {
  return args.dtype == DType::kF16 ? LaunchByLength<__half>(args, launch)
                                   : LaunchByLength<__nv_bfloat16>(args, launch);
}

}  // namespace zenith::attention::hopper
