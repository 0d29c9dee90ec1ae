// The launchers behind SoftmaxBackward (cuda/softmax.cu) that have a file of their own.
#pragma once

#include "ffi/kernels/softmax.h"

namespace zenith::softmax {

/// Compute capability 9.0; 16-byte aligned arrays, and rows that long_rows::Fits.
Status HopperBackward(const SoftmaxBackwardArgs& args, const Launch& launch);

}  // namespace zenith::softmax
