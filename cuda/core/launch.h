// A CUDA stream, as the kernel contracts know it.
#pragma once

#include <cuda_runtime_api.h>

#include "ffi/kernels/types.h"

namespace zenith {

/// Launchers enqueue on `stream` and return; they never allocate, synchronise or read device memory
/// on the host, so that XLA can capture them into a CUDA graph.
struct Launch {
  cudaStream_t stream;
};

/// The error of the launch just made, if any.
inline Status LastLaunch() {
  const cudaError_t error = cudaPeekAtLastError();
  return error == cudaSuccess ? Status{} : Status{cudaGetErrorString(cudaGetLastError())};
}

}  // namespace zenith
