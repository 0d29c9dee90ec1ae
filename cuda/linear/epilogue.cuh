// What follows the product of a linear layer, on float32 values in registers.
//
// silu and gelu (tanh) are y = x / (1 + exp(-x P(x^2))) with a polynomial P:
//   silu       P = 1
//   gelu tanh  P = 2 sqrt(2 / pi) (1 + 0.044715 s): (1 + tanh(w)) / 2 = 1 / (1 + exp(-2 w))
// Two operations of the special function unit each.
//
// gelu (erf) takes one: y = max(x, 0) - |x| (1 - Phi(|x|)), and 1 - Phi(t) = 2^(q(t / 2) - 1) with
// a q that is smooth, for which a polynomial serves: a minimax fit over t <= 5.5, falling beyond.
// Of h = x / 2, max(x, 0) = h + |h|, which is NaN for -inf, as in JAX, and the rest is |h|
// 2^q(|h|).
//
// Nothing cancels for negative x. The error of the fit, relative to the result, and what the
// result's type rounds by:
//              degree   x > 0    down to -4   down to -5.5   below, absolute   rounding
//   bfloat16     5      1.7e-4     1.8e-4        7.0e-4           9e-11         3.9e-3
//   float16      6      1.6e-5     1.8e-5        6.8e-5           2e-11         4.9e-4
#pragma once

#include <type_traits>

#include "cuda/core/convert.cuh"
#include "cuda/core/math.cuh"
#include "ffi/kernels/linear.h"

namespace zenith::linear {

/// The epilogues as the kernel has them, one body each. kLinear: kNone, kRelu and kReluSquared.
enum class Body { kLinear, kTanh, kSilu, kGeluTanh, kGeluErf };

template <int N>
struct Coefficients {
  static constexpr int kCount = N;
  float of[N];
};

/// Those of P, or of gelu (erf)'s q, the constant first.
template <typename T, Body kBody>
constexpr auto ExponentOf() {
  if constexpr (kBody == Body::kSilu) {
    return Coefficients<1>{{1.0f}};
  } else if constexpr (kBody == Body::kGeluTanh) {
    return Coefficients<2>{{1.5957691216f, 0.0713548163f}};
  } else if constexpr (std::is_same_v<T, __half>) {
    return Coefficients<7>{{-2.378222729e-05f, -2.301535585e+00f, -1.839541821e+00f,
                            -4.188681753e-01f, 1.222360892e-01f, -2.201209699e-02f,
                            1.787095271e-03f}};
  } else {
    return Coefficients<6>{{-2.517399876e-04f, -2.294986480e+00f, -1.869983330e+00f,
                            -3.673093420e-01f, 8.294109414e-02f, -8.282508810e-03f}};
  }
}

__device__ __forceinline__ float FastReciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}

/// Apply is given x times this.
template <Body kBody>
inline constexpr float kInputScale = kBody == Body::kGeluErf ? 0.5f : 1.0f;

template <typename T, Body kBody>
__device__ __forceinline__ float Apply(Epilogue epilogue, float x) {
  constexpr float kMinusLog2E = -1.4426950408889634f;
  if constexpr (kBody == Body::kLinear) {
    const float lower = epilogue == Epilogue::kNone ? -__builtin_huge_valf() : 0.0f;
    const float raised = x < lower ? lower : x;  // not fmaxf, which drops NaN
    return epilogue == Epilogue::kReluSquared ? raised * raised : raised;
  } else if constexpr (kBody == Body::kTanh) {
    // tanh(x) = 2 / (1 + exp(-2 x)) - 1, and its series where that cancels.
    const float s = x * x;
    const float series = x * fmaf(s, fmaf(s, 2.0f / 15, -1.0f / 3), 1.0f);  // to 6e-8 at 1/8
    const float quotient = fmaf(2.0f, FastReciprocal(1.0f + Exp2(2 * kMinusLog2E * x)), -1.0f);
    return fabsf(x) < 0.125f ? series : quotient;
  } else if constexpr (kBody == Body::kGeluErf) {
    constexpr auto kQ = ExponentOf<T, kBody>();
    constexpr float kMost = 4.5f;  // q falls as far, to -60; and no inf * 0 for x = inf
    const float t = fminf(fabsf(x), kMost);
    float q = kQ.of[kQ.kCount - 1];
#pragma unroll
    for (int i = kQ.kCount - 2; i >= 0; --i) q = fmaf(q, t, kQ.of[i]);
    return fmaf(-t, Exp2(q), x + fabsf(x));
  } else {
    constexpr auto kP = ExponentOf<T, kBody>();
    const float s = x * x;
    float exponent = kMinusLog2E * kP.of[kP.kCount - 1];
#pragma unroll
    for (int i = kP.kCount - 2; i >= 0; --i) exponent = fmaf(exponent, s, kMinusLog2E * kP.of[i]);
    return x * FastReciprocal(1.0f + Exp2(x * exponent));  // -inf * 0 is NaN, as in JAX
  }
}

}  // namespace zenith::linear
