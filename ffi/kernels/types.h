// What every kernel contract is made of. Knows neither XLA, CUDA nor Python.
#pragma once

#include <cstdint>

namespace zenith {

enum class DType : int32_t { kF32 = 0, kF16 = 1, kBF16 = 2 };

/// Outcome of a launch. `message` is a string literal: it names the invariant that was broken.
struct [[nodiscard]] Status {
  const char* message = nullptr;
  bool ok() const { return message == nullptr; }
};

/// Where a kernel runs: a CUDA stream (cuda/core/launch.h) or XLA's thread pool (ffi/cpu/launch.h).
/// Each back end is a module of its own and defines the type once.
struct Launch;

}  // namespace zenith
