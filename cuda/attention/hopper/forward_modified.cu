#include "cuda/attention/hopper/forward.cuh"

namespace zenith::attention::hopper {

// Scores::kAny, for head sizes up to 128: the tiles that are right for most lengths, to compile
// few.
template <typename T>
Status LaunchByHead(const AttentionForwardArgs& args, const Launch& launch) {
  return args.qk_dim <= 64 && args.v_dim <= 64
             ? LaunchForward<ForwardConfig<T, 64, 64, 2, 128, Scores::kAny>>(args, launch)
             : LaunchForward<ForwardConfig<T, 128, 128, 2, 96, Scores::kAny>>(args, launch);
}

Status ForwardModified(const AttentionForwardArgs& args, const Launch& launch) {
  return args.dtype == DType::kF16 ? LaunchByHead<__half>(args, launch)
                                   : LaunchByHead<__nv_bfloat16>(args, launch);
}

}  // namespace zenith::attention::hopper
