// The one vector load and store: N elements that cross memory together.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/core/convert.cuh"

namespace zenith {

inline constexpr int kVectorBytes = 16;  // the widest load and store one thread can issue (sm_80+)

/// Elements of T in one 16-byte vector.
template <typename T>
inline constexpr int kVectorSize = kVectorBytes / int{sizeof(T)};

/// N elements in T's own format, so that a bfloat16 row held in registers costs half of a float32
/// one. More than 16 bytes (float32 parameters beside 8 bfloat16s) move as several 16-byte
/// accesses.
template <typename T, int N>
struct alignas(N * sizeof(T) < kVectorBytes ? N * sizeof(T) : kVectorBytes) Vector {
  T elements[N];
};

/// `address` must have Vector's alignment; see AreAligned.
template <int N, typename T>
__device__ __forceinline__ Vector<T, N> LoadVector(const T* address) {
  return *reinterpret_cast<const Vector<T, N>*>(address);
}

template <typename T, int N>
__device__ __forceinline__ void StoreVector(T* address, const Vector<T, N>& vector) {
  *reinterpret_cast<Vector<T, N>*>(address) = vector;
}

/// A vector of 16-bit elements as the registers that hold it.
template <int N>
struct Words {
  static_assert(N % 2 == 0);
  uint32_t words[N / 2];
};

template <typename T, int N>
__device__ __forceinline__ void ToFloat(const Vector<T, N>& vector, float (&values)[N]) {
  if constexpr (std::is_same_v<T, __nv_bfloat16> && N % 2 == 0) {
    // bfloat16 is float32's upper half. Written out on words, because element by element the
    // compiler unpacks a row into one register per element and keeps those: 8 x 8 elements spill.
    const auto packed = __builtin_bit_cast(Words<N>, vector);
#pragma unroll
    for (int i = 0; i < N; i += 2) {
      values[i] = __uint_as_float(packed.words[i / 2] << 16);
      values[i + 1] = __uint_as_float(packed.words[i / 2] & 0xffff0000u);
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) values[i] = ToFloat(vector.elements[i]);
  }
}

template <typename T, int N>
__device__ __forceinline__ Vector<T, N> FromFloat(const float (&values)[N]) {
  Vector<T, N> vector;
  if constexpr (N % 2 == 0) {
#pragma unroll
    for (int i = 0; i < N; i += 2) FromFloat2(values[i], values[i + 1], &vector.elements[i]);
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) vector.elements[i] = FromFloat<T>(values[i]);
  }
  return vector;
}

/// Makes the compiler convert `vector` anew: otherwise it keeps the float32 values of an earlier
/// pass over a 16-bit row, in twice the registers, and spills them at 32 elements a thread.
template <typename T, int N>
__device__ __forceinline__ void ForgetFloats(Vector<T, N>& vector) {
  if constexpr (sizeof(T) == 2 && N % 2 == 0) {
    auto packed = __builtin_bit_cast(Words<N>, vector);
#pragma unroll
    for (uint32_t& word : packed.words) asm volatile("" : "+r"(word));
    vector = __builtin_bit_cast(Vector<T, N>, packed);
  }
}

/// Whether each pointer can be the address of a 16-byte access. Null counts as aligned.
template <typename... Pointers>
bool AreAligned(const Pointers*... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) | ... | 0) % kVectorBytes) == 0;
}

}  // namespace zenith
