// Element types: the one conversion to and from float32, and the one switch over DType.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "ffi/kernels/types.h"

namespace zenith {

__device__ __forceinline__ float ToFloat(float value) { return value; }
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

/// Two at once: one packing instruction where two conversions would take two and a permute.
__device__ __forceinline__ void FromFloat2(float low, float high, float* out) {
  out[0] = low;
  out[1] = high;
}
__device__ __forceinline__ void FromFloat2(float low, float high, __half* out) {
  const __half2 pair = __floats2half2_rn(low, high);
  out[0] = pair.x;
  out[1] = pair.y;
}
__device__ __forceinline__ void FromFloat2(float low, float high, __nv_bfloat16* out) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  out[0] = pair.x;
  out[1] = pair.y;
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
