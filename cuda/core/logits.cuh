// What softmax and cross entropy do with logits: the largest one, and weights relative to it.
#pragma once

#include <type_traits>

#include "cuda/core/math.cuh"
#include "cuda/core/vector.cuh"

namespace zenith {

/// exp(below), `below` a logit less the largest one, for sums and quotients that are rounded to T:
/// where Exp<T> has five instructions, two. They err as much, and make zero of what is below
/// 2^-126, which beside the largest logit's 1 is nothing.
template <typename T>
__device__ __forceinline__ float Weight(float below) {
  if constexpr (sizeof(T) == 2) {
    return Exp2(kLog2E * below);
  } else {
    return Exp<T>(below);
  }
}

/// Of each element the larger; a number rather than NaN. Two 16-bit elements an instruction.
template <typename T, int N>
__device__ __forceinline__ Vector<T, N> Larger(const Vector<T, N>& a, const Vector<T, N>& b) {
  Vector<T, N> larger;
#pragma unroll
  for (int i = 0; i < Vector<T, N>::kWords; ++i) {
    if constexpr (N == 1) {
      larger.words[i] = FromFloat<T>(fmaxf(ToFloat(a.words[i]), ToFloat(b.words[i])));
    } else if constexpr (std::is_same_v<T, float>) {
      larger.words[i] =
          __float_as_uint(fmaxf(__uint_as_float(a.words[i]), __uint_as_float(b.words[i])));
    } else if constexpr (std::is_same_v<T, __half>) {
      asm("max.f16x2 %0, %1, %2;\n" : "=r"(larger.words[i]) : "r"(a.words[i]), "r"(b.words[i]));
    } else {
      asm("max.bf16x2 %0, %1, %2;\n" : "=r"(larger.words[i]) : "r"(a.words[i]), "r"(b.words[i]));
    }
  }
  return larger;
}

/// The largest element; -inf if all are NaN.
template <typename T, int N>
__device__ __forceinline__ float Largest(const Vector<T, N>& vector) {
  float values[N], largest = -INFINITY;
  ToFloat(vector, values);
#pragma unroll
  for (float value : values) largest = fmaxf(largest, value);
  return largest;
}

template <typename T, int N>
__device__ __forceinline__ Vector<T, N> MinusInfinity() {
  float values[N];
#pragma unroll
  for (float& value : values) value = -INFINITY;
  return FromFloat<T>(values);
}

}  // namespace zenith
