// Copies of the copy engine beside those of cuda/core/tma.cuh: boxes of a matrix
// (cuda/core/matrix_map.h), and bytes on end. PTX ISA 9.7.9.27. One thread.
#pragma once

#include "cuda/core/tma.cuh"

namespace zenith {

/// Copies the box of `map` that starts at (column, row) to shared memory; elements outside of the
/// matrix become zeros, and count as bytes all the same.
__device__ __forceinline__ void TmaLoad(uint32_t shared, const CUtensorMap& map, uint32_t barrier,
                                        int column, int row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4}], [%2];\n" ::"r"(shared),
      "l"(reinterpret_cast<uint64_t>(&map)), "r"(barrier), "r"(column), "r"(row)
      : "memory");
}

/// Copies bytes that lie on end. Addresses and number: multiples of 16.
__device__ __forceinline__ void BulkLoad(uint32_t shared, const void* global, int bytes,
                                         uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];\n" ::
          "r"(shared),
      "l"(global), "r"(bytes), "r"(barrier)
      : "memory");
}

}  // namespace zenith
