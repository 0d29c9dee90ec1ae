// Tiles of 16-bit rows in shared memory, how they get there, and the fragments read from them.
//
// A row of kDim features is kDim / 8 chunks of 16 bytes; chunk c of row r lies at c ^ (r % 8), so
// that the eight rows of an 8x8 matrix fall into different banks for ldmatrix and for row-wise
// copies alike. Tiles start at multiples of kTileAlignment: then the swizzle of feature block k is
// an xor of the address with 32 k.
#pragma once

#include "cuda/attention/problem.cuh"
#include "cuda/core/cp_async.cuh"
#include "cuda/core/mma.cuh"

namespace zenith::attention {

inline constexpr int kChunk = 8;             // elements in 16 bytes
inline constexpr int kTileAlignment = 1024;  // bytes; 8 rows of 64 features, the smallest pattern
inline constexpr float kLog2E = 1.4426950408889634f;
inline constexpr float kLn2 = 0.6931471805599453f;

/// Layout of a tile of rows of kDim 16-bit features.
template <int kDim>
struct TileLayout {
  static constexpr int kRowBytes = 2 * kDim;
  static constexpr int kChunksPerRow = kDim / kChunk;
  static_assert(kDim % 64 == 0 && kRowBytes <= kTileAlignment);

  static __device__ __forceinline__ uint32_t Offset(int row, int chunk) {
    return row * kRowBytes + ((chunk ^ (row % 8)) << 4);
  }
  /// Offset of this lane's row for ldmatrix: of an A fragment (16 rows x 16 features), or of a B
  /// fragment pair whose rows are k (transposed load: 16 k x 16 n).
  static __device__ __forceinline__ uint32_t LaneOffset(int lane) {
    return Offset(lane % 16, lane / 16);
  }
  /// The same for a pair of B fragments whose rows are n (16 n x 16 k).
  static __device__ __forceinline__ uint32_t LaneOffsetByColumn(int lane) {
    return Offset(lane % 8 + lane / 16 * 8, lane / 8 % 2);
  }
  /// `lane_address` moved to rows from `row` (a multiple of 8) and features from 16 * block.
  static __device__ __forceinline__ uint32_t Move(uint32_t lane_address, int row, int block) {
    return (lane_address ^ (block << 5)) + row * kRowBytes;
  }
};

/// Starts copying kRows rows of `dim` features into `tile`; features from `dim` and rows from
/// `rows` on become zeros. Every thread of the block takes part.
template <int kRows, int kDim, int kThreads, typename T>
__device__ __forceinline__ void LoadTile(uint32_t tile, const T* source, int64_t stride, int rows,
                                         int dim) {
  using Layout = TileLayout<kDim>;
  constexpr int kRowsPerStep = kThreads / Layout::kChunksPerRow;
  static_assert(kThreads % Layout::kChunksPerRow == 0 && kRows % kRowsPerStep == 0);
  const int first_row = threadIdx.x / Layout::kChunksPerRow;
  const int chunk = threadIdx.x % Layout::kChunksPerRow;
  const bool inside = chunk * kChunk < dim;
  const T* row_source = source + first_row * stride + chunk * kChunk;
#pragma unroll
  for (int i = 0; i < kRows / kRowsPerStep; ++i) {
    const int row = first_row + i * kRowsPerStep;
    const bool valid = inside && row < rows;
    CpAsync16(tile + Layout::Offset(row, chunk), valid ? row_source : source, valid);
    row_source += kRowsPerStep * stride;
  }
}

/// scores[r][n] = rows of A . rows of B, over kDim features. `a` and `b` are lane addresses of the
/// warp's first row of A and the first row of B.
template <typename T, int kDim, int kRowTiles, int kCols>
__device__ __forceinline__ void MultiplyByRows(float (&scores)[kRowTiles][kCols / 8][4], uint32_t a,
                                               uint32_t b) {
  using Layout = TileLayout<kDim>;
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
    for (int n = 0; n < kCols / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) scores[r][n][i] = 0;
#pragma unroll
  for (int k = 0; k < kDim / 16; ++k) {
    uint32_t fragment_a[kRowTiles][4];
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) LoadMatrix4(fragment_a[r], Layout::Move(a, 16 * r, k));
#pragma unroll
    for (int n = 0; n < kCols / 16; ++n) {
      uint32_t fragment_b[4];
      LoadMatrix4(fragment_b, Layout::Move(b, 16 * n, k));
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
        Mma16x8x16<T>(scores[r][2 * n], fragment_a[r], fragment_b[0], fragment_b[1]);
        Mma16x8x16<T>(scores[r][2 * n + 1], fragment_a[r], fragment_b[2], fragment_b[3]);
      }
    }
  }
}

/// acc += weights (rounded to T) . B, where row k of B belongs to column k of the weights.
template <typename T, int kDim, int kRowTiles, int kCols>
__device__ __forceinline__ void AccumulateWeighted(float (&acc)[kRowTiles][kDim / 8][4],
                                                   const float (&weights)[kRowTiles][kCols / 8][4],
                                                   uint32_t b) {
  using Layout = TileLayout<kDim>;
#pragma unroll
  for (int k = 0; k < kCols / 16; ++k) {
    uint32_t fragment_a[kRowTiles][4];
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
      const auto& left = weights[r][2 * k];
      const auto& right = weights[r][2 * k + 1];
      fragment_a[r][0] = PackPair<T>(left[0], left[1]);
      fragment_a[r][1] = PackPair<T>(left[2], left[3]);
      fragment_a[r][2] = PackPair<T>(right[0], right[1]);
      fragment_a[r][3] = PackPair<T>(right[2], right[3]);
    }
#pragma unroll
    for (int n = 0; n < kDim / 16; ++n) {
      uint32_t fragment_b[4];
      LoadMatrix4Transposed(fragment_b, Layout::Move(b, 16 * k, n));
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
        Mma16x8x16<T>(acc[r][2 * n], fragment_a[r], fragment_b[0], fragment_b[1]);
        Mma16x8x16<T>(acc[r][2 * n + 1], fragment_a[r], fragment_b[2], fragment_b[3]);
      }
    }
  }
}

/// Writes the warp's 16 * kRowTiles accumulated rows to global memory: through its own rows of a
/// tile (from byte `staging` on; no other warp may use them), so that the stores are whole 16-byte
/// chunks. Rows from `rows` and features from `dim` on are dropped.
template <typename T, int kDim, int kRowTiles>
__device__ __forceinline__ void StoreRows(const float (&acc)[kRowTiles][kDim / 8][4],
                                          unsigned char* staging, T* target, int64_t stride,
                                          int rows, int dim) {
  using Layout = TileLayout<kDim>;
  const int lane = threadIdx.x % kWarpSize;
  __syncwarp();  // the rows may still be read as fragments by other lanes
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = 16 * r + 8 * half + lane / 4;
        const uint32_t pair = PackPair<T>(acc[r][n][2 * half], acc[r][n][2 * half + 1]);
        *reinterpret_cast<uint32_t*>(staging + Layout::Offset(row, n) + lane % 4 * 4) = pair;
      }
  __syncwarp();
  constexpr int kChunks = 16 * kRowTiles * Layout::kChunksPerRow;
#pragma unroll
  for (int index = lane; index < kChunks; index += kWarpSize) {
    const int row = index / Layout::kChunksPerRow, chunk = index % Layout::kChunksPerRow;
    if (row < rows && chunk * kChunk < dim)
      *reinterpret_cast<uint4*>(target + row * stride + chunk * kChunk) =
          *reinterpret_cast<const uint4*>(staging + Layout::Offset(row, chunk));
  }
}

/// The band in 32 bits. Bounds are clamped to the largest distance there is, which keeps meaning.
struct Band {
  int left, right;

  __device__ explicit Band(const AttentionProblem& p)
      : left(Clamp(p.left, p.q_len + p.kv_len)), right(Clamp(p.right, p.q_len + p.kv_len)) {}

  /// Whether all of queries [t, t + queries) may see all of keys [s, s + keys).
  __device__ bool HoldsAll(int t, int queries, int s, int keys) const {
    return s - (t + queries - 1) >= -left && s + keys - 1 - t <= right;
  }
  /// Whether any of those queries may see any of those keys.
  __device__ bool HoldsAny(int t, int queries, int s, int keys) const {
    return s + keys - 1 - t >= -left && s - (t + queries - 1) <= right;
  }
  __device__ bool Holds(int t, int s) const { return s - t >= -left && s - t <= right; }
  /// Keys that at least one of queries [t, t + queries) may see; empty if end <= begin.
  __device__ int KeysBegin(int t) const { return max(0, t - left); }
  __device__ int KeysEnd(int t, int queries, int kv_len) const {
    return min(kv_len, t + queries + right);
  }
  /// Queries that may see at least one of keys [s, s + keys).
  __device__ int QueriesBegin(int s) const { return max(0, s - right); }
  __device__ int QueriesEnd(int s, int keys, int q_len) const {
    return min(q_len, s + keys + left);
  }

 private:
  static __device__ int Clamp(int64_t x, int64_t bound) {
    return static_cast<int>(x < -bound ? -bound : x > bound ? bound : x);
  }
};

}  // namespace zenith::attention
