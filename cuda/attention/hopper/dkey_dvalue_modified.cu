#include "cuda/attention/hopper/dkey_dvalue.cuh"

namespace zenith::attention::hopper {

// Scores::kAny, for head sizes up to 128: the tiles that are right for most lengths, to compile
// few.
template <typename T>
Status LaunchByHead(const AttentionBackwardArgs& args, const Launch& launch) {
  return args.qk_dim <= 64 && args.v_dim <= 64
             ? LaunchDkeyDvalue<DkeyDvalueConfig<T, 64, 64, 2, 64, 3, Wanted::kBoth, Scores::kAny>>(
                   args, launch)
             : LaunchDkeyDvalue<
                   DkeyDvalueConfig<T, 128, 128, 2, 64, 3, Wanted::kBoth, Scores::kAny>>(args,
                                                                                         launch);
}

Status DkeyDvalueModified(const AttentionBackwardArgs& args, const Launch& launch) {
  return args.dtype == DType::kF16 ? LaunchByHead<__half>(args, launch)
                                   : LaunchByHead<__nv_bfloat16>(args, launch);
}

}  // namespace zenith::attention::hopper
