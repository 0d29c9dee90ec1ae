// The launchers behind LinearForward and GatedLinearForward (cuda/linear.cu), one file each.
#pragma once

#include "ffi/kernels/linear.h"

namespace zenith::linear {

/// Compute capability 9.0, 16-byte aligned arrays.
Status HopperF16(const LinearForwardArgs& args, const Launch& launch);
Status HopperBF16(const LinearForwardArgs& args, const Launch& launch);
Status HopperF16(const GatedLinearForwardArgs& args, const Launch& launch);
Status HopperBF16(const GatedLinearForwardArgs& args, const Launch& launch);

}  // namespace zenith::linear
