// cp.async: copies from global to shared memory that do not pass through registers (sm_80; PTX ISA
// 9.7.9.25.3). A thread groups its copies by CpAsyncCommit and waits for groups, oldest first.
#pragma once

#include <cstdint>

namespace zenith {

/// Address of shared memory as PTX takes it.
__device__ __forceinline__ uint32_t SharedAddress(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

/// 16 bytes, both addresses 16-byte aligned.
__device__ __forceinline__ void CpAsync16(uint32_t shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;\n" ::"r"(shared), "l"(global) : "memory");
}

/// The same; zeros if not `valid` (`global` is then not read).
__device__ __forceinline__ void CpAsync16(uint32_t shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared), "l"(global),
               "r"(valid ? 16 : 0)
               : "memory");
}

__device__ __forceinline__ void CpAsyncCommit() {
  asm volatile("cp.async.commit_group;\n" ::: "memory");
}

/// Waits until at most `kPending` groups of this thread are under way. Other threads' copies are
/// visible only after a barrier.
template <int kPending>
__device__ __forceinline__ void CpAsyncWait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

}  // namespace zenith
