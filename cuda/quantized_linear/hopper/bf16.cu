#include "cuda/quantized_linear/hopper/choose.cuh"

namespace zenith::quantized_linear {

Status HopperBF16(const QuantizedLinearArgs& args, const Launch& launch) {
  return Hopper<__nv_bfloat16>(args, launch);
}

}  // namespace zenith::quantized_linear
