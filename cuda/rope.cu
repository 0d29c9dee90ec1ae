// Rotary position embeddings; the contract is ffi/kernels/rope.h.
#include "cuda/core/convert.cuh"
#include "cuda/core/launch.h"
#include "cuda/core/vector.cuh"
#include "ffi/kernels/rope.h"

namespace zenith {
namespace {

constexpr int kThreads = 256;
// Rows that a thread rotates by the same coefficients, where neighbouring rows, heads, share them.
constexpr int kSharingRows = 4;

/// The row of the tables for a row of x.
__device__ __forceinline__ int64_t TableRow(const TableRows& map, uint32_t row) {
  int64_t table_row = 0;
#pragma unroll
  for (int axis = TableRows::kRank - 1; axis >= 0; --axis) {
    if (map.sizes[axis] == 1) continue;  // the same for all threads
    const uint32_t size = static_cast<uint32_t>(map.sizes[axis]);
    table_row += static_cast<int64_t>(row % size) * map.strides[axis];
    row /= size;
  }
  return table_row;
}

/// y0 = x0 * c0 + x1 * a, y1 = x1 * c1 + x0 * b, for kPairs pairs.
template <int kPairs>
struct Coefficients {
  float c0[kPairs], c1[kPairs], a[kPairs], b[kPairs];

  __device__ __forceinline__ void Set(int i, float cos0, float cos1, float sin0, float sin1,
                                      bool transposed) {
    c0[i] = cos0;
    c1[i] = cos1;
    a[i] = transposed ? sin1 : -sin0;
    b[i] = transposed ? -sin0 : sin1;
  }
};

/// Of the pairs from `pair` on, kPairs neighbours.
template <bool kInterleaved, int kPairs>
__device__ __forceinline__ Coefficients<kPairs> Load(const RopeArgs& args, int64_t table_row,
                                                     int pair) {
  const int half = static_cast<int>(args.features / 2);
  const int64_t start = table_row * (args.whole_tables ? args.features : half);
  Coefficients<kPairs> found;
  if (kInterleaved && args.whole_tables) {
    float cos[2 * kPairs], sin[2 * kPairs];
    ToFloat(LoadVector<2 * kPairs>(args.cos + start + 2 * pair), cos);
    ToFloat(LoadVector<2 * kPairs>(args.sin + start + 2 * pair), sin);
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      found.Set(i, cos[2 * i], cos[2 * i + 1], sin[2 * i], sin[2 * i + 1], args.transposed);
    }
    return found;
  }
  float cos[2][kPairs], sin[2][kPairs];
  ToFloat(LoadVector<kPairs>(args.cos + start + pair), cos[0]);
  ToFloat(LoadVector<kPairs>(args.sin + start + pair), sin[0]);
  if (args.whole_tables) {
    ToFloat(LoadVector<kPairs>(args.cos + start + half + pair), cos[1]);
    ToFloat(LoadVector<kPairs>(args.sin + start + half + pair), sin[1]);
  }
  const int second = args.whole_tables ? 1 : 0;
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    const float cos1 = second ? cos[1][i] : cos[0][i], sin1 = second ? sin[1][i] : sin[0][i];
    found.Set(i, cos[0][i], cos1, sin[0][i], sin1, args.transposed);
  }
  return found;
}

/// A thread takes 16 bytes of each of kRows neighbouring rows that share their coefficients; of
/// halves, 16 bytes of either half. x is read once, y written once.
template <bool kInterleaved, typename T, int kRows>
__global__ void __launch_bounds__(kThreads) rope_kernel(RopeArgs args, uint32_t pieces) {
  constexpr int kSize = kVectorSize<T>, kPairs = kInterleaved ? kSize / 2 : kSize;
  const uint32_t i = blockIdx.x * uint32_t{kThreads} + threadIdx.x;
  const uint32_t row = i / pieces * kRows;
  if (row >= args.rows) return;
  const int cols = static_cast<int>(args.cols), features = static_cast<int>(args.features);
  const int piece = static_cast<int>(i % pieces), half = features / 2;
  const T* const x = static_cast<const T*>(args.x) + int64_t{row} * cols;
  T* const y = static_cast<T*>(args.y) + int64_t{row} * cols;

  const int rotated = kInterleaved ? features : half;  // columns at which a thread begins
  if (piece * kSize >= rotated) {
    const int column = piece * kSize - rotated + features;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      StoreVector(y + r * int64_t{cols} + column,
                  LoadVector<kSize>(x + r * int64_t{cols} + column));
    }
    return;
  }
  const int first = piece * kSize;
  Vector<T, kSize> x0[kRows], x1[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    x0[r] = LoadVector<kSize>(x + r * int64_t{cols} + first);
    if (!kInterleaved) x1[r] = LoadVector<kSize>(x + r * int64_t{cols} + half + first);
  }
  const Coefficients<kPairs> k = Load<kInterleaved, kPairs>(args, TableRow(args.table_rows, row),
                                                            kInterleaved ? first / 2 : first);
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    float u[kSize], v[kSize];
    ToFloat(x0[r], u);
    if constexpr (kInterleaved) {
#pragma unroll
      for (int p = 0; p < kPairs; ++p) {
        v[2 * p] = u[2 * p] * k.c0[p] + u[2 * p + 1] * k.a[p];
        v[2 * p + 1] = u[2 * p + 1] * k.c1[p] + u[2 * p] * k.b[p];
      }
      StoreVector(y + r * int64_t{cols} + first, FromFloat<T>(v));
    } else {
      ToFloat(x1[r], v);
      float y0[kSize], y1[kSize];
#pragma unroll
      for (int p = 0; p < kPairs; ++p) {
        y0[p] = u[p] * k.c0[p] + v[p] * k.a[p];
        y1[p] = v[p] * k.c1[p] + u[p] * k.b[p];
      }
      StoreVector(y + r * int64_t{cols} + first, FromFloat<T>(y0));
      StoreVector(y + r * int64_t{cols} + half + first, FromFloat<T>(y1));
    }
  }
}

/// Rows that vectors do not fit: a thread takes a pair, or a column behind the pairs.
template <typename T>
__global__ void __launch_bounds__(kThreads) rope_pairs_kernel(RopeArgs args, uint32_t pieces) {
  const uint32_t i = blockIdx.x * uint32_t{kThreads} + threadIdx.x;
  const uint32_t row = i / pieces;
  if (row >= args.rows) return;
  const int piece = static_cast<int>(i % pieces), half = static_cast<int>(args.features / 2);
  const T* const x = static_cast<const T*>(args.x) + int64_t{row} * args.cols;
  T* const y = static_cast<T*>(args.y) + int64_t{row} * args.cols;
  if (piece >= half) {
    y[half + piece] = x[half + piece];
    return;
  }
  const int first = args.interleaved ? 2 * piece : piece;
  const int second = args.interleaved ? first + 1 : first + half;
  const int64_t table = TableRow(args.table_rows, row) * (args.whole_tables ? args.features : half);
  const int at0 = args.whole_tables ? first : piece, at1 = args.whole_tables ? second : piece;
  Coefficients<1> k;
  k.Set(0, args.cos[table + at0], args.cos[table + at1], args.sin[table + at0],
        args.sin[table + at1], args.transposed);
  const float x0 = ToFloat(x[first]), x1 = ToFloat(x[second]);
  y[first] = FromFloat<T>(x0 * k.c0[0] + x1 * k.a[0]);
  y[second] = FromFloat<T>(x1 * k.c1[0] + x0 * k.b[0]);
}

template <bool kInterleaved, typename T>
bool FitVectors(const RopeArgs& args) {
  constexpr int kSize = kVectorSize<T>;
  const int64_t rotated = kInterleaved ? args.features : args.features / 2;
  return rotated % kSize == 0 && (args.cols - args.features) % kSize == 0 &&
         AreAligned(static_cast<const char*>(args.x), static_cast<const char*>(args.y), args.cos,
                    args.sin);
}

/// Calls body(blocks, pieces) for threads that take `pieces` parts of `rows` rows.
template <typename Body>
Status Cover(int64_t rows, int64_t pieces, Body&& body) {
  const int64_t threads = rows * pieces;
  if (threads == 0) return {};
  if (threads > 0xffffffffll - kThreads) return {"x has 2^32 pieces or more"};
  body(static_cast<unsigned>((threads + kThreads - 1) / kThreads), static_cast<uint32_t>(pieces));
  return LastLaunch();
}

}  // namespace

Status Rope(const RopeArgs& args, const Launch& launch) {
  if (args.rows == 0 || args.cols == 0) return {};
  return DispatchDType(args.dtype, [&]<typename T>() -> Status {
    const auto vectors = [&]<bool kInterleaved>() -> Status {
      const int64_t rotated = kInterleaved ? args.features : args.features / 2;
      const int64_t pieces = (rotated + args.cols - args.features) / kVectorSize<T>;
      constexpr int kInner = TableRows::kRank - 1;
      const bool shares =
          args.table_rows.strides[kInner] == 0 && args.table_rows.sizes[kInner] % kSharingRows == 0;
      return Cover(shares ? args.rows / kSharingRows : args.rows, pieces,
                   [&](unsigned blocks, uint32_t count) {
                     if (shares) {
                       rope_kernel<kInterleaved, T, kSharingRows>
                           <<<blocks, kThreads, 0, launch.stream>>>(args, count);
                     } else {
                       rope_kernel<kInterleaved, T, 1>
                           <<<blocks, kThreads, 0, launch.stream>>>(args, count);
                     }
                   });
    };
    if (args.interleaved && FitVectors<true, T>(args)) return vectors.template operator()<true>();
    if (!args.interleaved && FitVectors<false, T>(args))
      return vectors.template operator()<false>();
    return Cover(args.rows, args.cols - args.features / 2, [&](unsigned blocks, uint32_t count) {
      rope_pairs_kernel<T><<<blocks, kThreads, 0, launch.stream>>>(args, count);
    });
  });
}

}  // namespace zenith
