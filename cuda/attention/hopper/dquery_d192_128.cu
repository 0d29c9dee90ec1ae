#include "cuda/attention/hopper/dquery.cuh"

namespace zenith::attention::hopper {

template <typename T>
using Config = DqueryConfig<T, 192, 128, 2, 96>;

Status DqueryD192V128(const AttentionBackwardArgs& args, const Launch& launch) {
  return args.dtype == DType::kF16 ? LaunchDquery<Config<__half>>(args, launch)
                                   : LaunchDquery<Config<__nv_bfloat16>>(args, launch);
}

}  // namespace zenith::attention::hopper
