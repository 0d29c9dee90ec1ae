#include "cuda/attention/hopper/dkey_dvalue.cuh"

namespace zenith::attention::hopper {

template <typename T>
Status LaunchBoth(const AttentionBackwardArgs& args, const Launch& launch) {
  const Status status =
      LaunchDkeyDvalue<DkeyDvalueConfig<T, 192, 128, 2, 64, 2, Wanted::kDkey>>(args, launch);
  if (!status.ok()) return status;
  return LaunchDkeyDvalue<DkeyDvalueConfig<T, 192, 128, 2, 64, 3, Wanted::kDvalue>>(args, launch);
}

Status DkeyDvalueD192V128(const AttentionBackwardArgs& args, const Launch& launch) {
  return args.dtype == DType::kF16 ? LaunchBoth<__half>(args, launch)
                                   : LaunchBoth<__nv_bfloat16>(args, launch);
}

}  // namespace zenith::attention::hopper
