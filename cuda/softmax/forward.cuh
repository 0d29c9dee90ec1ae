// Softmax of a row in the registers of a team, cuda/core/block_team.cuh's or cluster_team.cuh's;
// the contract is ffi/kernels/softmax.h.
#pragma once

#include "cuda/core/logits.cuh"
#include "cuda/core/rows.cuh"
#include "cuda/core/vector.cuh"
#include "ffi/kernels/softmax.h"

namespace zenith::softmax {

/// 4 vectors of a 16-bit type fit 32 registers, and then 2 blocks of 1024 threads an SM: while one
/// reduces, the other loads (1024 x 32768 bfloat16: 49 us for 61 with one block, H100, 11/2026).
template <typename T, int kVectors>
constexpr int kBlocksPerSm = sizeof(T) == 2 && kVectors <= 4 ? 2 : 1;

/// One team per row, the row in registers: x is read once, y written once. kSize elements move
/// together; a thread holds up to kVectors such vectors. exp is computed twice rather than kept:
/// that halves the registers of a 16-bit row, and the kernel waits for memory anyway.
/// A NaN, or -inf - -inf in a row of -inf, reaches every y through the sum.
template <typename Team, typename T, int kSize, int kVectors>
__global__ void __launch_bounds__(kMaxBlockThreads, kBlocksPerSm<T, kVectors>)
    forward_kernel(SoftmaxForwardArgs args, int width) {
  __shared__ typename Team::Scratch scratch;
  Team team(width, scratch);
  const int cols = static_cast<int>(args.cols);
  const int64_t row = team.row();
  const T* gX = static_cast<const T*>(args.x) + row * cols;
  T* gY = static_cast<T*>(args.y) + row * cols;
  const RowSlice<kSize> slice{row < args.rows ? cols : 0, width, team.rank()};

  Vector<T, kSize> x[kVectors];
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    if (slice.has(i)) x[i] = LoadVector<kSize>(gX + slice.col(i));
  }

  Vector<T, kSize> largest = MinusInfinity<T, kSize>();
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    if (slice.has(i)) largest = Larger(largest, x[i]);
  }
  const float max = team.template AllReduce<Max>(Largest(largest));

  float sum = 0;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    if (slice.has(i)) ForEachValue(x[i], [&](float value) { sum += Weight<T>(value - max); });
  }
  const float scale = 1.0f / team.template AllReduce<Add>(sum);

#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    if (!slice.has(i)) continue;
    ForgetFloats(x[i]);
    float values[kSize];
    ToFloat(x[i], values);
#pragma unroll
    for (float& value : values) value = Weight<T>(value - max) * scale;
    StoreVector(gY + slice.col(i), FromFloat<T>(values));
  }
}

}  // namespace zenith::softmax
