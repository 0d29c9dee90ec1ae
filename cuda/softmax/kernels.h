// The launchers behind SoftmaxBackward (cuda/softmax.cu) that have a file of their own.
#pragma once

#include "ffi/kernels/softmax.h"

namespace zenith::softmax {

/// Compute capability 9.0; 16-byte aligned arrays, and rows of as many vectors of 16 bytes: see
/// cuda/core/long_rows.cuh.
constexpr bool HopperTakes(int64_t vectors) { return vectors <= 8192; }
Status HopperBackward(const SoftmaxBackwardArgs& args, const Launch& launch);

}  // namespace zenith::softmax
