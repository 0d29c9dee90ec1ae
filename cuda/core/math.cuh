// Elementary functions, as precise as the element type of the result needs.
#pragma once

namespace zenith {

inline constexpr float kLog2E = 1.4426950408889634f;

/// 2^x in one instruction; 2^-inf = 0, and so is what is below 2^-126.
__device__ __forceinline__ float Exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}

/// exp(x) for a result rounded to T. __expf errs by up to |x| * 2^-23 relative: below half a unit
/// of a 16-bit type wherever its result is not zero. float32 gets the 1-ulp function.
template <typename T>
__device__ __forceinline__ float Exp(float x) {
  if constexpr (sizeof(T) == 2) {
    return __expf(x);
  } else {
    return expf(x);
  }
}

/// tanh(x) for a result rounded to T. 1 - 2 / (1 + exp(2x)) errs by 2^-22 absolute, which cancels
/// near 0: enough for logits, of which the absolute error counts. float32 gets the library's.
template <typename T>
__device__ __forceinline__ float Tanh(float x) {
  if constexpr (sizeof(T) == 2) {
    return 1.f - __fdividef(2.f, 1.f + __expf(2.f * x));
  } else {
    return tanhf(x);
  }
}

}  // namespace zenith
