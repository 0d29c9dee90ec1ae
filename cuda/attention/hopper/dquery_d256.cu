#include "cuda/attention/hopper/dquery.cuh"

namespace zenith::attention::hopper {

// 64 keys and a single buffer of values: 1.24 ms at 4096 positions and h8; with 32 and two buffers,
// where wgmma waits for shared memory, 1.56 (H100, bfloat16, 11/2026).
template <typename T>
using Config = DqueryConfig<T, 256, 256, 2, 64, Scores::kPlain, 1>;

Status DqueryD256(const AttentionBackwardArgs& args, const Launch& launch) {
  return args.dtype == DType::kF16 ? LaunchDquery<Config<__half>>(args, launch)
                                   : LaunchDquery<Config<__nv_bfloat16>>(args, launch);
}

}  // namespace zenith::attention::hopper
