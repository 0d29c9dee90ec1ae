#include "cuda/attention/hopper/forward.cuh"

namespace zenith::attention::hopper {

// 192 queries a block, or 128 where their padding or the triangle of a causal mask would cost more:
// at 512 and 1024 causal positions 222 and 305 TFLOP/s against 195 and 270 (H200, bfloat16,
// 11/2026); from 2048 on 192 are faster, 500 against 412 at 16384.
template <typename T>
Status LaunchByLength(const AttentionForwardArgs& args, const Launch& launch) {
  const bool causal = args.right < args.kv_len;
  return args.q_len <= 256 || (causal && args.q_len <= 1536)
             ? LaunchForward<ForwardConfig<T, 64, 64, 2, 128>>(args, launch)
             : LaunchForward<ForwardConfig<T, 64, 64, 3, 128>>(args, launch);
}

Status ForwardD64(const AttentionForwardArgs& args, const Launch& launch) {
  return args.dtype == DType::kF16 ? LaunchByLength<__half>(args, launch)
                                   : LaunchByLength<__nv_bfloat16>(args, launch);
}

}  // namespace zenith::attention::hopper
