// What the Hopper kernels do with the rows of a warpgroup's accumulators (cuda/core/wgmma.cuh):
// float d[4 j + i] is row lane / 4 + 8 (i / 2) of the warp's 16, column 8 j + 2 (lane % 4) + i % 2.
#pragma once

#include "cuda/attention/score.cuh"
#include "cuda/core/quad.cuh"
#include "cuda/core/wgmma.cuh"

namespace zenith::attention {

/// scores = a . b^T over kDim features and commits: 64 rows of a tile of kRowsA (`a` is the
/// descriptor of the first of them) and the kRowsB rows of another, both in shared memory.
template <typename T, int kDim, int kRowsA, int kRowsB>
__device__ __forceinline__ void MultiplyRows(float (&scores)[kRowsB / 2], uint64_t a, uint64_t b) {
#pragma unroll
  for (int k = 0; k < kDim / 16; ++k) {
    const int block = k / 4, bytes = k % 4 * 32;
    Wgmma<T, Major::kK, Major::kK>(scores, Moved(a, block * kRowsA * kBlockRowBytes + bytes),
                                   Moved(b, block * kRowsB * kBlockRowBytes + bytes), k > 0);
  }
  WgmmaCommit();
}

/// acc = (or +=, if `accumulate`) a . b and commits: weights in registers and the 16 kSteps rows of
/// a tile that they weigh.
template <typename T, int N, int kSteps>
__device__ __forceinline__ void MultiplyColumns(float (&acc)[N], const uint32_t (&a)[kSteps][4],
                                                uint64_t b, bool accumulate) {
#pragma unroll
  for (int k = 0; k < kSteps; ++k)
    Wgmma<T, Major::kMN>(acc, a[k], Moved(b, k * 16 * kBlockRowBytes), k > 0 || accumulate);
  WgmmaCommit();
}

/// -inf where a query may not see a key, or there is none. kByQuery: rows are queries, from `row`
/// on for this warp, and columns keys, from `col` on; otherwise the other way round, and columns
/// past the last query stay. `cols`: keys there are.
template <bool kByQuery, int N>
__device__ __forceinline__ void ApplyBand(float (&scores)[N], const Band& band, int row, int col,
                                          int cols) {
  const int lane = threadIdx.x % kWarpSize;
  const int first = col + lane % 4 * 2;  // of this lane
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int r = row + lane / 4 + 8 * half;
    // Allowed: low <= column < high, counted from this lane's first.
    const int low = r - (kByQuery ? band.left : band.right) - first;
    const int high = min(cols, r + (kByQuery ? band.right : band.left) + 1) - first;
#pragma unroll
    for (int j = 0; j < N; j += 4)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int column = 2 * j + i;
        float& score = scores[j + 2 * half + i];
        score = column < low || column >= high ? -INFINITY : score;
      }
  }
}

/// Packs accumulators to the A operands of the products that follow, in steps of k = 16.
template <typename T, int N>
__device__ __forceinline__ void Pack(const float (&d)[N], uint32_t (&a)[N / 8][4]) {
#pragma unroll
  for (int k = 0; k < N / 8; ++k)
#pragma unroll
    for (int i = 0; i < 4; ++i) a[k][i] = PackPair<T>(d[8 * k + 2 * i], d[8 * k + 2 * i + 1]);
}

/// Four lanes hold a row; each gets the result.
template <typename Op>
__device__ __forceinline__ float QuadReduce(float x) {
  x = Op::Apply(x, __shfl_xor_sync(kAllLanes, x, 1));
  return Op::Apply(x, __shfl_xor_sync(kAllLanes, x, 2));
}

/// Stores the warp's 16 rows of 2 N columns, times factor[row half], to `target` (its row 0), in
/// whole 16-byte chunks straight from registers: a detour through shared memory would keep a buffer
/// from being filled for the next tile. Rows from `rows` and columns from `cols` on are dropped.
template <typename T, int N>
__device__ __forceinline__ void StoreFragment(const float (&d)[N], const float (&factor)[2],
                                              T* target, int64_t stride, int rows, int cols) {
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = lane / 4 + 8 * half;
#pragma unroll
    for (int group = 0; group < N / 16; ++group) {  // of 32 columns
      uint32_t words[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int i = 16 * group + 4 * j + 2 * half;
        words[j] = PackPair<T>(d[i] * factor[half], d[i + 1] * factor[half]);
      }
      QuadTranspose(words);
      const int col = 32 * group + 8 * (lane % 4);
      if (row < rows && col < cols)
        *reinterpret_cast<uint4*>(target + row * stride + col) =
            uint4{words[0], words[1], words[2], words[3]};
    }
  }
}

}  // namespace zenith::attention
