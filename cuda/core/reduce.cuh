// The one reduction: over a warp, part of a warp, or several warps of a block.
#pragma once

#include "cuda/core/launch.h"

namespace zenith {

inline constexpr int kWarpSize = 32;
inline constexpr int kMaxWarps = 32;  // in a block of 1024 threads, the most there can be

struct Add {
  static constexpr float kIdentity = 0.0f;
  static __device__ __forceinline__ float Apply(float a, float b) { return a + b; }
};

/// Drops NaN (fmaxf): let the NaN reach the result by another way.
struct Max {
  static constexpr float kIdentity = -__builtin_huge_valf();
  static __device__ __forceinline__ float Apply(float a, float b) { return fmaxf(a, b); }
};

/// Reduces over aligned runs of `width` lanes, a power of two up to 32; every lane gets the result,
/// the same bits in each (a butterfly adds the same two sums on both sides). All 32 lanes call it.
template <typename Op>
__device__ __forceinline__ float WarpAllReduce(float value, int width = kWarpSize) {
#pragma unroll
  for (int distance = width / 2; distance > 0; distance /= 2) {
    value = Op::Apply(value, __shfl_xor_sync(0xffffffffu, value, distance));
  }
  return value;
}

/// Where teams of more than one warp exchange their warps' results. Two buffers in turn: a warp
/// that enters the next reduction early writes into the other one, so one barrier each is enough.
template <int N>
struct TeamScratch {
  float partials[2][N][kMaxWarps];
};

/// `width` neighbouring threads of a block that work on one row: a power of two up to a warp, or
/// whole warps. With whole warps there are at most 15 teams in a block (one named barrier each).
class Team {
 public:
  __device__ __forceinline__ explicit Team(int width)
      : width_(width), index_(threadIdx.x / width), rank_(threadIdx.x % width) {}

  __device__ __forceinline__ int width() const { return width_; }
  __device__ __forceinline__ int index() const { return index_; }  // of this team in its block
  __device__ __forceinline__ int rank() const { return rank_; }    // of this thread in its team
  __device__ __forceinline__ int count() const { return blockDim.x / width_; }

  /// Reduces each of N values over the team; every thread gets the results. All threads of the
  /// warps concerned must call it, those without a row too. The order of the sums is fixed.
  template <typename Op, int N>
  __device__ __forceinline__ void AllReduce(float (&values)[N], TeamScratch<N>& scratch) {
    if (width_ < kWarpSize) {
      for (int distance = width_ / 2; distance > 0; distance /= 2) {
#pragma unroll
        for (float& value : values) {
          value = Op::Apply(value, __shfl_xor_sync(0xffffffffu, value, distance));
        }
      }
      return;
    }
#pragma unroll
    for (float& value : values) value = WarpAllReduce<Op>(value);
    if (width_ == kWarpSize) return;
    const int lane = threadIdx.x % kWarpSize;
    const int warp = threadIdx.x / kWarpSize;
    float (&partials)[N][kMaxWarps] = scratch.partials[buffer_];
    buffer_ ^= 1;
    if (lane == 0) {
#pragma unroll
      for (int i = 0; i < N; ++i) partials[i][warp] = values[i];
    }
    Barrier();
    // All 32 lanes, however few the warps: a loop of as many steps as those need is not unrolled.
    const int warps = width_ / kWarpSize;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float partial = lane < warps ? partials[i][index_ * warps + lane] : Op::kIdentity;
      values[i] = WarpAllReduce<Op>(partial);
    }
  }

  template <typename Op>
  __device__ __forceinline__ float AllReduce(float value, TeamScratch<1>& scratch) {
    float values[1] = {value};
    AllReduce<Op>(values, scratch);
    return values[0];
  }

 private:
  /// Barrier 0 belongs to __syncthreads.
  __device__ __forceinline__ void Barrier() const {
    asm volatile("bar.sync %0, %1;" ::"r"(index_ + 1), "r"(width_) : "memory");
  }

  int width_, index_, rank_;
  int buffer_ = 0;
};

}  // namespace zenith
