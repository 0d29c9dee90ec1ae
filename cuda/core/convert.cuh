// Element types: the one conversion to and from float32, and the one switch over DType.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "ffi/kernels/types.h"

namespace zenith {

/// A float32 in memory, of which tensor cores take the upper 10 bits of the mantissa
/// (TensorFloat-32, rounded to nearest): what JAX's default precision allows products of float32 on
/// a GPU.
struct Tf32 {
  float value;
};

__device__ __forceinline__ float ToFloat(float value) { return value; }
__device__ __forceinline__ float ToFloat(Tf32 value) { return value.value; }
__device__ __forceinline__ float ToFloat(__half value) { return __half2float(value); }
__device__ __forceinline__ float ToFloat(__nv_bfloat16 value) { return __bfloat162float(value); }

/// Rounds to nearest even; float16 overflows to infinity, NaN stays NaN.
template <typename T>
__device__ __forceinline__ T FromFloat(float value);
template <>
__device__ __forceinline__ float FromFloat<float>(float value) {
  return value;
}
template <>
__device__ __forceinline__ __half FromFloat<__half>(float value) {
  return __float2half_rn(value);
}
template <>
__device__ __forceinline__ __nv_bfloat16 FromFloat<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}

/// Two 16-bit values in one register, the first in the lower half: one instruction each way where
/// element by element the compiler unpacks into a register per value, and keeps those.
template <typename T>
__device__ __forceinline__ uint32_t PackPair(float first, float second) {
  uint32_t word;
  if constexpr (std::is_same_v<T, __half>) {
    const __half2 pair = __floats2half2_rn(first, second);
    memcpy(&word, &pair, sizeof(word));
  } else {
    static_assert(std::is_same_v<T, __nv_bfloat16>);
    const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
    memcpy(&word, &pair, sizeof(word));
  }
  return word;
}
template <typename T>
__device__ __forceinline__ float2 UnpackPair(uint32_t word) {
  if constexpr (std::is_same_v<T, __half>) {
    __half2 pair;
    memcpy(&pair, &word, sizeof(word));
    return __half22float2(pair);
  } else {
    static_assert(std::is_same_v<T, __nv_bfloat16>);  // the upper half of a float32
    return {__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u)};
  }
}

/// Calls `body.template operator()<T>()` with the element type of `dtype`; `body` returns a Status.
template <typename Body>
Status DispatchDType(DType dtype, Body&& body) {
  switch (dtype) {
    case DType::kF32:
      return body.template operator()<float>();
    case DType::kF16:
      return body.template operator()<__half>();
    case DType::kBF16:
      return body.template operator()<__nv_bfloat16>();
  }
  return {"dtype must be float32, float16 or bfloat16"};
}

/// The same with `operator()<T, P>()`, where the parameters' type P is T or float32.
template <typename Body>
Status DispatchDTypes(DType dtype, DType param_dtype, Body&& body) {
  if (param_dtype != dtype && param_dtype != DType::kF32) {
    return {"param_dtype must be dtype or float32"};
  }
  return DispatchDType(dtype, [&]<typename T>() {
    return param_dtype == dtype ? body.template operator()<T, T>()
                                : body.template operator()<T, float>();
  });
}

}  // namespace zenith
