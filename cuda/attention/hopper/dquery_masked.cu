#include "cuda/attention/hopper/dquery.cuh"

namespace zenith::attention::hopper {

// Scores::kMasked, for head sizes up to 128.
template <typename T>
Status LaunchByHead(const AttentionBackwardArgs& args, const Launch& launch) {
  using D64 = DqueryConfig<T, 64, 64, 3, 96, Scores::kMasked>;
  using D128 = DqueryConfig<T, 128, 128, 2, 128, Scores::kMasked>;
  return args.qk_dim <= 64 && args.v_dim <= 64 ? LaunchDquery<D64>(args, launch)
                                               : LaunchDquery<D128>(args, launch);
}

Status DqueryMasked(const AttentionBackwardArgs& args, const Launch& launch) {
  return args.dtype == DType::kF16 ? LaunchByHead<__half>(args, launch)
                                   : LaunchByHead<__nv_bfloat16>(args, launch);
}

}  // namespace zenith::attention::hopper
