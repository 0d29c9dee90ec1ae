#include "cuda/attention/hopper/dquery.cuh"

namespace zenith::attention::hopper {

// 32 keys: what two tiles of 128 queries leave of shared memory.
template <typename T>
using Config = DqueryConfig<T, 256, 256, 2, 32>;

Status DqueryD256(const AttentionBackwardArgs& args, const Launch& launch) {
  return args.dtype == DType::kF16 ? LaunchDquery<Config<__half>>(args, launch)
                                   : LaunchDquery<Config<__nv_bfloat16>>(args, launch);
}

}  // namespace zenith::attention::hopper
