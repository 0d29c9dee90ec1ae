// Splitting work and scratch memory, for all CPU kernels.
#pragma once

#include <cstdlib>

#include "ffi/cpu/launch.h"
#include "ffi/cpu/simd.h"

namespace zenith::ZENITH_ISA {

/// A task below this many vector operations or so (10 us) is not worth waking a thread.
inline constexpr int64_t kTaskElements = 32768;

/// Runs body(first, last) on ranges that cover [0, rows), each of about kTaskElements elements of
/// `row_cost`. One range runs on the caller. The split depends on the sizes only.
template <typename Body>
void ForRows(const Launch& launch, int64_t rows, int64_t row_cost, Body body) {
  if (rows <= 0) return;
  const int64_t grain = Max<int64_t>(1, kTaskElements / Max<int64_t>(1, row_cost));
  launch.ParallelFor(CeilDiv(rows, grain),
                     [&](int64_t i) { body(i * grain, Min((i + 1) * grain, rows)); });
}

/// Uninitialised floats, aligned to a cache line, handed out in pieces.
class Scratch {
 public:
  explicit Scratch(int64_t floats) {
    const int64_t bytes = RoundUp(Max<int64_t>(1, floats) * 4, kAlignment);
    base_ = static_cast<float*>(std::aligned_alloc(kAlignment, static_cast<size_t>(bytes)));
    next_ = base_;
  }
  ~Scratch() { std::free(base_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  bool ok() const { return base_ != nullptr; }
  /// What Take(floats) uses up.
  static int64_t Size(int64_t floats) { return RoundUp(floats, kAlignment / 4); }
  float* Take(int64_t floats) {
    float* const piece = next_;
    next_ += Size(floats);
    return piece;
  }

 private:
  static constexpr int64_t kAlignment = 64;
  float *base_, *next_;
};

/// Set by any task, read when all are done. Not std::atomic: its functions are inline ones.
class Flag {
 public:
  void Set() { __atomic_store_n(&set_, true, __ATOMIC_RELAXED); }
  bool is_set() const { return __atomic_load_n(&set_, __ATOMIC_RELAXED); }

 private:
  bool set_ = false;
};

inline constexpr Status kOutOfMemory{"out of host memory for kernel scratch"};

/// Calls body(T{}) with the storage type of `dtype`.
template <typename Body>
auto WithStorage(DType dtype, Body body) {
  switch (dtype) {
    case DType::kF16:
      return body(Half{});
    case DType::kBF16:
      return body(BFloat16{});
    case DType::kF32:
      break;
  }
  return body(float{});
}

}  // namespace zenith::ZENITH_ISA
