// The way back of cuda/core/tma.cuh: from shared memory to a tensor, by the copy engine. PTX ISA
// 9.7.9.27.1.
#pragma once

#include <cuda.h>

#include <cstdint>

namespace zenith {

/// Copies a tile of shared memory to the box of `map` that starts there; what lies outside of the
/// tensor is left out. One thread, after a TmaStoreFence by each that has written the tile.
__device__ __forceinline__ void TmaStore(const CUtensorMap& map, uint32_t shared, int feature,
                                         int length, int head, int batch) {
  asm volatile(
      "cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];\n"
      "cp.async.bulk.commit_group;\n" ::"l"(reinterpret_cast<uint64_t>(&map)),
      "r"(shared), "r"(feature), "r"(length), "r"(head), "r"(batch)
      : "memory");
}
/// Makes this thread's stores to shared memory visible to the copy engine; then a barrier.
__device__ __forceinline__ void TmaStoreFence() {
  asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
}
/// Waits until at most kPending of this thread's TmaStores still read their tile.
template <int kPending>
__device__ __forceinline__ void TmaStoreWait() {
  asm volatile("cp.async.bulk.wait_group.read %0;\n" ::"n"(kPending) : "memory");
}

}  // namespace zenith
