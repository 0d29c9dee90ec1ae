// Which rows cuda/core/long_rows.cuh takes.
#pragma once

#include <cstdint>

namespace zenith::long_rows {

inline constexpr int kThreads = 256;
inline constexpr int kVectors = 4;                        // of 16 bytes, of a thread
inline constexpr int kPartVectors = kThreads * kVectors;  // of a block: 16 KiB of each array
inline constexpr int kMaxBlocks = 8;                      // of a cluster, on any device

/// Rows of so many vectors: up to 128 KiB.
constexpr bool Fits(int64_t vectors) { return vectors <= int64_t{kMaxBlocks} * kPartVectors; }

}  // namespace zenith::long_rows
