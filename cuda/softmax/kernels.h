// The launchers behind SoftmaxForward and SoftmaxBackward that have a file of their own.
#pragma once

#include "cuda/core/row_cluster.h"
#include "ffi/kernels/softmax.h"

namespace zenith::softmax {

/// Whether HopperForward has anything to gain by rows of so many vectors, and takes them.
constexpr bool ForwardTakes(int64_t vectors) {
  return vectors > 2048 && row_cluster::Shape<8>::Fits(vectors);
}

/// Compute capability 9.0; 16-byte aligned arrays.
Status HopperForward(const SoftmaxForwardArgs& args, const Launch& launch);

/// Compute capability 9.0; 16-byte aligned arrays, and rows that long_rows::Fits.
Status HopperBackward(const SoftmaxBackwardArgs& args, const Launch& launch);

}  // namespace zenith::softmax
