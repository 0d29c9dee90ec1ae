#include "cuda/attention/hopper/forward.cuh"

namespace zenith::attention::hopper {

// 176 keys where all queries see all of many keys: 617 TFLOP/s at 16384 positions and 583 at 4096,
// against 596 and 578 with 128. With a band the larger tiles hold more that is masked: 446 against
// 467 at 2048 causal positions. Three consumers, which read less from L2, do not have the registers
// for more than 80 keys: 603 and 564 (H200, bfloat16, under sustained load, 11/2026).
template <typename T>
Status LaunchByLength(const AttentionForwardArgs& args, const Launch& launch) {
  const bool equal = args.left >= args.q_len && args.right >= args.kv_len;
  return equal && args.kv_len >= 4096
             ? LaunchForward<ForwardConfig<T, 128, 128, 2, 176>>(args, launch)
             : LaunchForward<ForwardConfig<T, 128, 128, 2, 128>>(args, launch);
}

Status ForwardD128(const AttentionForwardArgs& args, const Launch& launch) {
  return args.dtype == DType::kF16 ? LaunchByLength<__half>(args, launch)
                                   : LaunchByLength<__nv_bfloat16>(args, launch);
}

}  // namespace zenith::attention::hopper
