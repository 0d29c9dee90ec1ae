// The same contracts computed the obvious way: one thread per row (or group, or element), float64
// inside, no shared memory. Oracles for the tests of the fast kernels; production calls none.
#pragma once

#include "ffi/kernels/activation.h"
#include "ffi/kernels/cross_entropy.h"
#include "ffi/kernels/gated.h"
#include "ffi/kernels/group_norm.h"
#include "ffi/kernels/linear.h"
#include "ffi/kernels/norm.h"
#include "ffi/kernels/quantized_linear.h"
#include "ffi/kernels/rope.h"
#include "ffi/kernels/softmax.h"

namespace zenith::naive {

Status NormForward(const NormForwardArgs& args, const Launch& launch);
Status NormBackward(const NormBackwardArgs& args, const Launch& launch);
Status GroupNormForward(const GroupNormForwardArgs& args, const Launch& launch);
Status GroupNormBackward(const GroupNormBackwardArgs& args, const Launch& launch);
Status SoftmaxForward(const SoftmaxForwardArgs& args, const Launch& launch);
Status SoftmaxBackward(const SoftmaxBackwardArgs& args, const Launch& launch);
Status CrossEntropyForward(const CrossEntropyForwardArgs& args, const Launch& launch);
Status CrossEntropyBackward(const CrossEntropyBackwardArgs& args, const Launch& launch);
Status ActivationForward(const ActivationForwardArgs& args, const Launch& launch);
Status ActivationBackward(const ActivationBackwardArgs& args, const Launch& launch);
Status GatedForward(const GatedForwardArgs& args, const Launch& launch);
Status GatedBackward(const GatedBackwardArgs& args, const Launch& launch);
Status Rope(const RopeArgs& args, const Launch& launch);
Status LinearForward(const LinearForwardArgs& args, const Launch& launch);
Status GatedLinearForward(const GatedLinearForwardArgs& args, const Launch& launch);
Status LinearBackward(const LinearBackwardArgs& args, const Launch& launch);
Status QuantizedLinear(const QuantizedLinearArgs& args, const Launch& launch);

}  // namespace zenith::naive
