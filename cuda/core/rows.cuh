// How rows are spread over threads: the launch shapes the row-wise kernels share.
#pragma once

#include <cstdint>

#include "cuda/core/vector.cuh"

namespace zenith {

inline constexpr int kMaxBlockThreads = 1024;

/// A block of `teams` teams (cuda/core/reduce.cuh) of `width` threads, one row each.
struct RowShape {
  int width, teams;
  int threads() const { return width * teams; }

  /// Blocks that cover `rows`. Fits gridDim.x: 2^31 rows wide enough for one row a block would be
  /// over a terabyte.
  unsigned blocks(int64_t rows) const { return static_cast<unsigned>((rows + teams - 1) / teams); }
};

/// The team for a row of `units` (vectors or elements), about `per_thread` of them a thread. Rows
/// up to 32 * per_thread stay within a warp, which needs no barrier: of at least `least` threads,
/// if there are so many units, so that a step of the team reads neighbouring units. As many narrow
/// teams as `block_threads` has room for share a block.
inline RowShape ShapeFor(int64_t units, int per_thread, int block_threads, int least = 32) {
  constexpr int kWarp = 32;
  const int64_t wanted = (units + per_thread - 1) / per_thread;
  int width = 1;
  if (wanted <= kWarp) {
    while (width < wanted || (width < units && width < least)) width *= 2;
  } else {
    const int64_t warps = (wanted + kWarp - 1) / kWarp;
    width = kWarp *
            static_cast<int>(warps < kMaxBlockThreads / kWarp ? warps : kMaxBlockThreads / kWarp);
  }
  const int teams = width < block_threads ? block_threads / width : 1;
  return {width, teams};
}

/// The part of one row a thread holds in registers: vectors of kSize columns, a team's width apart,
/// so that neighbouring threads touch neighbouring vectors. 32 bits: such a row has < 2^31 columns.
template <int kSize>
struct RowSlice {
  int cols;  // 0 for a team without a row, which then takes part in the reductions only
  int width, rank;

  __device__ __forceinline__ int col(int i) const { return (i * width + rank) * kSize; }
  __device__ __forceinline__ bool has(int i) const { return col(i) < cols; }
};

/// body(value) for each element, converted anew in each pass over a row (ForgetFloats).
template <typename T, int N, typename Body>
__device__ __forceinline__ void ForEachValue(Vector<T, N>& vector, Body&& body) {
  ForgetFloats(vector);
  float values[N];
  ToFloat(vector, values);
#pragma unroll
  for (float value : values) body(value);
}

/// Threads of a block of teams of a warp or less, one vector a thread; and of wider or busier ones.
/// Small blocks keep an H100's memory less busy: layer norm of 524288 x 64 bfloat16s takes 91 us
/// with 128, 60 with 256 and 53 with 512; of 43690 x 768, 58, 46.5 and 47.7 (11/2026).
inline constexpr int kNarrowThreads = 512;
inline constexpr int kWideThreads = 256;

/// Threads that read 64 neighbouring bytes: two of memory's sectors.
inline constexpr int kLeastShared = 4;

inline constexpr int kLooped = 0;  // in place of a number of vectors: the row is in no registers

/// Picks how a team goes over a row of `cols` elements of T and calls
/// `body.template operator()<kSize, kVectors>(RowShape)`: kSize elements move together (16 bytes
/// if the pointers and rows are `aligned`, else one) and a thread holds kVectors of them, up to
/// kMaxVectors (8, or 4 for kernels that hold two rows: 64 registers a thread), or loops. Rows of
/// up to 32 vectors have a warp, of one vector each; or, kShared, a few threads of 4 vectors, and
/// several rows a warp: reductions then have fewer steps.
template <typename T, int kMaxVectors, bool kShared, typename Body>
Status DispatchRow(int64_t cols, bool aligned, Body&& body) {
  constexpr int kSize = kVectorSize<T>;
  if (!aligned || cols % kSize != 0) {
    const RowShape shape = ShapeFor(cols, 4, kNarrowThreads);
    return cols <= 4 * kMaxBlockThreads ? body.template operator()<1, 4>(shape)
                                        : body.template operator()<1, kLooped>(shape);
  }
  const int64_t vectors = cols / kSize;
  if constexpr (!kShared) {
    if (vectors <= 32) {
      return body.template operator()<kSize, 1>(ShapeFor(vectors, 1, kNarrowThreads));
    }
  }
  if (vectors <= 4 * kMaxBlockThreads) {
    return body.template operator()<kSize, 4>(
        ShapeFor(vectors, 4, kWideThreads, kShared ? kLeastShared : 32));
  }
  const RowShape shape = ShapeFor(vectors, kMaxVectors, kWideThreads);
  if constexpr (kMaxVectors > 4) {
    if (vectors <= kMaxVectors * kMaxBlockThreads) {
      return body.template operator()<kSize, kMaxVectors>(shape);
    }
  }
  return body.template operator()<kSize, kLooped>(shape);
}

}  // namespace zenith
