// Softmax by rows, forward and backward; the contract is ffi/kernels/softmax.h.
#include "cuda/core/block_team.cuh"
#include "cuda/core/convert.cuh"
#include "cuda/core/device.h"
#include "cuda/core/launch.h"
#include "cuda/core/logits.cuh"
#include "cuda/core/long_rows.h"
#include "cuda/core/reduce.cuh"
#include "cuda/core/rows.cuh"
#include "cuda/core/vector.cuh"
#include "cuda/softmax/forward.cuh"
#include "cuda/softmax/kernels.h"

namespace zenith {
namespace {

/// Any number of columns: one team per row, x read twice. Each thread keeps its own running maximum
/// and the sum of exponentials relative to it (the paper's online normaliser).
template <typename T, int kSize>
__global__ void __launch_bounds__(kMaxBlockThreads)
    softmax_forward_looped_kernel(SoftmaxForwardArgs args, int width) {
  __shared__ TeamScratch<1> scratch;
  Team team(width);
  const int64_t row = int64_t{blockIdx.x} * team.count() + team.index();
  const int64_t cols = row < args.rows ? args.cols : 0;
  const int64_t step = int64_t{width} * kSize;
  const T* gX = static_cast<const T*>(args.x) + row * args.cols;
  T* gY = static_cast<T*>(args.y) + row * args.cols;

  float thread_max = Max::kIdentity;
  float sum = 0;
  for (int64_t col = team.rank() * kSize; col < cols; col += step) {
    float values[kSize];
    ToFloat(LoadVector<kSize>(gX + col), values);
    float new_max = thread_max;
#pragma unroll
    for (float value : values) new_max = fmaxf(new_max, value);
    // While all was -inf there is nothing to rescale, and -inf - -inf would be NaN.
    const float base = new_max == Max::kIdentity ? 0.0f : new_max;
    sum *= Weight<T>(thread_max - base);
#pragma unroll
    for (float value : values) sum += Weight<T>(value - base);
    thread_max = new_max;
  }
  const float max = team.AllReduce<Max>(thread_max, scratch);
  // A thread that saw only -inf has sum 0, or NaN; 0 * exp(-inf - max) keeps either.
  const float base = max == Max::kIdentity ? 0.0f : max;
  const float scale = 1.0f / team.AllReduce<Add>(sum * Weight<T>(thread_max - base), scratch);

  for (int64_t col = team.rank() * kSize; col < cols; col += step) {
    float values[kSize];
    ToFloat(LoadVector<kSize>(gX + col), values);
#pragma unroll
    for (float& value : values) value = Weight<T>(value - max) * scale;
    StoreVector(gY + col, FromFloat<T>(values));
  }
}

/// dx = y * (dy - sum(dy * y)), one team per row, y and dy in registers: each crosses memory once.
template <typename T, int kSize, int kVectors>
__global__ void __launch_bounds__(kMaxBlockThreads)
    softmax_backward_kernel(SoftmaxBackwardArgs args, int width) {
  __shared__ TeamScratch<1> scratch;
  Team team(width);
  const int cols = static_cast<int>(args.cols);
  const int64_t row = int64_t{blockIdx.x} * team.count() + team.index();
  const T* gY = static_cast<const T*>(args.y) + row * cols;
  const T* gDy = static_cast<const T*>(args.dy) + row * cols;
  T* gDx = static_cast<T*>(args.dx) + row * cols;
  const RowSlice<kSize> slice{row < args.rows ? cols : 0, width, team.rank()};

  Vector<T, kSize> y[kVectors], dy[kVectors];
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    if (!slice.has(i)) continue;
    y[i] = LoadVector<kSize>(gY + slice.col(i));
    dy[i] = LoadVector<kSize>(gDy + slice.col(i));
  }

  float dot = 0;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    if (!slice.has(i)) continue;
    float y_values[kSize], dy_values[kSize];
    ToFloat(y[i], y_values);
    ToFloat(dy[i], dy_values);
#pragma unroll
    for (int j = 0; j < kSize; ++j) dot += y_values[j] * dy_values[j];
  }
  dot = team.AllReduce<Add>(dot, scratch);

#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    if (!slice.has(i)) continue;
    ForgetFloats(y[i]);
    ForgetFloats(dy[i]);
    float y_values[kSize], dy_values[kSize];
    ToFloat(y[i], y_values);
    ToFloat(dy[i], dy_values);
#pragma unroll
    for (int j = 0; j < kSize; ++j) dy_values[j] = y_values[j] * (dy_values[j] - dot);
    StoreVector(gDx + slice.col(i), FromFloat<T>(dy_values));
  }
}

/// Any number of columns: one team per row, y and dy read twice.
template <typename T, int kSize>
__global__ void __launch_bounds__(kMaxBlockThreads)
    softmax_backward_looped_kernel(SoftmaxBackwardArgs args, int width) {
  __shared__ TeamScratch<1> scratch;
  Team team(width);
  const int64_t row = int64_t{blockIdx.x} * team.count() + team.index();
  const int64_t cols = row < args.rows ? args.cols : 0;
  const int64_t step = int64_t{width} * kSize;
  const T* gY = static_cast<const T*>(args.y) + row * args.cols;
  const T* gDy = static_cast<const T*>(args.dy) + row * args.cols;
  T* gDx = static_cast<T*>(args.dx) + row * args.cols;

  float dot = 0;
  for (int64_t col = team.rank() * kSize; col < cols; col += step) {
    float y[kSize], dy[kSize];
    ToFloat(LoadVector<kSize>(gY + col), y);
    ToFloat(LoadVector<kSize>(gDy + col), dy);
#pragma unroll
    for (int j = 0; j < kSize; ++j) dot += y[j] * dy[j];
  }
  dot = team.AllReduce<Add>(dot, scratch);

  for (int64_t col = team.rank() * kSize; col < cols; col += step) {
    float y[kSize], dy[kSize];
    ToFloat(LoadVector<kSize>(gY + col), y);
    ToFloat(LoadVector<kSize>(gDy + col), dy);
#pragma unroll
    for (int j = 0; j < kSize; ++j) dy[j] = y[j] * (dy[j] - dot);
    StoreVector(gDx + col, FromFloat<T>(dy));
  }
}

}  // namespace

Status SoftmaxForward(const SoftmaxForwardArgs& args, const Launch& launch) {
  if (args.rows == 0 || args.cols == 0) return {};
  return DispatchDType(args.dtype, [&]<typename T>() -> Status {
    return DispatchRow<T, 8, true>(
        args.cols, AreAligned(args.x, args.y), [&]<int kSize, int kVectors>(RowShape shape) {
#ifdef ZENITH_HOPPER
          if (kSize > 1 && softmax::ForwardTakes(args.cols / kSize) && ChoosesHopper()) {
            return softmax::HopperForward(args, launch);
          }
#endif
          if constexpr (kVectors == kLooped) {
            softmax_forward_looped_kernel<T, kSize>
                <<<shape.blocks(args.rows), shape.threads(), 0, launch.stream>>>(args, shape.width);
          } else {
            softmax::forward_kernel<BlockTeam, T, kSize, kVectors>
                <<<shape.blocks(args.rows), shape.threads(), 0, launch.stream>>>(args, shape.width);
          }
          return LastLaunch();
        });
  });
}

Status SoftmaxBackward(const SoftmaxBackwardArgs& args, const Launch& launch) {
  if (args.rows == 0 || args.cols == 0) return {};
  return DispatchDType(args.dtype, [&]<typename T>() -> Status {
    return DispatchRow<T, 4, true>(
        args.cols, AreAligned(args.y, args.dy, args.dx),
        [&]<int kSize, int kVectors>(RowShape shape) {
          if constexpr (kVectors == kLooped) {
#ifdef ZENITH_HOPPER
            if (kSize > 1 && long_rows::Fits(args.cols / kSize) && ChoosesHopper()) {
              return softmax::HopperBackward(args, launch);
            }
#endif
            softmax_backward_looped_kernel<T, kSize>
                <<<shape.blocks(args.rows), shape.threads(), 0, launch.stream>>>(args, shape.width);
          } else {
            softmax_backward_kernel<T, kSize, kVectors>
                <<<shape.blocks(args.rows), shape.threads(), 0, launch.stream>>>(args, shape.width);
          }
          return LastLaunch();
        });
  });
}

}  // namespace zenith
