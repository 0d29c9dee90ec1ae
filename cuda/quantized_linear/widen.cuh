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

__device__ __forceinline__ uint32_t MultiplyAddF16(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t result;
  asm("fma.rn.f16x2 %0, %1, %2, %3;\n" : "=r"(result) : "r"(a), "r"(b), "r"(c));
  return result;
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
/// pairs[i]: bits 4 i to 4 i + 3 of each slot. Logical operations, shifts and byte permutations
/// share a pipe of half the rate of the one that adds and multiplies 16-bit pairs, so the latter
/// does what it can: of two nibbles a slot one is brought down by a product with 1 / 16.
template <typename T>
__device__ __forceinline__ void WidenNibbles(uint32_t word, uint32_t (&pairs)[4]) {
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const uint32_t shifted = i == 0 ? word : word >> 8;
    if constexpr (std::is_same_v<T, __half>) {
      // 1024 + (s + 8) and 1024 + 16 (s + 8)
      pairs[i] = Subtract<T>(MaskXor<0x000f000fu, 0x64086408u>(shifted), 0x64086408u);
      pairs[i + 1] = MultiplyAddF16(MaskXor<0x00f000f0u, 0x64806480u>(shifted), 0x2c002c00u,
                                    0xd480d480u);  // / 16 - 72
    } else {
      // 128 + (s + 8); and as a float16, whose bits 0x4300 are 3.5, 3.5 + 16 (s + 8) / 512, which
      // becomes 3.5 + (s + 8) / 512: the bits of the former.
      pairs[i] = Subtract<T>(MaskXor<0x000f000fu, 0x43084308u>(shifted), 0x43084308u);
      pairs[i + 1] =
          Subtract<T>(MultiplyAddF16(MaskXor<0x00f000f0u, 0x43804380u>(shifted), 0x2c002c00u,
                                     0x42904290u),  // / 16 + 3.5 * 15 / 16
                      0x43084308u);
    }
  }
}

}  // namespace zenith::quantized_linear
