// What the kernels of kModified know of masks, intervals and segments before they start: of each 64
// queries x 32 keys whether any, and whether all of them are allowed; and the bits of a mask, by
// query and by key. One pass makes that (mask_tiles.cu), whatever the strides; then tiles without
// an allowed score are left out, and those where all are allowed are not tested. The band is not in
// there: the kernels know it.
#pragma once

#include "cuda/attention/problem.cuh"

namespace zenith::attention::hopper {

inline constexpr int kClassQueries = 64, kClassKeys = 32;
inline constexpr uint32_t kAnyAllowed = 1, kAllAllowed = 2;  // of a class

/// Where they lie in the scratch of a problem (ffi/kernels/attention.h), dense over the matrices
/// that differ: along batch, kv_head, group, whichever a mask, interval or segments vary along.
struct MaskTiles {
  const uint8_t* classes;             // (matrix, query_blocks, row_words)
  const uint32_t *by_query, *by_key;  // (matrix, queries, row_words), (matrix, keys, column_words),
                                      // with a mask
  int batch, kv_head, group;          // matrices from one to the next; 0 where it does not vary
  int matrices, queries, keys;        // queries: 1 where it does not vary along them
  int query_blocks;
  int row_words, column_words;  // of 32 keys or queries each, multiples of 4: rows of 16 bytes

  /// A head of this matrix.
  __device__ __forceinline__ HeadIndex HeadOf(int64_t matrix, const AttentionProblem& p) const {
    const int64_t in_batch = batch ? matrix % batch : matrix;
    const int64_t k = kv_head ? in_batch / kv_head : 0,
                  rest = kv_head ? in_batch % kv_head : in_batch;
    const int64_t g = group ? rest : 0;
    return {batch ? matrix / batch : 0, k * p.groups + g, k, g};
  }
  __device__ __forceinline__ int MatrixOf(const HeadIndex& head) const {
    return static_cast<int>(head.batch) * batch + static_cast<int>(head.kv_head) * kv_head +
           static_cast<int>(head.group) * group;
  }
  /// Of queries [t, t + kQueries) and keys [s, s + kKeys), begun inside of the problem, at least:
  /// of the blocks that they meet.
  template <int kQueries, int kKeys>
  __device__ __forceinline__ uint32_t Class(int matrix, int t, int s) const {
    static_assert(kKeys % kClassKeys == 0);
    constexpr int kOdd = kQueries % kClassQueries != 0;  // one block more, at times
    uint32_t any = 0, all = kAllAllowed;
#pragma unroll
    for (int i = 0; i < (kQueries + kClassQueries - 1) / kClassQueries + kOdd; ++i) {
      const int block =
          min(min(t / kClassQueries + i, (t + kQueries - 1) / kClassQueries), query_blocks - 1);
      const uint8_t* row = classes + (int64_t{matrix} * query_blocks + block) * row_words;
#pragma unroll
      for (int j = 0; j < kKeys / kClassKeys; ++j) {
        const uint32_t x = row[min(s / kClassKeys + j, row_words - 1)];
        any |= x, all &= x;
      }
    }
    return (any & kAnyAllowed) | (all & kAllAllowed);
  }
};

/// Whether the problem masks anything so, and has scratch enough for what is made of it; then
/// `tiles` says where it goes. MakeMaskTiles (cuda/attention/kernels.h) fills it.
bool FindMaskTiles(const AttentionProblem& p, MaskTiles& tiles);

}  // namespace zenith::attention::hopper
