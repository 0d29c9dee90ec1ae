#include "ffi/core/thread_pool.h"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <memory>
#include <utility>

namespace zenith {
namespace {

/// One parallel loop. Threads draw indices from `next` until none is left; who finishes the last
/// one wakes the caller. Helpers that the pool starts only after that still own the loop, find
/// nothing to draw and leave: `context` and `body` are touched only while the caller waits.
struct Loop {
  const int64_t count;
  void* const context;
  void (*const body)(void* context, int64_t i);
  std::atomic<int64_t> next = 0;
  std::atomic<int64_t> done = 0;
  std::atomic<bool> failed = false;
  std::exception_ptr error = nullptr;  // of the first body that threw; published by `done`

  Loop(int64_t count, void* context, void (*body)(void*, int64_t))
      : count(count), context(context), body(body) {}

  void Work() {
    int64_t finished = 0;
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count; ++finished) {
      try {
        body(context, i);
      } catch (...) {
        if (!failed.exchange(true)) error = std::current_exception();
      }
    }
    // One write for each thread, not for each index: the line is shared by all of them.
    if (finished > 0 && done.fetch_add(finished, std::memory_order_acq_rel) + finished == count) {
      done.notify_one();
    }
  }

  void WaitUntilDone() const {
    for (int64_t seen; (seen = done.load(std::memory_order_acquire)) < count;) done.wait(seen);
  }
};

void ParallelForOnPool(void* pool, int64_t count, void* context,
                       void (*body)(void* context, int64_t i)) {
  auto& threads = *static_cast<::xla::ffi::ThreadPool*>(pool);
  auto loop = std::make_shared<Loop>(count, context, body);
  const int64_t helpers = std::min(count, threads.num_threads()) - 1;
  for (int64_t i = 0; i < helpers; ++i) {
    auto help = [loop] { loop->Work(); };
    threads.Schedule(std::move(help));  // XLA's Schedule compiles for rvalues only
  }
  loop->Work();
  loop->WaitUntilDone();
  if (loop->error) std::rethrow_exception(loop->error);
}

}  // namespace

Launch LaunchOn(::xla::ffi::ThreadPool& pool) {
  // num_threads is 0 where the executable has no pool.
  return Launch{&pool, std::max<int64_t>(1, pool.num_threads()), &ParallelForOnPool};
}

}  // namespace zenith
