// Hopper's asynchronous copies (sm_90): mbarriers, and the tensor copy engine (TMA) that fills a
// tile of shared memory from a tensor map and then completes a barrier. PTX
// ISA 9.7.9.27, 9.7.13.15. cuda/core/tensor_map.h makes the maps.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "cuda/core/cp_async.cuh"

namespace zenith {

/// Barriers live in shared memory, 8 bytes each. A phase ends when `arrivals` have come and all
/// bytes that were announced have been copied.
__device__ __forceinline__ void BarrierInit(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(barrier), "r"(arrivals)
               : "memory");
}

/// Makes initialised barriers visible to the copy engine. Other threads need a __syncthreads too.
__device__ __forceinline__ void BarrierInitFence() {
  asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory");
}

__device__ __forceinline__ void BarrierArrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(barrier) : "memory");
}

/// Arrives, and announces `bytes` that copies will bring.
__device__ __forceinline__ void BarrierExpect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(barrier), "r"(bytes)
               : "memory");
}

/// Waits until the phase of this parity has ended. A fresh barrier is in phase 0; the one before it
/// (parity 1) counts as ended.
__device__ __forceinline__ void BarrierWait(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  do {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n"
        "}\n"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
  } while (!done);
}

/// Which buffer of a ring of kStages is next, and the parity of its phase.
template <int kStages>
struct Ring {
  uint32_t stage = 0, parity = 0;

  __device__ __forceinline__ void Advance() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
};

/// Copies the box of `map` that starts at (feature, length, head, batch) to shared memory
/// (1024-byte aligned where the map swizzles by 128 bytes); elements outside of the tensor become
/// zeros, and count as bytes all the same. Without a swizzle the box must begin at a multiple of 16
/// bytes (sm_90: illegal instruction). One thread.
__device__ __forceinline__ void TmaLoad(uint32_t shared, const CUtensorMap& map, uint32_t barrier,
                                        int feature, int length, int head, int batch) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6}], [%2];\n" ::"r"(shared),
      "l"(reinterpret_cast<uint64_t>(&map)), "r"(barrier), "r"(feature), "r"(length), "r"(head),
      "r"(batch)
      : "memory");
}

/// Copies `bytes` from global to shared memory, all multiples of 16. One thread.
__device__ __forceinline__ void BulkLoad(uint32_t shared, const void* gFrom, uint32_t bytes,
                                         uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];\n" ::
          "r"(shared),
      "l"(gFrom), "r"(bytes), "r"(barrier)
      : "memory");
}

/// Brings a box to the L2 cache. One thread.
__device__ __forceinline__ void TmaPrefetchBox(const CUtensorMap& map, int feature, int length,
                                               int head, int batch) {
  asm volatile("cp.async.bulk.prefetch.tensor.4d.L2.global [%0, {%1, %2, %3, %4}];\n" ::"l"(
                   reinterpret_cast<uint64_t>(&map)),
               "r"(feature), "r"(length), "r"(head), "r"(batch)
               : "memory");
}

// Clusters: blocks that run at the same time and reach each other's shared memory.

__device__ __forceinline__ uint32_t ClusterRank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;\n" : "=r"(rank));
  return rank;
}

/// All threads of all blocks of the cluster.
__device__ __forceinline__ void ClusterBarrier() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;\n" ::: "memory");
}

/// Arrives on the barrier that lies where `barrier` does in the block of this rank. Orders reads of
/// shared memory that have been waited for, no more: with .release.cluster the compiler waits for
/// all stores of the thread, about a microsecond.
__device__ __forceinline__ void BarrierArriveAt(uint32_t barrier, uint32_t rank) {
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n"
      "}\n" ::"r"(barrier),
      "r"(rank)
      : "memory");
}

/// TmaLoad into the shared memory of every block of the cluster whose bit is set in `blocks`, at
/// the same offset, completing the barrier at the same offset there.
__device__ __forceinline__ void TmaLoadTo(uint16_t blocks, uint32_t shared, const CUtensorMap& map,
                                          uint32_t barrier, int feature, int length, int head,
                                          int batch) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%3, %4, %5, %6}], [%2], %7;\n" ::"r"(shared),
      "l"(reinterpret_cast<uint64_t>(&map)), "r"(barrier), "r"(feature), "r"(length), "r"(head),
      "r"(batch), "h"(blocks)
      : "memory");
}

__device__ __forceinline__ void TmaPrefetch(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];\n" ::"l"(reinterpret_cast<uint64_t>(&map)) : "memory");
}

}  // namespace zenith
