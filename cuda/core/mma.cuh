// Warp matrix products of 16-bit types with float32 accumulators (mma.sync, ldmatrix: sm_80; PTX
// ISA 9.7.14.5). Fragments, by lane: r = lane / 4, c = 2 * (lane % 4):
//   A 16x16  a[0] (r, c..c+1)  a[1] (r+8, c..)  a[2] (r, c+8..)  a[3] (r+8, c+8..)
//   B 16x8   b[0] (c..c+1, r)  b[1] (c+8.., r)                     rows are k, columns n
//   D 16x8   d[0..1] (r, c..c+1)  d[2..3] (r+8, c..c+1)
// Two neighbouring D tiles, packed to 16 bits, are therefore one A tile: no shuffle between chained
// products. float32 goes through the tensor cores as tf32, with k = 8 and 4-byte elements where the
// table has pairs: a[2], a[3] and b[1] are columns (rows) lane % 4 + 4.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/core/convert.cuh"

namespace zenith {

/// d += a . b
template <typename T>
__device__ __forceinline__ void Mma16x8x16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                           uint32_t b1) {
  if constexpr (std::is_same_v<T, __half>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    static_assert(std::is_same_v<T, __nv_bfloat16>);
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

/// d += a . b with the operands' lowest 13 bits ignored (10 bits of mantissa remain).
__device__ __forceinline__ void Mma16x8x8Tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                              uint32_t b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/// N registers of an operand, as the tensor cores take them: 16-bit pairs as they are.
template <typename T, int N>
struct Operand {
  uint32_t bits[N];

  Operand() = default;
  __device__ __forceinline__ explicit Operand(const uint32_t (&words)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) bits[i] = words[i];
  }
};

__device__ __forceinline__ uint32_t RoundedToTf32(uint32_t bits) {
  uint32_t rounded;
  asm("cvt.rna.tf32.f32 %0, %1;\n" : "=r"(rounded) : "f"(__uint_as_float(bits)));
  return rounded;
}

template <int N>
struct Operand<Tf32, N> {
  uint32_t bits[N];

  Operand() = default;
  __device__ __forceinline__ explicit Operand(const uint32_t (&words)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) bits[i] = RoundedToTf32(words[i]);
  }
};

/// float32 x = high + low, two tf32 numbers: 22 bits of the mantissa's 24. NaN stays NaN; infinity
/// may become NaN in a product.
template <int N>
struct Operand<float, N> {
  uint32_t high[N], low[N];

  Operand() = default;
  __device__ __forceinline__ explicit Operand(const uint32_t (&bits)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      high[i] = RoundedToTf32(bits[i]);
      const float rest = __uint_as_float(bits[i]) - __uint_as_float(high[i]);  // exact
      low[i] = __float_as_uint(rest) + 0x1000;  // half a unit of the last bit kept: rounds
    }
  }
};

/// d += a . b, where B is the pair of registers 2 * `index` and the next of `b`. float32 takes
/// three products (low . low is below its rounding): about float32's accuracy at a sixth of the
/// speed of 16-bit types.
template <typename T, int N>
__device__ __forceinline__ void MultiplyAdd(float (&d)[4], const Operand<T, 4>& a,
                                            const Operand<T, N>& b, int index) {
  if constexpr (std::is_same_v<T, float>) {
    // The tensor cores truncate their sums. Summing eight products from zero and rounding them into
    // d outside brought the error of attention from 4-8 times that of plain float32 to 0.6-0.9
    // times, at 18% less speed (H100, d64 forward).
    float sum[4] = {};
    Mma16x8x8Tf32(sum, a.low, b.high[2 * index], b.high[2 * index + 1]);
    Mma16x8x8Tf32(sum, a.high, b.low[2 * index], b.low[2 * index + 1]);
    Mma16x8x8Tf32(sum, a.high, b.high[2 * index], b.high[2 * index + 1]);
#pragma unroll
    for (int i = 0; i < 4; ++i) d[i] += sum[i];
  } else if constexpr (std::is_same_v<T, Tf32>) {
    Mma16x8x8Tf32(d, a.bits, b.bits[2 * index], b.bits[2 * index + 1]);
  } else {
    Mma16x8x16<T>(d, a.bits, b.bits[2 * index], b.bits[2 * index + 1]);
  }
}

/// Loads four 8x8 matrices of 16-bit elements; lane l holds the address of row l % 8 of matrix
/// l / 8. Register i of a lane: matrix i, row lane / 4, columns 2 * (lane % 4) and the next.
__device__ __forceinline__ void LoadMatrix4(uint32_t (&r)[4], uint32_t shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared)
               : "memory");
}

/// The same with each matrix transposed.
__device__ __forceinline__ void LoadMatrix4Transposed(uint32_t (&r)[4], uint32_t shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared)
               : "memory");
}

__device__ __forceinline__ uint32_t LoadShared32(uint32_t shared) {
  uint32_t r;
  asm volatile("ld.shared.b32 %0, [%1];\n" : "=r"(r) : "r"(shared) : "memory");
  return r;
}

}  // namespace zenith
