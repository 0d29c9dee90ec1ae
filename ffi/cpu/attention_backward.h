#pragma once
#include "ffi/cpu/attention.h"
namespace zenith::ZENITH_ISA {
inline Status AttentionBackward(const AttentionBackwardArgs&, const Launch&) {
  return {"attention backward is not implemented on the CPU yet"};
}
}  // namespace zenith::ZENITH_ISA
