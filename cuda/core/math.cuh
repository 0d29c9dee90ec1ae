// Elementary functions, as precise as the element type of the result needs.
#pragma once

namespace zenith {

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

}  // namespace zenith
