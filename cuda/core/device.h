// What the current device is.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdlib>
#include <string_view>

namespace zenith {

/// Compute capability 9.0: code for sm_90a runs on it.
inline bool IsHopper() {
  int device = 0, major = 0, minor = 0;
  return cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
         cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess &&
         major == 9 && minor == 0;
}

/// Where there are kernels for both, whether Hopper's are chosen. ZENITH_HOPPER=0 in the
/// environment keeps them from it, for tests and comparisons.
inline bool ChoosesHopper() {
  static const bool allowed = [] {
    const char* value = std::getenv("ZENITH_HOPPER");
    return value == nullptr || std::string_view(value) != "0";
  }();
  return allowed && IsHopper();
}

}  // namespace zenith
