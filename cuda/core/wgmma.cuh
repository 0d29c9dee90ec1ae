// Hopper's warpgroup products (wgmma, sm_90a; PTX ISA 9.7.15): 128 threads multiply a 64 x k tile
// from shared memory or registers by a k x n tile from shared memory into float32 registers,
// asynchronously. Own wrappers and not CuTe: these compile in seconds, where a CuTe kernel takes
// minutes, and the order of issue and wait, which is most of the design, stands in the kernel.
//
// Fragments of thread 32 w + lane of the warpgroup: rows 16 w + lane / 4 and 8 below it; D as
// mma.sync leaves it (cuda/core/mma.cuh), d[4 j .. 4 j + 3] for columns 8 j + 2 (lane % 4); A of 16
// columns of k likewise. So two neighbouring D tiles, packed, are one A operand here too.
//
// Tiles in shared memory are blocks of rows of 128 bytes (64 elements), 1024-byte aligned, swizzled
// as TMA does (16-byte chunk c of row r lies at c ^ (r % 8)); wider rows are several such blocks.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/core/convert.cuh"

namespace zenith {

inline constexpr int kWarpgroupSize = 128;
inline constexpr int kBlockRowBytes = 128;  // of a row of a block

/// How a product reads an operand in shared memory.
enum class Major : int {
  kK = 0,   // rows are m (or n), their elements run along k
  kMN = 1,  // rows are k, their elements run along m (or n)
};

/// What wgmma is told of an operand at `shared`: the first of its rows (a multiple of 8), and for
/// kK the first of its elements (a multiple of 16) in the row. `block_bytes`: from one block of 64
/// elements to the next; only kMN reads it.
__device__ __forceinline__ uint64_t MatrixDescriptor(uint32_t shared, uint32_t block_bytes = 16) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  constexpr uint64_t kEightRows = uint64_t{8 * kBlockRowBytes / 16} << 32;
  return kSwizzle128 | kEightRows | uint64_t{block_bytes / 16} << 16 | (shared & 0x3ffff) >> 4;
}

/// `descriptor` moved on by `bytes`, a constant: the address is its lowest field.
__device__ __forceinline__ uint64_t Moved(uint64_t descriptor, int bytes) {
  return descriptor + static_cast<uint64_t>(bytes / 16);
}

/// Before the first product of a batch: the registers it reads may have been written.
__device__ __forceinline__ void WgmmaFence() {
  asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory");
}
__device__ __forceinline__ void WgmmaCommit() {
  asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory");
}
/// Waits until at most kPending of the committed groups are under way.
template <int kPending>
__device__ __forceinline__ void WgmmaWait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(kPending) : "memory");
}

/// Keeps the compiler from moving reads or writes of accumulators across this point: it believes
/// that a product is done when it is issued.
template <int N>
__device__ __forceinline__ void FenceRegisters(float (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

/// Registers of each thread of this warpgroup from here on, a multiple of 8. All warpgroups of a
/// block together must fit the registers that it was launched with.
template <int kRegisters>
__device__ __forceinline__ void LowerRegisters() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void RaiseRegisters() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}

/// Named barriers, 1 to 15 (0 is __syncthreads'). `threads` counts those that wait and those that
/// only arrive.
__device__ __forceinline__ void NamedBarrierWait(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;\n" ::"r"(barrier), "r"(threads) : "memory");
}
__device__ __forceinline__ void NamedBarrierArrive(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;\n" ::"r"(barrier), "r"(threads) : "memory");
}

// One instruction per width n, kind of operand and type: PTX has no other way to name registers.
// clang-format off
#define ZENITH_R0 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define ZENITH_R1 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define ZENITH_R2 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define ZENITH_R3 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define ZENITH_R4 "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define ZENITH_R5 "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define ZENITH_R6 "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111"
#define ZENITH_R7 "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define ZENITH_D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define ZENITH_D16(i) ZENITH_D4(i), ZENITH_D4(i + 4), ZENITH_D4(i + 8), ZENITH_D4(i + 12)
#define ZENITH_R_32 ZENITH_R0
#define ZENITH_R_64 ZENITH_R0 ", " ZENITH_R1
#define ZENITH_R_80 ZENITH_R0 ", " ZENITH_R1 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define ZENITH_R_96 ZENITH_R0 ", " ZENITH_R1 ", " ZENITH_R2
#define ZENITH_R_128 ZENITH_R0 ", " ZENITH_R1 ", " ZENITH_R2 ", " ZENITH_R3
#define ZENITH_R_176 ZENITH_R0 ", " ZENITH_R1 ", " ZENITH_R2 ", " ZENITH_R3 ", " ZENITH_R4 ", %80, %81, %82, %83, %84, %85, %86, %87"
#define ZENITH_R_192 ZENITH_R0 ", " ZENITH_R1 ", " ZENITH_R2 ", " ZENITH_R3 ", " ZENITH_R4 ", " ZENITH_R5
#define ZENITH_R_256 ZENITH_R0 ", " ZENITH_R1 ", " ZENITH_R2 ", " ZENITH_R3 ", " ZENITH_R4 ", " ZENITH_R5 ", " ZENITH_R6 ", " ZENITH_R7
#define ZENITH_D_32 ZENITH_D16(0)
#define ZENITH_D_64 ZENITH_D16(0), ZENITH_D16(16)
#define ZENITH_D_80 ZENITH_D16(0), ZENITH_D16(16), ZENITH_D4(32), ZENITH_D4(36)
#define ZENITH_D_96 ZENITH_D16(0), ZENITH_D16(16), ZENITH_D16(32)
#define ZENITH_D_128 ZENITH_D16(0), ZENITH_D16(16), ZENITH_D16(32), ZENITH_D16(48)
#define ZENITH_D_176 ZENITH_D16(0), ZENITH_D16(16), ZENITH_D16(32), ZENITH_D16(48), ZENITH_D16(64), ZENITH_D4(80), ZENITH_D4(84)
#define ZENITH_D_192 ZENITH_D16(0), ZENITH_D16(16), ZENITH_D16(32), ZENITH_D16(48), ZENITH_D16(64), ZENITH_D16(80)
#define ZENITH_D_256 ZENITH_D16(0), ZENITH_D16(16), ZENITH_D16(32), ZENITH_D16(48), ZENITH_D16(64), ZENITH_D16(80), ZENITH_D16(96), ZENITH_D16(112)

#define ZENITH_WGMMA_SHARED(n, type, a, b, p, ta, tb)                                        \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #p ", 0;\n"                              \
               "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type               \
               " {" ZENITH_R_##n "}, %" #a ", %" #b ", p, 1, 1, %" #ta ", %" #tb ";\n}\n"    \
               : ZENITH_D_##n                                                                \
               : "l"(x), "l"(y), "r"(int{accumulate}), "n"(kMajorA), "n"(kMajorB))
#define ZENITH_WGMMA_REGISTERS(n, type, a0, a1, a2, a3, b, p, tb)                            \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #p ", 0;\n"                              \
               "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type               \
               " {" ZENITH_R_##n "}, {%" #a0 ", %" #a1 ", %" #a2 ", %" #a3 "}, %" #b         \
               ", p, 1, 1, %" #tb ";\n}\n"                                                   \
               : ZENITH_D_##n                                                                \
               : "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]), "l"(y), "r"(int{accumulate}),   \
                 "n"(kMajorB))
// The operands behind the n / 2 registers of D are number i0 to i6.
#define ZENITH_WGMMA(n, i0, i1, i2, i3, i4, i5, i6)                                          \
  template <>                                                                                \
  struct WgmmaOf<n> {                                                                        \
    template <typename T, int kMajorA, int kMajorB>                                          \
    static __device__ __forceinline__ void Issue(float (&d)[n / 2], uint64_t x, uint64_t y,  \
                                                 bool accumulate) {                          \
      if constexpr (std::is_same_v<T, __half>)                                               \
        ZENITH_WGMMA_SHARED(n, "f16", i0, i1, i2, i3, i4);                                   \
      else                                                                                   \
        ZENITH_WGMMA_SHARED(n, "bf16", i0, i1, i2, i3, i4);                                  \
    }                                                                                        \
    template <typename T, int kMajorB>                                                       \
    static __device__ __forceinline__ void Issue(float (&d)[n / 2], const uint32_t (&x)[4],  \
                                                 uint64_t y, bool accumulate) {              \
      if constexpr (std::is_same_v<T, __half>)                                               \
        ZENITH_WGMMA_REGISTERS(n, "f16", i0, i1, i2, i3, i4, i5, i6);                        \
      else                                                                                   \
        ZENITH_WGMMA_REGISTERS(n, "bf16", i0, i1, i2, i3, i4, i5, i6);                       \
    }                                                                                        \
  };

template <int n>
struct WgmmaOf;
ZENITH_WGMMA(32, 16, 17, 18, 19, 20, 21, 22)
ZENITH_WGMMA(64, 32, 33, 34, 35, 36, 37, 38)
ZENITH_WGMMA(80, 40, 41, 42, 43, 44, 45, 46)
ZENITH_WGMMA(96, 48, 49, 50, 51, 52, 53, 54)
ZENITH_WGMMA(128, 64, 65, 66, 67, 68, 69, 70)
ZENITH_WGMMA(176, 88, 89, 90, 91, 92, 93, 94)
ZENITH_WGMMA(192, 96, 97, 98, 99, 100, 101, 102)
ZENITH_WGMMA(256, 128, 129, 130, 131, 132, 133, 134)

#undef ZENITH_WGMMA
#undef ZENITH_WGMMA_SHARED
#undef ZENITH_WGMMA_REGISTERS
// clang-format on

/// d = a . b, or d += a . b if `accumulate`: one step of k = 16. Both operands from shared memory.
template <typename T, Major kMajorA, Major kMajorB, int N>
__device__ __forceinline__ void Wgmma(float (&d)[N], uint64_t a, uint64_t b, bool accumulate) {
  WgmmaOf<2 * N>::template Issue<T, int(kMajorA), int(kMajorB)>(d, a, b, accumulate);
}
/// The same with A in registers, which must not change before the product has been waited for.
template <typename T, Major kMajorB, int N>
__device__ __forceinline__ void Wgmma(float (&d)[N], const uint32_t (&a)[4], uint64_t b,
                                      bool accumulate) {
  WgmmaOf<2 * N>::template Issue<T, int(kMajorB)>(d, a, b, accumulate);
}

}  // namespace zenith
