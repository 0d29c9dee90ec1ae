// The launchers behind QuantizedLinear (cuda/quantized_linear.cu), which has checked the arguments.
#pragma once

#include "ffi/kernels/quantized_linear.h"

namespace zenith::quantized_linear {

/// Compute capability 8.0.
Status General(const QuantizedLinearArgs& args, const Launch& launch);

/// Compute capability 9.0.
Status HopperF16(const QuantizedLinearArgs& args, const Launch& launch);
Status HopperBF16(const QuantizedLinearArgs& args, const Launch& launch);

}  // namespace zenith::quantized_linear
