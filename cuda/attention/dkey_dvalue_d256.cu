#include "cuda/attention/backward.cuh"

namespace zenith::attention {

/// Two kernels: 16 rows of both gradients would take 256 accumulators per lane.
Status DkeyDvalueD256(const AttentionBackwardArgs& args, const Launch& launch) {
  const Status status =
      BackwardWithConfig<BackwardConfig<Gradient::kKey, 256, 4, 1, 32, 1>>(args, launch);
  if (!status.ok()) return status;
  return BackwardWithConfig<BackwardConfig<Gradient::kValue, 256, 4, 1, 32, 1>>(args, launch);
}

}  // namespace zenith::attention
