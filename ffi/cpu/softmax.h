// Softmax by rows, each read from memory once: its later passes find it in cache. See
// ffi/kernels/softmax.h.
#pragma once

#include "ffi/cpu/math.h"
#include "ffi/cpu/parallel.h"
#include "ffi/kernels/softmax.h"

namespace zenith::ZENITH_ISA {

template <typename T>
ZENITH_NOINLINE void SoftmaxRow(int64_t cols, const T* x, T* y) {
  // A NaN may get lost in the maximum: exp(NaN - max) brings it into the sum all the same.
  const F32 max = Splat(Maximum(Reduce(
      cols, -kInfinity, [](F32 a, F32 b) { return Max(a, b); },
      [&](int64_t i, auto part) { return Load(x + i, part); })));
  if constexpr (sizeof(T) == 4) {
    const float sum = SumOver(cols, [&](int64_t i, auto part) {
      const F32 e = Exp(Load(x + i, part) - max);
      Store(y + i, e, part);
      return e;
    });
    const float r = 1.0f / sum;
    ForVectors(cols, [&](int64_t i, auto part) { Store(y + i, Load(y + i, part) * r, part); });
  } else {
    // y cannot hold exp() without rounding it: computed twice.
    const float sum =
        SumOver(cols, [&](int64_t i, auto part) { return Exp(Load(x + i, part) - max); });
    const float r = 1.0f / sum;
    ForVectors(cols,
               [&](int64_t i, auto part) { Store(y + i, Exp(Load(x + i, part) - max) * r, part); });
  }
}

template <typename T>
ZENITH_NOINLINE void SoftmaxBackwardRow(int64_t cols, const T* y, const T* dy, T* dx) {
  const float dot =
      SumOver(cols, [&](int64_t i, auto part) { return Load(y + i, part) * Load(dy + i, part); });
  ForVectors(cols, [&](int64_t i, auto part) {
    Store(dx + i, Load(y + i, part) * (Load(dy + i, part) - dot), part);
  });
}

inline Status SoftmaxForward(const SoftmaxForwardArgs& args, const Launch& launch) {
  WithStorage(args.dtype, [&]<typename T>(T) {
    const T* const x = static_cast<const T*>(args.x);
    T* const y = static_cast<T*>(args.y);
    const int64_t cols = args.cols;
    if (cols == 0) return;
    ForRows(launch, args.rows, cols, [=](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row) SoftmaxRow(cols, x + row * cols, y + row * cols);
    });
  });
  return {};
}

inline Status SoftmaxBackward(const SoftmaxBackwardArgs& args, const Launch& launch) {
  WithStorage(args.dtype, [&]<typename T>(T) {
    const T* const y = static_cast<const T*>(args.y);
    const T* const dy = static_cast<const T*>(args.dy);
    T* const dx = static_cast<T*>(args.dx);
    const int64_t cols = args.cols;
    if (cols == 0) return;
    ForRows(launch, args.rows, cols, [=](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row) {
        SoftmaxBackwardRow(cols, y + row * cols, dy + row * cols, dx + row * cols);
      }
    });
  });
  return {};
}

}  // namespace zenith::ZENITH_ISA
