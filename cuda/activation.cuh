// The three activations as one shape: y = x * F(u(x)), F a cumulative distribution, f its density;
//   y' = F(u) + x * f(u) * u'
// kGeluErf: F normal, u = x.  kSilu: F logistic, u = x.  kGeluTanh: F logistic, because
// (1 + tanh(w)) / 2 = 1 / (1 + exp(-2w)), which does not cancel for negative w as 1 + tanh does.
#pragma once

#include "cuda/core/math.cuh"
#include "ffi/kernels/activation.h"

namespace zenith {

struct Distribution {
  float cumulative, density;
};

/// 1 / (1 + exp(-x)) and its derivative, from exp(-|x|) <= 1: nothing overflows or cancels.
template <typename T>
__device__ __forceinline__ Distribution Logistic(float x) {
  const float tail = Exp<T>(-fabsf(x));
  const float upper = __fdividef(1.0f, 1.0f + tail);
  const float lower = tail * upper;
  return {x < 0 ? lower : upper, lower * upper};
}

/// The standard normal distribution, |x| <= 128. With a = |x| and t = 1 / (1 + 0.3 a), the lower
/// tail is exp(-a^2 / 2) * t * Q(t); Q is our minimax fit over [0, 14] to a relative error of
/// 1.5e-7 (4e-7 in float32 arithmetic), so the tail keeps its digits, unlike (1 + erf) / 2, and the
/// density costs nothing more.
template <typename T>
__device__ __forceinline__ Distribution Normal(float x) {
  constexpr float kQ[] = {0.1196293f,     0.120753938f, 0.099913598f,  0.128561311f,
                          -0.0536831335f, 0.20635307f,  -0.157202912f, 0.0356747559f};
  constexpr int kTerms = sizeof(kQ) / sizeof(kQ[0]);
  constexpr float kInverseSqrtTwoPi = 0.3989422804f;
  const float square = x * x;
  float kernel = Exp<T>(-0.5f * square);
  if constexpr (sizeof(T) == 4) {
    // What rounding took from x^2: at x = -5 it would cost 7e-7 relative.
    kernel = fmaf(-0.5f * fmaf(x, x, -square), kernel, kernel);
  }
  const float t = __fdividef(1.0f, fmaf(0.3f, fabsf(x), 1.0f));
  float polynomial = kQ[kTerms - 1];
#pragma unroll
  for (int i = kTerms - 2; i >= 0; --i) polynomial = fmaf(polynomial, t, kQ[i]);
  const float tail = kernel * t * polynomial;
  return {x < 0 ? tail : 1.0f - tail, kInverseSqrtTwoPi * kernel};
}

template <Activation kKind, typename T>
struct ActivationFunction {
  // Beyond it F is 0 or 1 and f is 0 for all three, exactly; infinity would give 0 * inf.
  static constexpr float kLimit = 128;
  // u = x * (kLinear + kCubic * x^2); 2 * sqrt(2 / pi) times 1 and 0.044715 for kGeluTanh.
  static constexpr float kLinear = kKind == Activation::kGeluTanh ? 1.5957691216f : 1.0f;
  static constexpr float kCubic = kKind == Activation::kGeluTanh ? 0.0713548163f : 0.0f;

  static __device__ __forceinline__ float Value(float x) {
    const float low = x < -kLimit ? -kLimit : x;  // not fmaxf, which drops NaN
    const float high = low > kLimit ? kLimit : low;
    const float nan_of_minus_infinity = fminf(x, 0.0f) * 0.0f;
    return fmaf(low, At(high).cumulative, nan_of_minus_infinity);
  }

  static __device__ __forceinline__ float Derivative(float x) {
    const float low = x < -kLimit ? -kLimit : x;
    const float high = low > kLimit ? kLimit : low;
    const Distribution d = At(high);
    return fmaf(high * d.density, kLinear + 3 * kCubic * high * high, d.cumulative);
  }

 private:
  static __device__ __forceinline__ Distribution At(float x) {
    if constexpr (kKind == Activation::kGeluErf) {
      return Normal<T>(x);
    } else {
      return Logistic<T>(x * (kLinear + kCubic * x * x));
    }
  }
};

}  // namespace zenith
