// Sums that blocks of a cluster send each other (sm_90; PTX ISA 9.7.13.4, 9.7.9.12). Beside
// cuda/core/tma.cuh: here nothing waits for a thread's earlier stores, which costs a microsecond.
#pragma once

#include "cuda/core/tma.cuh"

namespace zenith {

/// All threads of all blocks of the cluster arrive, and wait for each other. Orders barriers'
/// initialisation (BarrierInitFence) and nothing else.
__device__ __forceinline__ void ClusterArrive() {
  asm volatile("barrier.cluster.arrive.relaxed;\n" ::: "memory");
}
__device__ __forceinline__ void ClusterWait() {
  asm volatile("barrier.cluster.wait.acquire;\n" ::: "memory");
}

/// Writes 16 bytes to where `shared` lies in the block of this rank, which completes as many of the
/// barrier that lies there at `barrier`. That block must have begun, and not end before them.
__device__ __forceinline__ void StoreTo(uint32_t rank, uint32_t shared, uint32_t barrier,
                                        const float4& value) {
  asm volatile(
      "{\n"
      ".reg .b32 remote, remote_barrier;\n"
      "mapa.shared::cluster.u32 remote, %0, %2;\n"
      "mapa.shared::cluster.u32 remote_barrier, %1, %2;\n"
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [remote], "
      "{%3, %4, %5, %6}, [remote_barrier];\n"
      "}\n" ::"r"(shared),
      "r"(barrier), "r"(rank), "f"(value.x), "f"(value.y), "f"(value.z), "f"(value.w)
      : "memory");
}

/// The same of 8 bytes.
__device__ __forceinline__ void StoreTo(uint32_t rank, uint32_t shared, uint32_t barrier,
                                        const float2& value) {
  asm volatile(
      "{\n"
      ".reg .b32 remote, remote_barrier;\n"
      "mapa.shared::cluster.u32 remote, %0, %2;\n"
      "mapa.shared::cluster.u32 remote_barrier, %1, %2;\n"
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [remote], "
      "{%3, %4}, [remote_barrier];\n"
      "}\n" ::"r"(shared),
      "r"(barrier), "r"(rank), "f"(value.x), "f"(value.y)
      : "memory");
}

}  // namespace zenith
