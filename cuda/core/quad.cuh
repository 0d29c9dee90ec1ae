// Exchange between the four lanes that hold a row of a fragment (cuda/core/mma.cuh, wgmma.cuh).
#pragma once

#include <cstdint>

#include "cuda/core/reduce.cuh"

namespace zenith {

/// Transposes words[4] over the four lanes of a row: afterwards words[j] is what lane j had in
/// words[lane % 4].
__device__ __forceinline__ void QuadTranspose(uint32_t (&words)[4]) {
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int bit = 1; bit <= 2; bit *= 2)
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (j & bit) continue;
      const bool high = lane & bit;
      const uint32_t other = __shfl_xor_sync(0xffffffffu, high ? words[j] : words[j | bit], bit);
      if (high)
        words[j] = other;
      else
        words[j | bit] = other;
    }
}

}  // namespace zenith
