#include "ffi/core/thread_pool.h"

#include <pthread.h>
#include <sched.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <thread>
#include <utility>
#include <vector>

namespace zenith {
namespace {

using std::chrono::microseconds;
using std::chrono::steady_clock;

/// How long a thread keeps its processor for what comes next. Waking one costs 20 to 50 us, as long
/// as a layer's share of 32 rows, and most ops of a model follow each other sooner than this.
constexpr microseconds kSpin{100};
/// A thread whose time on a processor does not advance for so long is not running.
constexpr microseconds kStandstill{20};

inline void Pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#else
  std::this_thread::yield();
#endif
}

/// Until `ready()`, or for so long; returns whether it is.
template <typename Ready>
bool SpinUntil(microseconds longest, Ready ready) {
  const auto end = steady_clock::now() + longest;
  do {
    for (int i = 0; i < 64; ++i) {
      if (ready()) return true;
      Pause();
    }
  } while (steady_clock::now() < end);
  return false;
}

/// A thread as others see it: whether it runs, and where it may.
class Thread {
 public:
  static const std::shared_ptr<Thread>& This() {
    static const thread_local auto self = std::make_shared<Thread>();
    return self;
  }

  Thread() { pthread_getcpuclockid(pthread_self(), &clock_); }

  /// How long it has run, in ns; -1 where that is not known.
  int64_t Ran() const {
    timespec ran;
    if (clock_gettime(clock_, &ran) != 0) return -1;
    return int64_t{ran.tv_sec} * 1'000'000'000 + ran.tv_nsec;
  }

  /// Moves it to one of the processors that `choose` leaves of those that it may run on. Where it
  /// goes later is Linux's choice, as before. Does nothing while another thread moves it: what
  /// that one allows for a moment must not be taken for what the user does.
  template <typename Choose>
  void Move(Choose choose) {
    if (moving_.exchange(true, std::memory_order_acquire)) return;
    cpu_set_t allowed;  // sched_getaffinity fails with more than 1024 processors
    if (sched_getaffinity(id_, sizeof(allowed), &allowed) == 0) {
      cpu_set_t chosen = allowed;
      choose(chosen);
      if (CPU_COUNT(&chosen) != 0 && sched_setaffinity(id_, sizeof(chosen), &chosen) == 0) {
        sched_setaffinity(id_, sizeof(allowed), &allowed);
      }
    }
    moving_.store(false, std::memory_order_release);
  }

 private:
  const pid_t id_ = gettid();
  clockid_t clock_ = CLOCK_THREAD_CPUTIME_ID;
  std::atomic<bool> moving_ = false;
};

/// Moves this thread from `processor`, where the caller of its loop works, to any other that it may
/// run on. Linux starts a thread where it ran last when the processors are busy (it looks for no
/// idle one near 85 % of their capacity, SIS_UTIL), and two threads that then take turns on one
/// stay for hundreds of loops. An encoder with one sentence, 2 EPYC cores: 28 % of the calls in one
/// run and none in another, p99 8.2 ms, now 4.3; beside a busy process p50 5.7 ms, now 2.6
/// (2026-11-26).
void Leave(int processor) {
  if (processor < 0 || sched_getcpu() != processor) return;
  Thread::This()->Move([=](cpu_set_t& allowed) { CPU_CLR(processor, &allowed); });
}

/// Where a thread sits while it draws indices of a loop, for those who wait for it.
class Seat {
 public:
  /// Of this thread, before it draws.
  void Sit() {
    thread_ = Thread::This();
    state_.store(State::kTaken, std::memory_order_release);
  }

  /// Of this thread, when nothing is left to draw. Returns whether it was fetched meanwhile.
  bool Rise() {
    return state_.exchange(State::kFree, std::memory_order_acq_rel) == State::kFetched;
  }

  /// Thread::Ran; -1 where nobody sits.
  int64_t Ran() const {
    return state_.load(std::memory_order_acquire) == State::kTaken ? thread_->Ran() : -1;
  }

  /// Moves the thread, where it still sits, to the processor of this one, which then has to sleep.
  bool Fetch() {
    State state = State::kTaken;
    if (!state_.compare_exchange_strong(state, State::kFetched, std::memory_order_acq_rel)) {
      return false;
    }
    thread_->Move([here = sched_getcpu()](cpu_set_t& allowed) {
      const bool may = CPU_ISSET(here, &allowed);
      CPU_ZERO(&allowed);
      if (may) CPU_SET(here, &allowed);
    });
    return true;
  }

 private:
  enum class State { kFree, kTaken, kFetched };

  std::atomic<State> state_ = State::kFree;
  std::shared_ptr<Thread> thread_;
};

/// Until `ready()`, or for kSpin. If one of `seats` does not run meanwhile, because others have its
/// processor, fetches it to this one, which it needs now, and returns true. Linux would do that at
/// its next tick, up to 4 ms later: eight sentences beside a busy process took 25.2 ms, now 18.5,
/// the slowest of a hundred 33.6, now 21.4; ONNX Runtime 33.5 and 54.7 (2 EPYC cores, 2026-11-26).
template <typename Ready>
bool SpinOrFetch(std::span<Seat> seats, Ready ready) {
  std::vector<int64_t> ran;
  for (microseconds waited{0}; waited < kSpin; waited += kStandstill) {
    if (SpinUntil(kStandstill, ready)) return false;
    for (size_t i = 0; i < seats.size(); ++i) {
      const int64_t now = seats[i].Ran();
      if (i == ran.size()) {
        ran.push_back(now);
      } else if (now >= 0 && now == std::exchange(ran[i], now) && seats[i].Fetch()) {
        return true;
      }
    }
  }
  return false;
}

/// One parallel loop. Threads draw indices from `next` until none is left; who finishes the last
/// one wakes the caller. Helpers that the pool starts only after that still own the loop, find
/// nothing to draw and leave: `context` and `body` are touched only while the caller waits.
class Loop {
 public:
  Loop(int64_t count, void* context, void (*body)(void*, int64_t), int64_t helpers)
      : count_(count), context_(context), body_(body), helpers_(static_cast<size_t>(helpers)) {}

  void Work() {
    int64_t finished = 0;
    for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < count_; ++finished) {
      try {
        body_(context_, i);
      } catch (...) {
        if (!failed_.exchange(true)) error_ = std::current_exception();
      }
    }
    // One write for each thread, not for each index: the line is shared by all of them.
    if (finished > 0 && done_.fetch_add(finished, std::memory_order_acq_rel) + finished == count_) {
      done_.notify_one();
    }
  }

  /// Work of another thread than the caller.
  void Help() {
    Leave(caller_processor_);
    Work();
  }

  /// The same, while the caller can see it. Returns the seats that this thread is then to look
  /// after: the caller's, if it is the first of them. None at all where the caller has fetched this
  /// thread to its own processor, which it is to leave.
  std::optional<std::span<Seat>> HelpAndWatch() {
    Leave(caller_processor_);
    Seat& seat = helpers_[joined_.fetch_add(1, std::memory_order_relaxed)];
    seat.Sit();
    Work();
    if (seat.Rise()) {
      Leave(sched_getcpu());  // so that it does not wake here, in the caller's way
      return std::nullopt;
    }
    return std::span<Seat>(&caller_, &seat == &helpers_.front() ? 1 : 0);
  }

  /// Work of the caller, which keeps its processor while it waits for the others' indices.
  void WorkAndWatch() {
    caller_.Sit();
    Work();
    caller_.Rise();
    SpinOrFetch(helpers_, [&] { return done_.load(std::memory_order_acquire) == count_; });
  }

  void WaitUntilDone() const {
    for (int64_t seen; (seen = done_.load(std::memory_order_acquire)) < count_;) done_.wait(seen);
  }

  const std::exception_ptr& error() const { return error_; }

 private:
  const int64_t count_;
  void* const context_;
  void (*const body_)(void* context, int64_t i);
  const int caller_processor_ = sched_getcpu();
  std::atomic<int64_t> next_ = 0;
  std::atomic<int64_t> done_ = 0;
  std::atomic<bool> failed_ = false;
  std::exception_ptr error_ = nullptr;  // of the first body that threw; published by `done_`
  Seat caller_;
  std::vector<Seat> helpers_;  // in the order of `joined_`
  std::atomic<size_t> joined_ = 0;
};

/// Pool threads that have finished a loop and stay for kSpin: the next loop finds them awake.
class Standby {
 public:
  /// Gives `loop` to up to `wanted` threads that stay; returns to how many.
  int64_t Give(const std::shared_ptr<Loop>& loop, int64_t wanted) {
    const std::lock_guard lock(mutex_);
    const int64_t taken = std::min(wanted, waiting_ - Given());
    for (int64_t i = 0; i < taken; ++i) given_.push_back(loop);
    has_given_.store(!given_.empty(), std::memory_order_release);
    return taken;
  }

  /// The loop that this thread is given within kSpin, or none. seats: of the one before.
  std::shared_ptr<Loop> Wait(std::span<Seat> seats) {
    {
      const std::lock_guard lock(mutex_);
      ++waiting_;
    }
    SpinOrFetch(seats, [this] { return has_given_.load(std::memory_order_acquire); });
    const std::lock_guard lock(mutex_);
    --waiting_;  // who leaves takes one, so that a loop which was given is never left behind
    if (given_.empty()) return nullptr;
    auto loop = std::move(given_.back());
    given_.pop_back();
    has_given_.store(!given_.empty(), std::memory_order_release);
    return loop;
  }

 private:
  int64_t Given() const { return static_cast<int64_t>(given_.size()); }

  std::mutex mutex_;
  int64_t waiting_ = 0;                       // threads in Wait
  std::vector<std::shared_ptr<Loop>> given_;  // at most `waiting_`, one for each thread
  std::atomic<bool> has_given_ = false;
};

int64_t Processors() {
  static const int64_t count = std::max(1u, std::thread::hardware_concurrency());
  return count;
}

/// Threads that can run at once: the pool's and the caller.
int64_t Concurrency(const ::xla::ffi::ThreadPool& pool) {
  // num_threads is 0 where the executable has no pool.
  return pool.num_threads() == 0 ? 1 : std::min(pool.num_threads() + 1, Processors());
}

void ParallelForOnPool(void* pool, int64_t count, void* context,
                       void (*body)(void* context, int64_t i)) {
  auto& threads = *static_cast<::xla::ffi::ThreadPool*>(pool);
  int64_t helpers = std::min(count, Concurrency(threads)) - 1;
  auto loop = std::make_shared<Loop>(count, context, body, helpers);
  if (threads.num_threads() < Processors()) {
    // The caller has a processor beside the pool's: who waits on his own keeps nobody from working.
    static Standby& standby = *new Standby;  // never destroyed: pool threads outlive static objects
    helpers -= standby.Give(loop, helpers);
    for (int64_t i = 0; i < helpers; ++i) {
      auto help = [loop]() mutable {
        while (loop) {
          const auto seats = loop->HelpAndWatch();
          loop = seats ? standby.Wait(*seats) : nullptr;
        }
      };
      threads.Schedule(std::move(help));  // XLA's Schedule compiles for rvalues only
    }
    loop->WorkAndWatch();
  } else {
    for (int64_t i = 0; i < helpers; ++i) {
      auto help = [loop] { loop->Help(); };
      threads.Schedule(std::move(help));
    }
    loop->Work();
  }
  loop->WaitUntilDone();
  if (loop->error()) std::rethrow_exception(loop->error());
}

}  // namespace

Launch LaunchOn(::xla::ffi::ThreadPool& pool) {
  return Launch{&pool, Concurrency(pool), &ParallelForOnPool};
}

}  // namespace zenith
