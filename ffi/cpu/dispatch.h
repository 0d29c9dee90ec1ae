// The CPU kernels of one instruction set, as a table.
#pragma once

#include "ffi/kernels/activation.h"
#include "ffi/kernels/attention.h"
#include "ffi/kernels/conv.h"
#include "ffi/kernels/cross_entropy.h"
#include "ffi/kernels/gated.h"
#include "ffi/kernels/group_norm.h"
#include "ffi/kernels/linear.h"
#include "ffi/kernels/norm.h"
#include "ffi/kernels/paged_attention.h"
#include "ffi/kernels/quantized_linear.h"
#include "ffi/kernels/rope.h"
#include "ffi/kernels/softmax.h"

namespace zenith {

struct CpuKernels {
  const char* isa;
  Status (*activation_forward)(const ActivationForwardArgs&, const Launch&);
  Status (*activation_backward)(const ActivationBackwardArgs&, const Launch&);
  Status (*gated_forward)(const GatedForwardArgs&, const Launch&);
  Status (*gated_backward)(const GatedBackwardArgs&, const Launch&);
  Status (*softmax_forward)(const SoftmaxForwardArgs&, const Launch&);
  Status (*softmax_backward)(const SoftmaxBackwardArgs&, const Launch&);
  Status (*cross_entropy_forward)(const CrossEntropyForwardArgs&, const Launch&);
  Status (*cross_entropy_backward)(const CrossEntropyBackwardArgs&, const Launch&);
  Status (*norm_forward)(const NormForwardArgs&, const Launch&);
  Status (*norm_backward)(const NormBackwardArgs&, const Launch&);
  Status (*group_norm_forward)(const GroupNormForwardArgs&, const Launch&);
  Status (*group_norm_backward)(const GroupNormBackwardArgs&, const Launch&);
  Status (*rope)(const RopeArgs&, const Launch&);
  Status (*attention_forward)(const AttentionForwardArgs&, const Launch&);
  Status (*attention_backward)(const AttentionBackwardArgs&, const Launch&);
  Status (*paged_attention)(const PagedAttentionArgs&, const Launch&);
  Status (*linear_forward)(const LinearForwardArgs&, const Launch&);
  Status (*linear_backward)(const LinearBackwardArgs&, const Launch&);
  Status (*quantized_linear)(const QuantizedLinearArgs&, const Launch&);
  Status (*conv_forward)(const ConvForwardArgs&, const Launch&);
};

/// The tables this machine can run, best first; null beyond the last. Picked once, thread-safe.
struct CpuKernelChoice {
  const CpuKernels* tables[4];
};
const CpuKernelChoice& RunnableCpuKernels();

}  // namespace zenith
