// Tiles of rows of a head in shared memory, filled by TMA and read by wgmma: blocks of 64 features,
// a block all rows of 128 bytes (cuda/core/wgmma.cuh).
#pragma once

#include "cuda/attention/score.cuh"
#include "cuda/core/tensor_map.h"
#include "cuda/core/tma.cuh"
#include "cuda/core/wgmma.cuh"

namespace zenith::attention::hopper {

inline constexpr int kMaxSharedBytes = 227 * 1024;  // of a block; CUDA C++ Programming Guide, 9.0

/// Features are padded to whole blocks; those beyond `dim` are filled with zeros and not
/// multiplied.
constexpr int BlocksOf(int dim) { return (dim + kBoxFeatures - 1) / kBoxFeatures; }
constexpr int TileBytes(int rows, int dim) { return rows * BlocksOf(dim) * kBlockRowBytes; }

/// One thread starts to fill a tile with rows from `row` on; `barrier` must have been told to
/// expect its TileBytes. Rows and features beyond the tensor become zeros.
template <int kRows, int kDim>
__device__ __forceinline__ void LoadTile(uint32_t tile, const CUtensorMap& map, uint32_t barrier,
                                         int row, int head, int batch) {
#pragma unroll
  for (int block = 0; block < BlocksOf(kDim); ++block)
    TmaLoad(tile + block * kRows * kBlockRowBytes, map, barrier, block * kBoxFeatures, row, head,
            batch);
}

__device__ __forceinline__ void StoreShared(uint32_t shared, float2 x) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};\n" ::"r"(shared), "f"(x.x), "f"(x.y) : "memory");
}
__device__ __forceinline__ void StoreShared(uint32_t shared, float x) {
  asm volatile("st.shared.f32 [%0], %1;\n" ::"r"(shared), "f"(x) : "memory");
}
__device__ __forceinline__ void StoreShared(uint32_t shared, float4 x) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};\n" ::"r"(shared), "f"(x.x), "f"(x.y),
               "f"(x.z), "f"(x.w)
               : "memory");
}
__device__ __forceinline__ float2 LoadShared2(uint32_t shared) {
  float2 x;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];\n"
               : "=f"(x.x), "=f"(x.y)
               : "r"(shared)
               : "memory");
  return x;
}
__device__ __forceinline__ float4 LoadShared4(uint32_t shared) {
  float4 x;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];\n"
               : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
               : "r"(shared)
               : "memory");
  return x;
}

/// Maps of tensors with the queries' or the keys' heads and length, for tiles of `rows` rows.
inline Status QueryMap(const AttentionProblem& p, const void* base, const HeadStrides& strides,
                       int64_t features, int rows, CUtensorMap& map) {
  return MakeTensorMap({p.dtype, base, p.batch, p.kv_heads * p.groups, p.q_len, features,
                        strides.batch, strides.head, strides.length},
                       rows, map);
}
inline Status KeyMap(const AttentionProblem& p, const void* base, const HeadStrides& strides,
                     int64_t features, int rows, CUtensorMap& map) {
  return MakeTensorMap({p.dtype, base, p.batch, p.kv_heads, p.kv_len, features, strides.batch,
                        strides.head, strides.length},
                       rows, map);
}

/// Lets `kernel` have its shared memory; how many multiprocessors there are to fill.
template <typename Kernel>
Status Prepare(Kernel* kernel, int shared_bytes, int& processors) {
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  return error == cudaSuccess ? Status{} : Status{cudaGetErrorString(error)};
}

}  // namespace zenith::attention::hopper
