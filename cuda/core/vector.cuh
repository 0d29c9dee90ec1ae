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
/// one: N = 1, or an even number. Past 16 bytes (float32 parameters beside 8 bfloat16s) it moves in
/// several accesses.
template <typename T, int N>
struct Vector {
  static_assert(N == 1 || N % 2 == 0);
  static constexpr int kBytes = N * int{sizeof(T)};
  static constexpr int kAlignment = kBytes < kVectorBytes ? kBytes : kVectorBytes;
  using Word = std::conditional_t<N == 1, T, uint32_t>;  // what one register holds
  static constexpr int kWords = N == 1 ? 1 : kBytes / int{sizeof(uint32_t)};

  alignas(kAlignment) Word words[kWords];
};

/// `address` must be a multiple of the vector's size, or of 16 bytes; see AreAligned.
template <int N, typename T>
__device__ __forceinline__ Vector<T, N> LoadVector(const T* address) {
  return *reinterpret_cast<const Vector<T, N>*>(address);
}

/// The same from memory no running kernel writes. The compiler may then move the load up across
/// stores, so that the loads of a loop wait together and not one after another.
template <int N, typename T>
__device__ __forceinline__ Vector<T, N> LoadReadOnly(const T* address) {
  Vector<T, N> vector;
  if constexpr (Vector<T, N>::kBytes % kVectorBytes == 0) {
#pragma unroll
    for (int i = 0; i < Vector<T, N>::kBytes / kVectorBytes; ++i) {
      const uint4 part = __ldg(reinterpret_cast<const uint4*>(address) + i);
      vector.words[4 * i] = part.x;
      vector.words[4 * i + 1] = part.y;
      vector.words[4 * i + 2] = part.z;
      vector.words[4 * i + 3] = part.w;
    }
  } else {
    static_assert(N == 1);
    vector.words[0] = __ldg(address);
  }
  return vector;
}

template <typename T, int N>
__device__ __forceinline__ void StoreVector(T* address, const Vector<T, N>& vector) {
  *reinterpret_cast<Vector<T, N>*>(address) = vector;
}

template <typename T, int N>
__device__ __forceinline__ void ToFloat(const Vector<T, N>& vector, float (&values)[N]) {
  if constexpr (N == 1) {
    values[0] = ToFloat(vector.words[0]);
  } else if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int i = 0; i < N; i += 2) {
      const float2 pair = UnpackPair<T>(vector.words[i / 2]);
      values[i] = pair.x;
      values[i + 1] = pair.y;
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) values[i] = __uint_as_float(vector.words[i]);
  }
}

template <typename T, int N>
__device__ __forceinline__ Vector<T, N> FromFloat(const float (&values)[N]) {
  Vector<T, N> vector;
  if constexpr (N == 1) {
    vector.words[0] = FromFloat<T>(values[0]);
  } else if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int i = 0; i < N; i += 2) vector.words[i / 2] = PackPair<T>(values[i], values[i + 1]);
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) vector.words[i] = __float_as_uint(values[i]);
  }
  return vector;
}

/// Makes the compiler convert `vector` anew: otherwise it keeps the float32 values of an earlier
/// pass over a 16-bit row, in twice the registers, and spills them at 32 elements a thread.
template <typename T, int N>
__device__ __forceinline__ void ForgetFloats(Vector<T, N>& vector) {
  if constexpr (N > 1 && sizeof(T) == 2) {
#pragma unroll
    for (uint32_t& word : vector.words) asm volatile("" : "+r"(word));
  }
}

/// Whether each pointer can be the address of a 16-byte access. Null counts as aligned.
template <typename... Pointers>
bool AreAligned(const Pointers*... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) | ... | 0) % kVectorBytes) == 0;
}

}  // namespace zenith
