// Row statistics of a cross entropy, each row read from memory once: its second pass finds it in
// cache. See ffi/kernels/cross_entropy.h.
#pragma once

#include "ffi/cpu/math.h"
#include "ffi/cpu/parallel.h"
#include "ffi/kernels/cross_entropy.h"

namespace zenith::ZENITH_ISA {

template <typename T>
ZENITH_NOINLINE void CrossEntropyRow(int64_t cols, const T* logits, int64_t label, float* lse,
                                     float* picked, float* total) {
  // A NaN may get lost in the maximum: exp(NaN - max) brings it into the sum all the same.
  const float max = Maximum(Reduce(
      cols, -kInfinity, [](F32 a, F32 b) { return Max(a, b); },
      [&](int64_t i, auto part) { return Load(logits + i, part); }));
  // inf - inf would be NaN; exp(inf) is inf, and so is its logarithm.
  const F32 base = Splat(max == kInfinity || max == -kInfinity ? 0.0f : max);
  F32 sums{};
  const float sum = SumOver(cols, [&](int64_t i, auto part) {
    const F32 x = Load(logits + i, part);
    sums += Fill(x, part, 0.0f);
    return Exp(x - base);
  });
  *lse = base[0] + __builtin_logf(sum);
  *picked = label >= 0 && label < cols ? Load(logits + label, Part{1})[0] : 0.0f;
  *total = Sum(sums);
}

template <typename T>
ZENITH_NOINLINE void CrossEntropyBackwardRow(int64_t cols, const T* logits, int64_t label,
                                             float lse, float dlse, float dpicked, float dtotal,
                                             T* dlogits) {
  const auto cotangent = [&](int64_t i, auto part) {
    return Exp(Load(logits + i, part) - lse) * dlse + dtotal;
  };
  const bool is_class = label >= 0 && label < cols;
  const auto at_label = cotangent(is_class ? label : 0, Part{1});  // before it is overwritten
  ForVectors(cols, [&](int64_t i, auto part) { Store(dlogits + i, cotangent(i, part), part); });
  if (is_class) Store(dlogits + label, at_label + dpicked, Part{1});
}

inline Status CrossEntropyForward(const CrossEntropyForwardArgs& args, const Launch& launch) {
  WithStorage(args.dtype, [&]<typename T>(T) {
    ForRows(launch, args.rows, args.cols, [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row) {
        CrossEntropyRow(args.cols, static_cast<const T*>(args.logits) + row * args.cols,
                        args.labels[row], args.lse + row, args.picked + row, args.total + row);
      }
    });
  });
  return {};
}

inline Status CrossEntropyBackward(const CrossEntropyBackwardArgs& args, const Launch& launch) {
  WithStorage(args.dtype, [&]<typename T>(T) {
    ForRows(launch, args.rows, args.cols, [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row) {
        CrossEntropyBackwardRow(args.cols, static_cast<const T*>(args.logits) + row * args.cols,
                                args.labels[row], args.lse[row], args.dlse[row], args.dpicked[row],
                                args.dtotal[row], static_cast<T*>(args.dlogits) + row * args.cols);
      }
    });
  });
  return {};
}

}  // namespace zenith::ZENITH_ISA
