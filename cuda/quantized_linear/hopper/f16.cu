#include "cuda/quantized_linear/hopper/choose.cuh"

namespace zenith::quantized_linear {

Status HopperF16(const QuantizedLinearArgs& args, const Launch& launch) {
  return Hopper<__half>(args, launch);
}

}  // namespace zenith::quantized_linear
