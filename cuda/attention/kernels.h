// The implementations that cuda/attention.cu chooses among. Each takes the contract's arguments.
#pragma once

#include "cuda/core/launch.h"
#include "ffi/kernels/attention.h"

namespace zenith::attention {

/// Any dtype, any head size, any stride: slow, and the oracle of the others.
Status NaiveForward(const AttentionForwardArgs& args, const Launch& launch);
/// Expects `delta` filled.
Status NaiveBackward(const AttentionBackwardArgs& args, const Launch& launch);

/// delta[b,h,t] = sum_e dout * out, any dtype.
Status RowDelta(const AttentionBackwardArgs& args, const Launch& launch);

}  // namespace zenith::attention
