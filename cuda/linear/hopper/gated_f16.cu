#include "cuda/linear/hopper/kernel.cuh"
#include "cuda/linear/kernels.h"

namespace zenith::linear {

Status HopperF16(const GatedLinearForwardArgs& args, const Launch& launch) {
  return LaunchHopper<__half>(args, launch);
}

}  // namespace zenith::linear
