// Tiles of rows in shared memory, how they get there, and the products taken of them.
//
// A row is a whole number of 16-byte chunks; chunk c of row r lies at c ^ (r % 8), so that the
// eight rows of an 8x8 matrix fall into different banks for ldmatrix and for row-wise copies alike.
// Tiles start at multiples of kTileAlignment: then the swizzle of the k-th pair of chunks is an xor
// of the address with 32 k. A pair of chunks is what one product takes of a row: 16 features of 16
// bits or 8 of 32.
#pragma once

#include "cuda/attention/problem.cuh"
#include "cuda/core/cp_async.cuh"
#include "cuda/core/math.cuh"
#include "cuda/core/mma.cuh"

namespace zenith::attention {

inline constexpr int kChunkBytes = 16;
inline constexpr int kTileAlignment = 1024;  // bytes; no row is longer
inline constexpr float kLn2 = 0.6931471805599453f;

/// Layout of a tile of rows of kDim elements.
template <typename T, int kDim>
struct TileLayout {
  static constexpr int kRowBytes = kDim * sizeof(T);
  static constexpr int kChunk = kChunkBytes / sizeof(T);  // elements
  static constexpr int kChunksPerRow = kDim / kChunk;
  static constexpr int kSteps = kChunksPerRow / 2;  // products along a row
  static_assert(kRowBytes % 128 == 0 && kTileAlignment % kRowBytes == 0);

  static __device__ __forceinline__ uint32_t Offset(int row, int chunk) {
    return row * kRowBytes + ((chunk ^ (row % 8)) << 4);
  }
  /// Offset of this lane's row for ldmatrix: of an A fragment (16 rows x one step), or of a pair of
  /// B fragments whose rows are k (transposed load).
  static __device__ __forceinline__ uint32_t LaneOffset(int lane) {
    return Offset(lane % 16, lane / 16);
  }
  /// The same for a pair of B fragments whose rows are n (16 n x one step of k).
  static __device__ __forceinline__ uint32_t LaneOffsetByColumn(int lane) {
    return Offset(lane % 8 + lane / 16 * 8, lane / 8 % 2);
  }
  /// Where AccumulateWeighted finds this lane's part of B.
  static __device__ __forceinline__ uint32_t LaneOffsetOfB(int lane) {
    if constexpr (sizeof(T) == 2) return LaneOffset(lane);
    return Offset(lane % 4 * 2, lane / 16) + lane / 4 % 4 * sizeof(T);
  }
  /// `lane_address` moved by `row` rows (a multiple of 8) and `step` pairs of chunks.
  static __device__ __forceinline__ uint32_t Move(uint32_t lane_address, int row, int step) {
    return (lane_address ^ (step << 5)) + row * kRowBytes;
  }
};

/// Starts copying kRows rows of `dim` elements into `tile`; elements from `dim` and rows from
/// `rows` on become zeros. Every thread of the block takes part.
template <int kRows, int kDim, int kThreads, typename T>
__device__ __forceinline__ void LoadTile(uint32_t tile, const T* source, int64_t stride, int rows,
                                         int dim) {
  using Layout = TileLayout<T, kDim>;
  constexpr int kRowsPerStep = kThreads / Layout::kChunksPerRow;
  static_assert(kThreads % Layout::kChunksPerRow == 0 && kRows % kRowsPerStep == 0);
  const int first_row = threadIdx.x / Layout::kChunksPerRow;
  const int chunk = threadIdx.x % Layout::kChunksPerRow;
  const bool inside = chunk * Layout::kChunk < dim;
  const T* row_source = source + first_row * stride + chunk * Layout::kChunk;
#pragma unroll
  for (int i = 0; i < kRows / kRowsPerStep; ++i) {
    const int row = first_row + i * kRowsPerStep;
    const bool valid = inside && row < rows;
    CpAsync16(tile + Layout::Offset(row, chunk), valid ? row_source : source, valid);
    row_source += kRowsPerStep * stride;
  }
}

/// The same where nothing is to become zeros: with a third of the instructions.
template <int kRows, int kDim, int kThreads, typename T>
__device__ __forceinline__ void LoadWholeTile(uint32_t tile, const T* source, int64_t stride) {
  using Layout = TileLayout<T, kDim>;
  constexpr int kRowsPerStep = kThreads / Layout::kChunksPerRow;
  static_assert(kThreads % Layout::kChunksPerRow == 0 && kRows % kRowsPerStep == 0);
  const int first_row = threadIdx.x / Layout::kChunksPerRow;
  const int chunk = threadIdx.x % Layout::kChunksPerRow;
  const T* row_source = source + first_row * stride + chunk * Layout::kChunk;
#pragma unroll
  for (int i = 0; i < kRows / kRowsPerStep; ++i) {
    CpAsync16(tile + Layout::Offset(first_row + i * kRowsPerStep, chunk), row_source);
    row_source += kRowsPerStep * stride;
  }
}

/// Step k of row tile r of A. `a`: LaneOffset of the warp's first row of A.
template <typename T, int kDim>
__device__ __forceinline__ Operand<T, 4> LoadOperandA(uint32_t a, int r, int k) {
  uint32_t fragment[4];
  LoadMatrix4(fragment, TileLayout<T, kDim>::Move(a, 16 * r, k));
  return Operand<T, 4>(fragment);
}

/// scores[r][n] += rows of A . rows of B. `operand_of(r, k)`: step k of row tile r of the warp's A;
/// `b`: LaneOffsetByColumn of the first row of B.
template <typename T, int kDim, int kRowTiles, int kCols, typename OperandOf>
__device__ __forceinline__ void AccumulateByRows(float (&scores)[kRowTiles][kCols / 8][4],
                                                 OperandOf operand_of, uint32_t b) {
  using Layout = TileLayout<T, kDim>;
#pragma unroll
  for (int k = 0; k < Layout::kSteps; ++k) {
    Operand<T, 4> operand_a[kRowTiles];
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) operand_a[r] = operand_of(r, k);
#pragma unroll
    for (int n = 0; n < kCols / 16; ++n) {
      uint32_t fragment[4];
      LoadMatrix4(fragment, Layout::Move(b, 16 * n, k));
      const Operand<T, 4> operand_b(fragment);
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
        MultiplyAdd(scores[r][2 * n], operand_a[r], operand_b, 0);
        MultiplyAdd(scores[r][2 * n + 1], operand_a[r], operand_b, 1);
      }
    }
  }
}

/// scores[r][n] = rows of A . rows of B. `a` is LaneOffset of the warp's first row of A, `b`
/// LaneOffsetByColumn of the first row of B.
template <typename T, int kDim, int kRowTiles, int kCols>
__device__ __forceinline__ void MultiplyByRows(float (&scores)[kRowTiles][kCols / 8][4], uint32_t a,
                                               uint32_t b) {
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
    for (int n = 0; n < kCols / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) scores[r][n][i] = 0;
  AccumulateByRows<T, kDim, kRowTiles, kCols>(
      scores, [&](int r, int k) { return LoadOperandA<T, kDim>(a, r, k); }, b);
}

/// acc += weights (rounded to T) . B, where row s of B belongs to column s of the weights. `b` is
/// LaneOffsetOfB of the first row. Layout: of B; another than TileLayout for 16-bit types alone.
template <typename T, int kDim, int kRowTiles, int kCols, typename Layout = TileLayout<T, kDim>>
__device__ __forceinline__ void AccumulateWeighted(float (&acc)[kRowTiles][kDim / 8][4],
                                                   const float (&weights)[kRowTiles][kCols / 8][4],
                                                   uint32_t b) {
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int k = 0; k < kCols / 16; ++k) {
      Operand<T, 4> operand_a[kRowTiles];
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
        const auto& left = weights[r][2 * k];
        const auto& right = weights[r][2 * k + 1];
        operand_a[r] =
            Operand<T, 4>({PackPair<T>(left[0], left[1]), PackPair<T>(left[2], left[3]),
                           PackPair<T>(right[0], right[1]), PackPair<T>(right[2], right[3])});
      }
#pragma unroll
      for (int n = 0; n < kDim / 16; ++n) {
        Operand<T, 4> operand_b;
        LoadMatrix4Transposed(operand_b.bits, Layout::Move(b, 16 * k, n));
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r) {
          MultiplyAdd(acc[r][2 * n], operand_a[r], operand_b, 0);
          MultiplyAdd(acc[r][2 * n + 1], operand_a[r], operand_b, 1);
        }
      }
    }
  } else {
    // A lane holds columns 2c and 2c + 1 of a D tile, where an A tile wants c and c + 4. The order
    // of k is free as long as B follows: B's rows are read as 0 2 4 6 1 3 5 7, without a bank
    // conflict (rows 0 2 4 6 differ in the swizzle's upper bits, two chunks in its lowest).
    const uint32_t b_odd = (b ^ kChunkBytes) + Layout::kRowBytes;
#pragma unroll
    for (int k = 0; k < kCols / 8; ++k) {
      Operand<T, 4> operand_a[kRowTiles];
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
        const auto& w = weights[r][k];
        operand_a[r] = Operand<T, 4>({__float_as_uint(w[0]), __float_as_uint(w[2]),
                                      __float_as_uint(w[1]), __float_as_uint(w[3])});
      }
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) {
        const Operand<T, 2> operand_b(
            {LoadShared32(Layout::Move(b, 8 * k, n)), LoadShared32(Layout::Move(b_odd, 8 * k, n))});
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r) MultiplyAdd(acc[r][n], operand_a[r], operand_b, 0);
      }
    }
  }
}

/// Writes the warp's 16 * kRowTiles accumulated rows to global memory: through its own rows of a
/// tile (at `staging`; no other warp may use them), so that the stores are whole 16-byte chunks.
/// Rows from `rows` and elements from `dim` on are dropped.
template <typename T, int kDim, int kRowTiles>
__device__ __forceinline__ void StoreRows(const float (&acc)[kRowTiles][kDim / 8][4],
                                          unsigned char* staging, T* target, int64_t stride,
                                          int64_t rows, int dim) {
  using Layout = TileLayout<T, kDim>;
  const int lane = threadIdx.x % kWarpSize;
  __syncwarp();  // the rows may still be read as fragments by other lanes
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = 16 * r + 8 * half + lane / 4, element = 8 * n + lane % 4 * 2;
        unsigned char* pair = staging + Layout::Offset(row, element / Layout::kChunk) +
                              element % Layout::kChunk * sizeof(T);
        const float low = acc[r][n][2 * half], high = acc[r][n][2 * half + 1];
        if constexpr (sizeof(T) == 2)
          *reinterpret_cast<uint32_t*>(pair) = PackPair<T>(low, high);
        else
          *reinterpret_cast<float2*>(pair) = {low, high};
      }
  __syncwarp();
  constexpr int kChunks = 16 * kRowTiles * Layout::kChunksPerRow;
#pragma unroll
  for (int index = lane; index < kChunks; index += kWarpSize) {
    const int row = index / Layout::kChunksPerRow, chunk = index % Layout::kChunksPerRow;
    if (row < rows && chunk * Layout::kChunk < dim)
      *reinterpret_cast<uint4*>(target + row * stride + chunk * Layout::kChunk) =
          *reinterpret_cast<const uint4*>(staging + Layout::Offset(row, chunk));
  }
}

}  // namespace zenith::attention
