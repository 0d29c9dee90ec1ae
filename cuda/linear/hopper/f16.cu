#include "cuda/linear/hopper/kernel.cuh"
#include "cuda/linear/kernels.h"

namespace zenith::linear {

Status HopperF16(const LinearForwardArgs& args, const Launch& launch) {
  return args.transposed ? LaunchHopper<Config<__half, Major::kK, 128>>(args, launch)
                         : LaunchHopper<Config<__half, Major::kMN, 128>>(args, launch);
}

}  // namespace zenith::linear
