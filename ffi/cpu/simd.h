// One vector register of float32 and what the CPU kernels need from it.
//
// This header, like every kernel header beside it, is compiled once per instruction set by isa_*.cc
// into a namespace of that set's name. Nothing here may leak out of that namespace: an inline
// function compiled with AVX-512 and merged by the linker with its portable twin would crash older
// machines. So the kernels use no inline function of the standard library either.
#pragma once

#include <cstdint>
#include <utility>

#include "ffi/kernels/types.h"

#if !defined(ZENITH_ISA) || !defined(ZENITH_LANES)
#error "include from isa_*.cc, which names the instruction set"
#endif

#if defined(__AVX512F__) && ZENITH_LANES == 16
#define ZENITH_AVX512 1
#elif defined(__AVX2__) && ZENITH_LANES == 8
#define ZENITH_AVX2 1
#endif
#if defined(ZENITH_AVX512) || defined(ZENITH_AVX2)
#include <immintrin.h>
#endif

#define ZENITH_INLINE inline __attribute__((always_inline))
/// For what does a task's work: of two inlined copies, the compiler may fuse products and sums
/// differently, and then the bits would depend on which thread got the task.
#define ZENITH_NOINLINE __attribute__((noinline))

namespace zenith::ZENITH_ISA {

inline constexpr int64_t kLanes = ZENITH_LANES;

typedef float F32 __attribute__((vector_size(kLanes * 4)));
typedef int32_t I32 __attribute__((vector_size(kLanes * 4)));
typedef uint32_t U32 __attribute__((vector_size(kLanes * 4)));
typedef uint16_t U16 __attribute__((vector_size(kLanes * 2)));

/// Storage of the 16-bit types; arithmetic is always float32.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

using Lanes = std::make_integer_sequence<int, kLanes>;

template <typename T>
constexpr T Min(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
constexpr T Max(T a, T b) {
  return a < b ? b : a;
}
constexpr int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t RoundUp(int64_t a, int64_t b) { return CeilDiv(a, b) * b; }

inline constexpr float kInfinity = __builtin_inff();
inline constexpr float kNaN = __builtin_nanf("");

ZENITH_INLINE F32 Splat(float x) { return x - F32{}; }  // x - 0 keeps -0 and NaN
ZENITH_INLINE I32 SplatI(int32_t x) { return x + I32{}; }

template <int... kI>
ZENITH_INLINE I32 Iota(std::integer_sequence<int, kI...>) {
  return I32{kI...};
}
/// 0, 1, 2, ...
ZENITH_INLINE I32 Iota() { return Iota(Lanes{}); }

/// All ones in lanes [0, n).
ZENITH_INLINE I32 FirstLanes(int64_t n) { return Iota() < SplatI(static_cast<int32_t>(n)); }

ZENITH_INLINE F32 Select(I32 mask, F32 yes, F32 no) { return mask ? yes : no; }

/// a * b + c; compiled with contraction, so fused where the machine can.
ZENITH_INLINE F32 Fma(F32 a, F32 b, F32 c) { return a * b + c; }
ZENITH_INLINE F32 Fma(F32 a, float b, F32 c) { return a * b + c; }

/// Both give b where a or b is NaN: put what may be NaN second to keep it.
ZENITH_INLINE F32 Max(F32 a, F32 b) {
#if defined(ZENITH_AVX512)
  return (F32)_mm512_maskz_max_ps(0xffff, (__m512)a, (__m512)b);
#elif defined(ZENITH_AVX2)
  return (F32)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}
ZENITH_INLINE F32 Min(F32 a, F32 b) {
#if defined(ZENITH_AVX512)
  return (F32)_mm512_maskz_min_ps(0xffff, (__m512)a, (__m512)b);
#elif defined(ZENITH_AVX2)
  return (F32)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return a < b ? a : b;
#endif
}
ZENITH_INLINE F32 Abs(F32 x) { return (F32)((I32)x & 0x7fffffff); }

/// 1 / x to 1 ulp or so; x and 1 / x normal floats.
ZENITH_INLINE F32 Reciprocal(F32 x) {
#if defined(ZENITH_AVX512)
  // One Newton step on the 14-bit estimate: 3 operations where a division blocks the port for 16
  // cycles.
  const F32 r = (F32)_mm512_maskz_rcp14_ps(0xffff, (__m512)x);
  return r * (2.0f - x * r);
#else
  return 1.0f / x;
#endif
}

/// Whether any lane of a comparison holds.
ZENITH_INLINE bool Any(I32 mask) {
#if defined(ZENITH_AVX512)
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#else
  int32_t any = 0;
  for (int64_t i = 0; i < kLanes; ++i) any |= mask[i];
  return any != 0;
#endif
}

#if defined(ZENITH_AVX512)
/// Element index % 32 of the 32 floats (low, high): one operation, no memory access.
ZENITH_INLINE F32 Lookup(I32 index, F32 low, F32 high) {
  return (F32)_mm512_permutex2var_ps((__m512)low, (__m512i)index, (__m512)high);
}
#endif

// --- Loads and stores. With a `Part` they touch only the first n elements, 0 < n < kLanes; a load
// fills the other lanes with 0.

struct Whole {};
struct Part {
  int64_t n;
};

ZENITH_INLINE F32 Load(const float* p) {
  F32 v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
ZENITH_INLINE void Store(float* p, F32 v) { __builtin_memcpy(p, &v, sizeof v); }

ZENITH_INLINE U16 LoadBits(const void* p) {
  U16 v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
ZENITH_INLINE U16 LoadBits(const void* p, Part part) {
#if defined(ZENITH_AVX512)
  return (U16)_mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << part.n) - 1), p);
#else
  uint16_t lanes[kLanes] = {};
  for (int64_t i = 0; i < part.n; ++i) lanes[i] = static_cast<const uint16_t*>(p)[i];
  return LoadBits(lanes);
#endif
}
ZENITH_INLINE void StoreBits(void* p, U16 v) { __builtin_memcpy(p, &v, sizeof v); }
ZENITH_INLINE void StoreBits(void* p, U16 v, Part part) {
#if defined(ZENITH_AVX512)
  _mm256_mask_storeu_epi16(p, static_cast<__mmask16>((1u << part.n) - 1), (__m256i)v);
#else
  uint16_t lanes[kLanes];
  StoreBits(lanes, v);
  for (int64_t i = 0; i < part.n; ++i) static_cast<uint16_t*>(p)[i] = lanes[i];
#endif
}

ZENITH_INLINE F32 Load(const float* p, Part part) {
#if defined(ZENITH_AVX512)
  return (F32)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << part.n) - 1), p);
#elif defined(ZENITH_AVX2)
  return (F32)_mm256_maskload_ps(p, (__m256i)FirstLanes(part.n));
#else
  float lanes[kLanes] = {};
  for (int64_t i = 0; i < part.n; ++i) lanes[i] = p[i];
  return Load(lanes);
#endif
}
ZENITH_INLINE void Store(float* p, F32 v, Part part) {
#if defined(ZENITH_AVX512)
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << part.n) - 1), (__m512)v);
#elif defined(ZENITH_AVX2)
  _mm256_maskstore_ps(p, (__m256i)FirstLanes(part.n), (__m256)v);
#else
  float lanes[kLanes];
  Store(lanes, v);
  for (int64_t i = 0; i < part.n; ++i) p[i] = lanes[i];
#endif
}

// --- 16-bit conversions, round to nearest even, NaN to NaN.

ZENITH_INLINE F32 FromBFloat16(U16 bits) { return (F32)(__builtin_convertvector(bits, U32) << 16); }
ZENITH_INLINE U16 ToBFloat16(F32 v) {
  const U32 u = (U32)v;
  const U32 rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const U32 quiet = (u >> 16) | 0x40u;  // rounding could carry a NaN's payload into the sign
  return __builtin_convertvector(v == v ? rounded : quiet, U16);
}

ZENITH_INLINE F32 FromHalf(U16 bits) {
#if defined(ZENITH_AVX512)
  return (F32)_mm512_maskz_cvtph_ps(0xffff, (__m256i)bits);
#elif defined(ZENITH_AVX2)
  return (F32)_mm256_cvtph_ps((__m128i)bits);
#else
  const U32 u = __builtin_convertvector(bits, U32);
  // The exponent moves from bias 15 to 127 by a product, which renormalises subnormals too.
  const F32 magnitude = (F32)((u & 0x7fffu) << 13) * 0x1p112f;
  const I32 special = (I32)((u & 0x7c00u) == 0x7c00u);  // inf and NaN keep a full exponent
  return (F32)((U32)magnitude | ((U32)special & 0x7f800000u) | ((u & 0x8000u) << 16));
#endif
}
ZENITH_INLINE U16 ToHalf(F32 v) {
#if defined(ZENITH_AVX512)
  return (U16)_mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT);
#elif defined(ZENITH_AVX2)
  return (U16)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
#else
  const U32 sign = (U32)v & 0x80000000u;
  const U32 u = (U32)v ^ sign;
  // Normal results: rebias, then round the 13 bits that go; a carry into the exponent is right, and
  // gives inf from 65520 on.
  const U32 normal = (u - (112u << 23) + 0xfffu + ((u >> 13) & 1u)) >> 13;
  // Subnormal results (below 2^-14): the adder aligns and rounds them to multiples of 2^-24.
  const U32 subnormal = (U32)((F32)u + 0.5f) - 0x3f000000u;
  const U32 big = u > 0x7f800000u ? U32{} + 0x7e00u : U32{} + 0x7c00u;
  U32 half = u < 0x38800000u ? subnormal : normal;
  half = u >= 0x47800000u ? big : half;
  return __builtin_convertvector(half | (sign >> 16), U16);
#endif
}

ZENITH_INLINE F32 Load(const Half* p) { return FromHalf(LoadBits(p)); }
ZENITH_INLINE F32 Load(const Half* p, Part part) { return FromHalf(LoadBits(p, part)); }
ZENITH_INLINE void Store(Half* p, F32 v) { StoreBits(p, ToHalf(v)); }
ZENITH_INLINE void Store(Half* p, F32 v, Part part) { StoreBits(p, ToHalf(v), part); }
ZENITH_INLINE F32 Load(const BFloat16* p) { return FromBFloat16(LoadBits(p)); }
ZENITH_INLINE F32 Load(const BFloat16* p, Part part) { return FromBFloat16(LoadBits(p, part)); }
ZENITH_INLINE void Store(BFloat16* p, F32 v) { StoreBits(p, ToBFloat16(v)); }
ZENITH_INLINE void Store(BFloat16* p, F32 v, Part part) { StoreBits(p, ToBFloat16(v), part); }

template <typename T>
ZENITH_INLINE F32 Load(const T* p, Whole) {
  return Load(p);
}
template <typename T>
ZENITH_INLINE void Store(T* p, F32 v, Whole) {
  Store(p, v);
}
/// The lanes that count; the others become `fill`.
ZENITH_INLINE F32 Fill(F32 v, Whole, float) { return v; }
ZENITH_INLINE F32 Fill(F32 v, Part part, float fill) {
  return Select(FirstLanes(part.n), v, Splat(fill));
}

/// Runs body(i, part) over [0, size) in steps of kLanes; part is Whole but for the tail.
template <typename Body>
ZENITH_INLINE void ForVectors(int64_t size, Body body) {
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) body(i, Whole{});
  if (i < size) body(i, Part{size - i});
}

// --- Across lanes.

template <int kStep, int... kI>
ZENITH_INLINE F32 Swap(F32 v, std::integer_sequence<int, kI...>) {
  return __builtin_shufflevector(v, v, (kI ^ kStep)...);
}

/// Sum of the lanes, always in the same order.
ZENITH_INLINE float Sum(F32 v) {
  if constexpr (kLanes >= 16) v += Swap<8>(v, Lanes{});
  if constexpr (kLanes >= 8) v += Swap<4>(v, Lanes{});
  v += Swap<2>(v, Lanes{});
  v += Swap<1>(v, Lanes{});
  return v[0];
}
ZENITH_INLINE float Maximum(F32 v) {
  if constexpr (kLanes >= 16) v = Max(v, Swap<8>(v, Lanes{}));
  if constexpr (kLanes >= 8) v = Max(v, Swap<4>(v, Lanes{}));
  v = Max(v, Swap<2>(v, Lanes{}));
  v = Max(v, Swap<1>(v, Lanes{}));
  return v[0];
}

/// Combines body(i, part) over [0, size) lane by lane, in four chains that overlap. The order
/// depends on the size only.
template <typename Combine, typename Body>
ZENITH_INLINE F32 Reduce(int64_t size, float identity, Combine combine, Body body) {
  F32 a = Splat(identity), b = a, c = a, d = a;
  int64_t i = 0;
  for (; i + 4 * kLanes <= size; i += 4 * kLanes) {
    a = combine(a, body(i, Whole{}));
    b = combine(b, body(i + kLanes, Whole{}));
    c = combine(c, body(i + 2 * kLanes, Whole{}));
    d = combine(d, body(i + 3 * kLanes, Whole{}));
  }
  ForVectors(size - i, [&](int64_t j, auto part) {
    a = combine(a, Fill(body(i + j, part), part, identity));
  });
  return combine(combine(a, b), combine(c, d));
}
template <typename Body>
ZENITH_INLINE float SumOver(int64_t size, Body body) {
  return Sum(Reduce(size, 0.0f, [](F32 a, F32 b) { return a + b; }, body));
}

}  // namespace zenith::ZENITH_ISA
