#include "cuda/attention/hopper/dkey_dvalue.cuh"

namespace zenith::attention::hopper {

// dkey: with 32 queries, and dout in as many buffers as they, wgmma waits for shared memory (1.48
// ms at 4096 positions and h8 for 1.28); dvalue: 96 queries, which leave a single buffer of queries
// or of dout, 0.83 ms and more for 0.71 (H100, bfloat16, 11/2026).
template <typename T>
Status LaunchBoth(const AttentionBackwardArgs& args, const Launch& launch) {
  using Dkey = DkeyDvalueConfig<T, 256, 256, 2, 64, 2, Wanted::kDkey, Scores::kPlain, 1>;
  using Dvalue = DkeyDvalueConfig<T, 256, 256, 2, 64, 2, Wanted::kDvalue, Scores::kPlain, 3>;
  const Status status = LaunchDkeyDvalue<Dkey>(args, launch);
  return status.ok() ? LaunchDkeyDvalue<Dvalue>(args, launch) : status;
}

Status DkeyDvalueD256(const AttentionBackwardArgs& args, const Launch& launch) {
  return args.dtype == DType::kF16 ? LaunchBoth<__half>(args, launch)
                                   : LaunchBoth<__nv_bfloat16>(args, launch);
}

}  // namespace zenith::attention::hopper
