#include "cuda/linear/hopper/kernel.cuh"
#include "cuda/linear/kernels.h"

namespace zenith::linear {

Status HopperBF16(const LinearForwardArgs& args, const Launch& launch) {
  return LaunchHopper<__nv_bfloat16>(args, launch);
}

}  // namespace zenith::linear
