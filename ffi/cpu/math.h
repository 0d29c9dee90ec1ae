// Vector exponential. Coefficients: minimax fits (Lawson's iteration) of our own, in float64.
#pragma once

#include "ffi/cpu/simd.h"

namespace zenith::ZENITH_ISA {

/// Nearest integer, |x| < 2^22: adding 1.5 * 2^23 leaves no fraction bits.
ZENITH_INLINE F32 RoundToInteger(F32 x) {
  constexpr float kMagic = 12582912.0f;
  return (x + kMagic) - kMagic;
}

/// x * 2^n for an integer |n| <= 252, with right overflow to inf and underflow through subnormals.
ZENITH_INLINE F32 ScaleByPowerOf2(F32 x, F32 n) {
#if defined(ZENITH_AVX512)
  return (F32)_mm512_maskz_scalef_ps(0xffff, (__m512)x, (__m512)n);
#else
  // In two factors: 2^n itself need not be a float.
  const I32 exponent = __builtin_convertvector(n, I32);
  const I32 half = exponent >> 1;
  return x * (F32)((half + 127) << 23) * (F32)((exponent - half + 127) << 23);
#endif
}

/// 2^x for x <= 127, error 1.5 ulp: what softmax needs. 0 for -inf, NaN for NaN.
ZENITH_INLINE F32 Exp2(F32 x) {
  x = Max(Splat(-152.0f), x);  // rounds to 0 from -150 on
  const F32 n = RoundToInteger(x);
  const F32 r = x - n;
  // 2^r on [-1/2, 1/2], relative error 9e-8.
  F32 p = Splat(0.001326472731307149f);
  p = Fma(p, r, Splat(0.009671512991189957f));
  p = Fma(p, r, Splat(0.05550733581185341f));
  p = Fma(p, r, Splat(0.24022242426872253f));
  p = Fma(p, r, Splat(0.6931470036506653f));
  p = Fma(p, r, Splat(1.0f));
  return ScaleByPowerOf2(p, n);
}

/// exp(x + low), |low| << 1: the low part of an argument that one float cannot hold. Error 1 ulp or
/// so. 0 for -inf, inf for inf, NaN for NaN in x.
ZENITH_INLINE F32 Exp(F32 x, F32 low) {
  x = Min(Splat(90.0f), Max(Splat(-105.0f), x));  // inf above 88.73, 0 below -103.98
  const F32 n = RoundToInteger(x * 1.44269504088896341f);
  // ln 2 in two parts; n * high is exact without a fused product too (9 + 10 bits).
  F32 r = Fma(n, Splat(-0.693359375f), x);
  r = Fma(n, Splat(2.12194440e-4f), r) + low;
  // exp(r) on [-ln(2)/2, ln(2)/2], relative error 3e-9.
  F32 p = Splat(0.001381459878757596f);
  p = Fma(p, r, Splat(0.008368716575205326f));
  p = Fma(p, r, Splat(0.04166838899254799f));
  p = Fma(p, r, Splat(0.1666652113199234f));
  p = Fma(p, r, Splat(0.4999999403953552f));
  p = Fma(p, r * r, r) + 1.0f;
  return ScaleByPowerOf2(p, n);
}
ZENITH_INLINE F32 Exp(F32 x) { return Exp(x, F32{}); }

/// tanh(x), error 2 ulp.
ZENITH_INLINE F32 Tanh(F32 x) {
  // x + x^3 p(x^2) on |x| <= 0.55, relative error 1e-9.
  const F32 u = x * x;
  F32 p = Splat(-0.0062742396257817745f);
  p = Fma(p, u, Splat(0.021071679890155792f));
  p = Fma(p, u, Splat(-0.05385230854153633f));
  p = Fma(p, u, Splat(0.13332585990428925f));
  p = Fma(p, u, Splat(-0.33333316445350647f));
  const F32 one = Splat(1.0f);
  const F32 far = one - 2.0f * Reciprocal(one + Exp(Min(Splat(40.0f), 2.0f * Abs(x))));
  const F32 sign = (F32)((I32)x & SplatI(INT32_MIN));
  return Select(Abs(x) < 0.5f, Fma(p, u * x, x), (F32)((I32)far | (I32)sign));
}

/// 1 / (1 + exp(-x)) as a product, which underflows only when multiplied out.
struct SigmoidFactors {
  F32 large, small;  // large in [1/2, 1]
  F32 opposite;      // `small` of Sigmoid(-x)
  F32 value() const { return large * small; }
  /// 1 - value, without its cancellation.
  F32 complement() const { return large * opposite; }
};
ZENITH_INLINE SigmoidFactors Sigmoid(F32 x) {
  const F32 e = Exp(-Abs(x));  // never overflows: exp(x) / (1 + exp(x)) for x < 0
  const F32 one = Splat(1.0f);
  return {Reciprocal(one + e), Select(x < 0.0f, e, one), Select(x < 0.0f, one, e)};
}

}  // namespace zenith::ZENITH_ISA
