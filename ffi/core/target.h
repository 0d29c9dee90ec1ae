// The list of custom-call targets: one row for each, next to its handler; ffi/module.cc hands all
// of them to Python.
#pragma once

#include <span>

#include "xla/ffi/api/ffi.h"

namespace zenith {

/// `name` is the stem: JAX knows the target as zenith_<name>_v<kernel version>.
struct Target {
  const char* name;
  XLA_FFI_Handler* handler;
};

std::span<const Target> NormTargets();
std::span<const Target> GroupNormTargets();
std::span<const Target> SoftmaxTargets();
std::span<const Target> CrossEntropyTargets();
std::span<const Target> ActivationTargets();
std::span<const Target> GatedTargets();
std::span<const Target> RopeTargets();
std::span<const Target> AttentionTargets();
std::span<const Target> PagedAttentionTargets();
std::span<const Target> LinearTargets();
std::span<const Target> ConvTargets();         // of the CPU only
std::span<const Target> GatedLinearTargets();  // of the GPU only
std::span<const Target> QuantizedLinearTargets();

}  // namespace zenith
