#include "cuda/attention/hopper/dkey_dvalue.cuh"

namespace zenith::attention::hopper {

// Scores::kMasked, for head sizes up to 128.
template <typename T>
Status LaunchByHead(const AttentionBackwardArgs& args, const Launch& launch) {
  using D64 = DkeyDvalueConfig<T, 64, 64, 2, 96, 3, Wanted::kBoth, Scores::kMasked>;
  using D128 = DkeyDvalueConfig<T, 128, 128, 2, 64, 3, Wanted::kBoth, Scores::kMasked>;
  return args.qk_dim <= 64 && args.v_dim <= 64 ? LaunchDkeyDvalue<D64>(args, launch)
                                               : LaunchDkeyDvalue<D128>(args, launch);
}

Status DkeyDvalueMasked(const AttentionBackwardArgs& args, const Launch& launch) {
  return args.dtype == DType::kF16 ? LaunchByHead<__half>(args, launch)
                                   : LaunchByHead<__nv_bfloat16>(args, launch);
}

}  // namespace zenith::attention::hopper
