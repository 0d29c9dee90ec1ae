// Row statistics of a cross entropy and its cotangent; the contract is ffi/kernels/cross_entropy.h.
// The logits cross memory once in each: nothing of a row is kept, so its length does not matter.
#include "cuda/core/convert.cuh"
#include "cuda/core/launch.h"
#include "cuda/core/math.cuh"
#include "cuda/core/reduce.cuh"
#include "cuda/core/rows.cuh"
#include "cuda/core/vector.cuh"
#include "ffi/kernels/cross_entropy.h"

namespace zenith {
namespace {

/// Vectors that a thread loads before it uses the first: one alone would leave memory idle.
constexpr int kUnroll = 4;
/// Vectors a thread takes of a row, about; and threads of a block of narrow teams.
constexpr int kVectorsPerThread = 8, kBlockThreads = 256;

__device__ __forceinline__ bool IsInfinite(float x) { return fabsf(x) == INFINITY; }

/// One team per row, which is read once. Each thread keeps its own running maximum and the sum of
/// exponentials relative to it (the paper's online normaliser).
template <typename T, int kSize>
__global__ void __launch_bounds__(kMaxBlockThreads)
    cross_entropy_forward_kernel(CrossEntropyForwardArgs args, int width) {
  __shared__ TeamScratch<1> scratch;
  __shared__ TeamScratch<2> sum_scratch;
  Team team(width);
  const int64_t row = int64_t{blockIdx.x} * team.count() + team.index();
  const int64_t cols = row < args.rows ? args.cols : 0;
  const int64_t step = int64_t{width} * kSize;
  const T* gX = static_cast<const T*>(args.logits) + row * args.cols;

  // Now, and not behind the reductions: two loads, the second from where the first says.
  float picked = 0;
  if (team.rank() == 0 && row < args.rows) {
    const int64_t label = args.labels[row];
    if (label >= 0 && label < args.cols) picked = ToFloat(gX[label]);
  }
  float thread_max = Max::kIdentity;
  float sums[2] = {};  // of exponentials, of logits
  for (int64_t col = team.rank() * kSize; col < cols; col += kUnroll * step) {
    Vector<T, kSize> x[kUnroll];
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      if (col + i * step < cols) x[i] = LoadReadOnly<kSize>(gX + col + i * step);
    }
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      if (col + i * step >= cols) break;
      float values[kSize];
      ToFloat(x[i], values);
      float new_max = thread_max;
#pragma unroll
      for (float value : values) new_max = fmaxf(new_max, value);
      // While all was -inf there is nothing to rescale, and -inf - -inf would be NaN; nor inf -
      // inf.
      const float base = IsInfinite(new_max) ? 0.0f : new_max;
      sums[0] *= Exp<T>(thread_max - base);
#pragma unroll
      for (float value : values) {
        sums[0] += Exp<T>(value - base);
        sums[1] += value;
      }
      thread_max = new_max;
    }
  }
  const float max = team.AllReduce<Max>(thread_max, scratch);
  const float base = IsInfinite(max) ? 0.0f : max;
  // A thread that saw only -inf has sum 0, which any finite factor keeps.
  sums[0] *= Exp<T>(thread_max - base);
  team.AllReduce<Add>(sums, sum_scratch);
  if (team.rank() != 0 || row >= args.rows) return;
  args.lse[row] = base + logf(sums[0]);
  args.picked[row] = picked;
  args.total[row] = sums[1];
}

/// One team per row: logits are read once, dlogits written once, by the thread that read them: they
/// may be one array.
template <typename T, int kSize>
__global__ void __launch_bounds__(kMaxBlockThreads)
    cross_entropy_backward_kernel(CrossEntropyBackwardArgs args, int width) {
  const Team team(width);
  const int64_t row = int64_t{blockIdx.x} * team.count() + team.index();
  if (row >= args.rows) return;
  const int64_t step = int64_t{width} * kSize;
  const T* gX = static_cast<const T*>(args.logits) + row * args.cols;
  T* gDx = static_cast<T*>(args.dlogits) + row * args.cols;
  const int64_t label = args.labels[row];
  const float lse = args.lse[row], dlse = args.dlse[row], dpicked = args.dpicked[row],
              dtotal = args.dtotal[row];
  for (int64_t col = team.rank() * kSize; col < args.cols; col += kUnroll * step) {
    Vector<T, kSize> x[kUnroll];
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      if (col + i * step < args.cols) x[i] = LoadVector<kSize>(gX + col + i * step);
    }
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      const int64_t first = col + i * step;
      if (first >= args.cols) break;
      float values[kSize];
      ToFloat(x[i], values);
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        values[j] = Exp<T>(values[j] - lse) * dlse + dtotal + (first + j == label ? dpicked : 0.0f);
      }
      StoreVector(gDx + first, FromFloat<T>(values));
    }
  }
}

/// Calls `body.template operator()<kSize>(RowShape)`: kSize elements move together.
template <typename T, typename Body>
Status DispatchLoop(int64_t cols, bool aligned, Body&& body) {
  constexpr int kSize = kVectorSize<T>;
  if (aligned && cols % kSize == 0) {
    return body.template operator()<kSize>(
        ShapeFor(cols / kSize, kVectorsPerThread, kBlockThreads, kLeastShared));
  }
  return body.template operator()<1>(ShapeFor(cols, kVectorsPerThread, kBlockThreads));
}

}  // namespace

Status CrossEntropyForward(const CrossEntropyForwardArgs& args, const Launch& launch) {
  if (args.rows == 0) return {};
  return DispatchDType(args.dtype, [&]<typename T>() -> Status {
    return DispatchLoop<T>(args.cols, AreAligned(args.logits), [&]<int kSize>(RowShape shape) {
      cross_entropy_forward_kernel<T, kSize>
          <<<shape.blocks(args.rows), shape.threads(), 0, launch.stream>>>(args, shape.width);
      return LastLaunch();
    });
  });
}

Status CrossEntropyBackward(const CrossEntropyBackwardArgs& args, const Launch& launch) {
  if (args.rows == 0) return {};
  return DispatchDType(args.dtype, [&]<typename T>() -> Status {
    return DispatchLoop<T>(
        args.cols, AreAligned(args.logits, args.dlogits), [&]<int kSize>(RowShape shape) {
          cross_entropy_backward_kernel<T, kSize>
              <<<shape.blocks(args.rows), shape.threads(), 0, launch.stream>>>(args, shape.width);
          return LastLaunch();
        });
  });
}

}  // namespace zenith
