#include "cuda/attention/backward.cuh"

namespace zenith::attention {

// Two kernels: 16 rows of both gradients would take 256 accumulators per lane.
template <typename T, Gradient kGradient>
using Config = BackwardConfig<T, kGradient, 256, 4, 1, 32, 1>;

Status DkeyDvalueD256(const AttentionBackwardArgs& args, const Launch& launch) {
  const auto with_type = [&]<typename T>() {
    const Status status = LaunchBackward<Config<T, Gradient::kKey>>(args, launch);
    return status.ok() ? LaunchBackward<Config<T, Gradient::kValue>>(args, launch) : status;
  };
  return args.dtype == DType::kF16 ? with_type.operator()<__half>()
                                   : with_type.operator()<__nv_bfloat16>();
}

}  // namespace zenith::attention
