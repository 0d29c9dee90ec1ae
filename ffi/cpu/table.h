// Instantiates every CPU kernel for the instruction set that the including isa_*.cc names.
#pragma once

#include "ffi/cpu/activation.h"
#include "ffi/cpu/attention_backward.h"
#include "ffi/cpu/attention_forward.h"
#include "ffi/cpu/conv.h"
#include "ffi/cpu/cross_entropy.h"
#include "ffi/cpu/dispatch.h"
#include "ffi/cpu/gated.h"
#include "ffi/cpu/group_norm.h"
#include "ffi/cpu/linear.h"
#include "ffi/cpu/norm.h"
#include "ffi/cpu/paged_attention.h"
#include "ffi/cpu/quantized_linear.h"
#include "ffi/cpu/rope.h"
#include "ffi/cpu/softmax.h"

#define ZENITH_STRING_(x) #x
#define ZENITH_STRING(x) ZENITH_STRING_(x)

namespace zenith::ZENITH_ISA {

extern const CpuKernels kKernels;
const CpuKernels kKernels = {
    ZENITH_STRING(ZENITH_ISA),
    ActivationForward,
    ActivationBackward,
    GatedForward,
    GatedBackward,
    SoftmaxForward,
    SoftmaxBackward,
    CrossEntropyForward,
    CrossEntropyBackward,
    NormForward,
    NormBackward,
    GroupNormForward,
    GroupNormBackward,
    Rope,
    AttentionForward,
    AttentionBackward,
    PagedAttention,
    LinearForward,
    LinearBackward,
    QuantizedLinear,
    ConvForward,
};

}  // namespace zenith::ZENITH_ISA
