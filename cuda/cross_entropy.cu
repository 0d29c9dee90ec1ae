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

/// Vectors that a thread loads before it uses the first: one alone would leave memory idle. The
/// forward kernel loads as many while it adds the ones before.
constexpr int kForwardUnroll = 2, kUnroll = 4;
/// Vectors a thread takes of a row, about; and threads of a block of narrow teams.
constexpr int kForwardVectors = 16, kBackwardVectors = 8, kBlockThreads = 256;

/// A thread's part of a row: the running maximum, the sum of exponentials relative to it (the
/// paper's online normaliser), and the sum of the logits.
template <typename T>
struct OnlineSums {
  float max = Max::kIdentity, exponentials = 0, total = 0;

  /// The first `count` of the vectors, all for one rescaling.
  template <int kSize, int kVectors>
  __device__ __forceinline__ void Take(Vector<T, kSize> (&x)[kVectors], int count) {
    float new_max = max;
    ForEach(x, count, [&](float value) { new_max = fmaxf(new_max, value); });
    exponentials = RelativeTo(new_max);
    max = new_max;
    const float base = Base(new_max);
    ForEach(x, count, [&](float value) {
      exponentials += Exp<T>(value - base);
      total += value;
    });
  }

  /// The sum of exponentials relative to a maximum that is not less. A thread that saw only -inf
  /// has sum 0, which any finite factor keeps.
  __device__ __forceinline__ float RelativeTo(float other) const {
    return exponentials * Exp<T>(max - Base(other));
  }

  static __device__ __forceinline__ float LogSumExp(float max, float exponentials) {
    return Base(max) + logf(exponentials);
  }

 private:
  /// While all was -inf there is nothing to rescale, and -inf - -inf would be NaN; nor inf - inf.
  static __device__ __forceinline__ float Base(float max) {
    return fabsf(max) == INFINITY ? 0.0f : max;
  }

  template <int kSize, int kVectors, typename Body>
  static __device__ __forceinline__ void ForEach(Vector<T, kSize> (&x)[kVectors], int count,
                                                 Body&& body) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (i >= count) break;
      ForgetFloats(x[i]);
      float values[kSize];
      ToFloat(x[i], values);
#pragma unroll
      for (float value : values) body(value);
    }
  }
};

/// One team per row, which is read once, a turn's vectors while the turn before is added.
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

  using Turn = Vector<T, kSize>[kForwardUnroll];
  const auto load = [&](Turn& x, int64_t col) {
#pragma unroll
    for (int i = 0; i < kForwardUnroll; ++i) {
      if (col + i * step < cols) x[i] = LoadReadOnly<kSize>(gX + col + i * step);
    }
  };
  int64_t col = team.rank() * kSize;
  Turn x, next;
  load(x, col);
  // Now, and not behind the reductions: two loads, the second from where the first says.
  float picked = 0;
  if (team.rank() == 0 && row < args.rows) {
    const int64_t label = args.labels[row];
    if (label >= 0 && label < args.cols) picked = ToFloat(gX[label]);
  }
  OnlineSums<T> sums;
  for (; col < cols; col += kForwardUnroll * step) {
    load(next, col + kForwardUnroll * step);
    const int64_t left = (cols - col + step - 1) / step;
    if (left >= kForwardUnroll) {
      sums.Take(x, kForwardUnroll);  // unrolled
    } else {
      sums.Take(x, static_cast<int>(left));
    }
#pragma unroll
    for (int i = 0; i < kForwardUnroll; ++i) x[i] = next[i];
  }
  const float max = team.AllReduce<Max>(sums.max, scratch);
  float both[2] = {sums.RelativeTo(max), sums.total};
  team.AllReduce<Add>(both, sum_scratch);
  if (team.rank() != 0 || row >= args.rows) return;
  args.lse[row] = sums.LogSumExp(max, both[0]);
  args.picked[row] = picked;
  args.total[row] = both[1];
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

/// Calls `body.template operator()<kSize>(RowShape)`: kSize elements move together, of which a
/// thread takes about `per_thread`.
template <typename T, typename Body>
Status DispatchLoop(int64_t cols, bool aligned, int per_thread, Body&& body) {
  constexpr int kSize = kVectorSize<T>;
  if (aligned && cols % kSize == 0) {
    return body.template operator()<kSize>(
        ShapeFor(cols / kSize, per_thread, kBlockThreads, kLeastShared));
  }
  return body.template operator()<1>(ShapeFor(cols, per_thread, kBlockThreads));
}

}  // namespace

Status CrossEntropyForward(const CrossEntropyForwardArgs& args, const Launch& launch) {
  if (args.rows == 0) return {};
  return DispatchDType(args.dtype, [&]<typename T>() -> Status {
    const bool aligned = AreAligned(args.logits);
    return DispatchLoop<T>(args.cols, aligned, kForwardVectors, [&]<int kSize>(RowShape shape) {
      cross_entropy_forward_kernel<T, kSize>
          <<<shape.blocks(args.rows), shape.threads(), 0, launch.stream>>>(args, shape.width);
      return LastLaunch();
    });
  });
}

Status CrossEntropyBackward(const CrossEntropyBackwardArgs& args, const Launch& launch) {
  if (args.rows == 0) return {};
  return DispatchDType(args.dtype, [&]<typename T>() -> Status {
    return DispatchLoop<T>(args.cols, AreAligned(args.logits, args.dlogits), kBackwardVectors,
                           [&]<int kSize>(RowShape shape) {
                             cross_entropy_backward_kernel<T, kSize>
                                 <<<shape.blocks(args.rows), shape.threads(), 0, launch.stream>>>(
                                     args, shape.width);
                             return LastLaunch();
                           });
  });
}

}  // namespace zenith
