// The launchers behind NormBackward (cuda/norm_backward.cu) that have a file of their own.
#pragma once

#include "ffi/kernels/norm.h"

namespace zenith::norm {

/// Compute capability 9.0; 16-byte aligned arrays, and rows that long_rows::Fits.
Status HopperBackward(const NormBackwardArgs& args, const Launch& launch);

}  // namespace zenith::norm
