// Integer weights to 16-bit floating point, in registers. A word has two slots of 16 bits; what
// comes out is a pair in T, of the integers in the named bits of both slots: the integer is put
// into the mantissa of a number whose unit in the last place is 1, and that number's bias
// subtracted; exact.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cuda/core/convert.cuh"

namespace zenith::quantized_linear {

/// (word & kMask) ^ kBits
template <uint32_t kMask, uint32_t kBits>
__device__ __forceinline__ uint32_t MaskXor(uint32_t word) {
  uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, 0x6a;\n" : "=r"(result) : "r"(word), "n"(kMask), "n"(kBits));
  return result;
}
template <typename T>
__device__ __forceinline__ uint32_t Subtract(uint32_t a, uint32_t b) {
  using Pair = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
  Pair pa, pb;
  memcpy(&pa, &a, sizeof(a));
  memcpy(&pb, &b, sizeof(b));
  pa = __hsub2(pa, pb);
  memcpy(&a, &pa, sizeof(a));
  return a;
}

/// Bits 0 to 7 of each slot.
template <typename T>
__device__ __forceinline__ uint32_t WidenByte(uint32_t word) {
  if constexpr (std::is_same_v<T, __half>) {
    // 1024 + (s + 128), its unit in the last place is 1
    return Subtract<T>(MaskXor<0x00ff00ffu, 0x64806480u>(word), 0x64806480u);
  } else {
    // bfloat16 has 7 bits of mantissa: 128 + (s & 127), less 128, or 256 where the sign is set,
    // which is the lowest bit of the exponent.
    return Subtract<T>(MaskXor<0x007f007fu, 0x43004300u>(word),
                       MaskXor<0x00800080u, 0x43004300u>(word));
  }
}
/// Bits 4 * kNibble to 4 * kNibble + 3 of each slot.
template <typename T, int kNibble>
__device__ __forceinline__ uint32_t WidenNibble(uint32_t word) {
  const uint32_t shifted = kNibble == 0 ? word : word >> (4 * kNibble);
  constexpr uint32_t kBits = std::is_same_v<T, __half> ? 0x64086408u : 0x43084308u;
  return Subtract<T>(MaskXor<0x000f000fu, kBits>(shifted), kBits);  // base + (s + 8)
}

}  // namespace zenith::quantized_linear
