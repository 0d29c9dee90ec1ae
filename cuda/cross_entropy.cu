// Row statistics of a cross entropy and its cotangent; the contract is ffi/kernels/cross_entropy.h.
// The logits cross memory once in each: nothing of a row is kept, so its length does not matter.
#include "cuda/core/convert.cuh"
#include "cuda/core/launch.h"
#include "cuda/core/logits.cuh"
#include "cuda/core/math.cuh"
#include "cuda/core/reduce.cuh"
#include "cuda/core/rows.cuh"
#include "cuda/core/vector.cuh"
#include "ffi/kernels/cross_entropy.h"

namespace zenith {
namespace {

/// Vectors that a thread loads before it uses the first: one alone would leave memory idle. The
/// forward kernel loads as many while it adds the ones before.
constexpr int kUnroll = 4;
/// Vectors (or elements) a thread takes of a row of so many, about: 512 x 128256 bfloat16s take 50
/// us with 32 and 54 with 16, 131072 x 512 53 with 16 and 51 with 8 (H100, 11/2026).
constexpr int ForwardVectors(int64_t units) { return units <= 64 ? 8 : units <= 4096 ? 16 : 32; }
constexpr int BackwardVectors(int64_t) { return 8; }
/// Threads of a block of narrow teams.
constexpr int kBlockThreads = 256;

/// A thread's part of a row: the running maximum, the sum of exponentials relative to it (the
/// paper's online normaliser), and the sum of the logits.
template <typename T>
struct OnlineSums {
  float max = Max::kIdentity, exponentials = 0, total = 0;

  /// The first `count` of the vectors, at least one, all for one rescaling.
  template <int kSize, int kVectors>
  __device__ __forceinline__ void Take(Vector<T, kSize> (&x)[kVectors], int count) {
    Vector<T, kSize> largest = x[0];
#pragma unroll
    for (int i = 1; i < kVectors; ++i) {
      if (i < count) largest = Larger(largest, x[i]);
    }
    const float new_max = fmaxf(max, Largest(largest));
    exponentials = RelativeTo(new_max);
    max = new_max;
    const float base = Base(new_max), scaled = base * kLog2E;
    if (sizeof(T) == 2 && isfinite(scaled)) {
      // One instruction less an element. What rounding `scaled` does to all of a thread's weights
      // is half a unit of base, and so of the result.
      ForEach(x, count, [&](float value) {
        exponentials += Exp2(fmaf(value, kLog2E, -scaled));
        total += value;
      });
    } else {
      ForEach(x, count, [&](float value) {
        exponentials += Weight<T>(value - base);
        total += value;
      });
    }
  }

  /// The sum of exponentials relative to a maximum that is not less. A thread that saw only -inf
  /// has sum 0, which any finite factor keeps.
  __device__ __forceinline__ float RelativeTo(float other) const {
    return exponentials * Weight<T>(max - Base(other));
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
      ForEachValue(x[i], body);
    }
  }
};

/// One team per row, which is read once, a turn's vectors while the turn before is added.
template <typename T, int kSize, int kTurn>
__global__ void __launch_bounds__(kMaxBlockThreads)
    cross_entropy_forward_kernel(CrossEntropyForwardArgs args, int width) {
  __shared__ TeamScratch<1> scratch;
  __shared__ TeamScratch<2> sum_scratch;
  Team team(width);
  const int64_t row = int64_t{blockIdx.x} * team.count() + team.index();
  const int64_t cols = row < args.rows ? args.cols : 0;
  const int64_t step = int64_t{width} * kSize;
  const T* gX = static_cast<const T*>(args.logits) + row * args.cols;

  using Turn = Vector<T, kSize>[kTurn];
  const auto load = [&](Turn& x, int64_t col) {
#pragma unroll
    for (int i = 0; i < kTurn; ++i) {
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
  for (; col < cols; col += kTurn * step) {
    load(next, col + kTurn * step);
    const int64_t left = (cols - col + step - 1) / step;
    if (left >= kTurn) {
      sums.Take(x, kTurn);  // unrolled
    } else {
      sums.Take(x, static_cast<int>(left));
    }
#pragma unroll
    for (int i = 0; i < kTurn; ++i) x[i] = next[i];
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
/// thread takes about `per_thread(how many there are)`.
template <typename T, typename Body>
Status DispatchLoop(int64_t cols, bool aligned, int (*per_thread)(int64_t), Body&& body) {
  constexpr int kSize = kVectorSize<T>;
  if (aligned && cols % kSize == 0) {
    const int64_t vectors = cols / kSize;
    return body.template operator()<kSize>(
        ShapeFor(vectors, per_thread(vectors), kBlockThreads, kLeastShared));
  }
  return body.template operator()<1>(ShapeFor(cols, per_thread(cols), kBlockThreads));
}

}  // namespace

Status CrossEntropyForward(const CrossEntropyForwardArgs& args, const Launch& launch) {
  if (args.rows == 0) return {};
  return DispatchDType(args.dtype, [&]<typename T>() -> Status {
    const bool aligned = AreAligned(args.logits);
    return DispatchLoop<T>(args.cols, aligned, ForwardVectors, [&]<int kSize>(RowShape shape) {
      // Few vectors a thread: more threads instead, for which there are fewer registers.
      const auto kernel = shape.width * 2 * kSize >= args.cols
                              ? cross_entropy_forward_kernel<T, kSize, 2>
                              : cross_entropy_forward_kernel<T, kSize, kUnroll>;
      kernel<<<shape.blocks(args.rows), shape.threads(), 0, launch.stream>>>(args, shape.width);
      return LastLaunch();
    });
  });
}

Status CrossEntropyBackward(const CrossEntropyBackwardArgs& args, const Launch& launch) {
  if (args.rows == 0) return {};
  return DispatchDType(args.dtype, [&]<typename T>() -> Status {
    return DispatchLoop<T>(args.cols, AreAligned(args.logits, args.dlogits), BackwardVectors,
                           [&]<int kSize>(RowShape shape) {
                             cross_entropy_backward_kernel<T, kSize>
                                 <<<shape.blocks(args.rows), shape.threads(), 0, launch.stream>>>(
                                     args, shape.width);
                             return LastLaunch();
                           });
  });
}

}  // namespace zenith
