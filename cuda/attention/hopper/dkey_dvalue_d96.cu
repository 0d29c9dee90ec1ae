#include "cuda/attention/hopper/dkey_dvalue.cuh"

namespace zenith::attention::hopper {

template <typename T>
using Config = DkeyDvalueConfig<T, 96, 96, 2, 64, 3>;

Status DkeyDvalueD96(const AttentionBackwardArgs& args, const Launch& launch) {
  return args.dtype == DType::kF16 ? LaunchDkeyDvalue<Config<__half>>(args, launch)
                                   : LaunchDkeyDvalue<Config<__nv_bfloat16>>(args, launch);
}

}  // namespace zenith::attention::hopper
