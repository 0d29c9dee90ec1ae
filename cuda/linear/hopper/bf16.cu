#include "cuda/linear/hopper/kernel.cuh"
#include "cuda/linear/kernels.h"

namespace zenith::linear {

Status HopperBF16(const LinearForwardArgs& args, const Launch& launch) {
  return args.transposed ? LaunchHopper<Config<__nv_bfloat16, Major::kK, 128>>(args, launch)
                         : LaunchHopper<Config<__nv_bfloat16, Major::kMN, 128>>(args, launch);
}

}  // namespace zenith::linear
