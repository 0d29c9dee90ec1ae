// Rows of more vectors than the registers of a block hold at two blocks a multiprocessor: in those
// of the blocks of a cluster (sm_90), which send each other their sums.
#pragma once

#include <cstdint>

namespace zenith::row_cluster {

inline constexpr int kMaxBlocks = 8;  // of a cluster, on any device
/// Of a block at most. Of several blocks a multiprocessor some load while others add: softmax of
/// 512 x 128256 bfloat16s takes 94 us with 512 threads and 98 with 1024 (H100, 11/2026).
inline constexpr int kThreads = 512;

/// How a row is spread, with `kVectors` of 16 bytes in the registers of a thread.
template <int kVectors>
struct Shape {
  int blocks, threads;  // of each

  static constexpr bool Fits(int64_t vectors) {
    return vectors <= int64_t{kMaxBlocks} * kThreads * kVectors;
  }
  explicit constexpr Shape(int64_t vectors) {
    const auto ceil = [](int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); };
    blocks = ceil(vectors, kThreads * kVectors);
    threads = 32 * ceil(vectors, int64_t{32} * blocks * kVectors);
  }
};

}  // namespace zenith::row_cluster
