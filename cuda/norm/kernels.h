// The launchers behind NormBackward (cuda/norm_backward.cu) that have a file of their own.
#pragma once

#include "ffi/kernels/norm.h"

namespace zenith::norm {

/// Compute capability 9.0; 16-byte aligned arrays, and rows of as many vectors of 16 bytes: see
/// cuda/core/long_rows.cuh.
constexpr bool HopperTakes(int64_t vectors) { return vectors <= 8192; }
Status HopperBackward(const NormBackwardArgs& args, const Launch& launch);

}  // namespace zenith::norm
