// XLA's thread pool, as the CPU kernels know it.
#pragma once

#include <cstdint>
#include <type_traits>

#include "ffi/kernels/types.h"

namespace zenith {

/// Runs `body(context, i)` once for each i in [0, count), on the pool's threads and on the calling
/// one. Implemented in ffi/core/ on XLA's ThreadPool; a plain loop in stand-alone tests.
struct Launch {
  void* pool;       // opaque to kernels
  int64_t threads;  // how many can run at once, the caller included; at least 1
  void (*parallel_for)(void* pool, int64_t count, void* context,
                       void (*body)(void* context, int64_t i));

  /// ParallelFor(count, [&](int64_t i) {...}): blocks until every i is done. Never nested.
  template <typename Body>
  void ParallelFor(int64_t count, Body&& body) const {
    if (count <= 0) return;
    if (count == 1 || threads == 1) {
      for (int64_t i = 0; i < count; ++i) body(i);
      return;
    }
    parallel_for(pool, count, &body, [](void* context, int64_t i) {
      (*static_cast<std::remove_reference_t<Body>*>(context))(i);
    });
  }
};

}  // namespace zenith
