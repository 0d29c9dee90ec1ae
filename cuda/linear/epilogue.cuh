// What follows the product of a linear layer, on float32 values in registers.
//
// silu and both gelus are one function, y = x / (1 + exp(-x P(x^2))) with a polynomial P:
//   silu       P = 1
//   gelu tanh  P = 2 sqrt(2 / pi) (1 + 0.044715 s): (1 + tanh(w)) / 2 = 1 / (1 + exp(-2 w))
//   gelu erf   P(s) = logit(Phi(x)) / x, which is smooth and even: a minimax fit over |x| <= 5.5,
//              rising beyond, so that what overflows does so to the right side
// Two operations of the special function unit each, and nothing cancels for negative x. The error
// of the fit, relative to the result, and what the result's type rounds by:
//              terms   x > 0    down to -4   down to -5.5   below, absolute   rounding
//   bfloat16     5     3.4e-4     1.2e-3        4.6e-3           8e-10         3.9e-3
//   float16      7     5.4e-5     1.7e-4        6.8e-4           5e-10         4.9e-4
#pragma once

#include <type_traits>

#include "cuda/core/convert.cuh"
#include "ffi/kernels/linear.h"

namespace zenith::linear {

/// The epilogues as the kernel has them, one body each. kLinear: kNone, kRelu and kReluSquared.
enum class Body { kLinear, kTanh, kSilu, kGeluTanh, kGeluErf };

template <int N>
struct Coefficients {
  static constexpr int kCount = N;
  float of[N];
};

/// Those of P, from that of s^0 on.
template <typename T, Body kBody>
constexpr auto ExponentOf() {
  if constexpr (kBody == Body::kSilu) {
    return Coefficients<1>{{1.0f}};
  } else if constexpr (kBody == Body::kGeluTanh) {
    return Coefficients<2>{{1.5957691216f, 0.0713548163f}};
  } else if constexpr (std::is_same_v<T, __half>) {
    return Coefficients<7>{{1.595274806e+00f, 7.337880135e-02f, -3.578560136e-04f,
                            -5.923020944e-05f, 3.568095281e-06f, -8.883773717e-08f,
                            8.447382793e-10f}};
  } else {
    return Coefficients<5>{{1.592935801e+00f, 7.560680807e-02f, -9.502316825e-04f, 6.980184935e-06f,
                            3.547192051e-08f}};
  }
}

__device__ __forceinline__ float FastExp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float FastReciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}

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
    const float quotient = fmaf(2.0f, FastReciprocal(1.0f + FastExp2(2 * kMinusLog2E * x)), -1.0f);
    return fabsf(x) < 0.125f ? series : quotient;
  } else {
    constexpr auto kP = ExponentOf<T, kBody>();
    const float s = x * x;
    float exponent = kMinusLog2E * kP.of[kP.kCount - 1];
#pragma unroll
    for (int i = kP.kCount - 2; i >= 0; --i) exponent = fmaf(exponent, s, kMinusLog2E * kP.of[i]);
    return x * FastReciprocal(1.0f + FastExp2(x * exponent));  // -inf * 0 is NaN, as in JAX
  }
}

}  // namespace zenith::linear
