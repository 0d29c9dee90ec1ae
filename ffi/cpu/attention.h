// Blocked attention. See ffi/kernels/attention.h.
#pragma once

#include "ffi/cpu/parallel.h"
#include "ffi/kernels/attention.h"

namespace zenith::ZENITH_ISA {

inline Status AttentionForward(const AttentionForwardArgs&, const Launch&) {
  return {"attention is not implemented on the CPU yet"};
}
inline Status AttentionBackward(const AttentionBackwardArgs&, const Launch&) {
  return {"attention is not implemented on the CPU yet"};
}

}  // namespace zenith::ZENITH_ISA
