#include "tests/cpp/harness.h"

#include <atomic>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <cstdio>
#include <limits>
#include <mutex>
#include <thread>

namespace zenith::test {
namespace {

struct Format {
  int mantissa, min_exponent, max_exponent;  // stored bits; of normal numbers
};
Format FormatOf(DType dtype) {
  switch (dtype) {
    case DType::kF16:
      return {10, -14, 15};
    case DType::kBF16:
      return {7, -126, 127};
    case DType::kF32:
      break;
  }
  return {23, -126, 127};
}

/// Rounds to nearest even by the definition of the format; shares no code with the kernels.
uint32_t Encode(DType dtype, double value) {
  const Format format = FormatOf(dtype);
  const int exponent_bits = dtype == DType::kF16 ? 5 : 8;
  const uint32_t sign = std::signbit(value) ? 1u << (format.mantissa + exponent_bits) : 0u;
  const uint32_t inf = ((1u << exponent_bits) - 1) << format.mantissa;
  if (std::isnan(value)) return sign | inf | (1u << (format.mantissa - 1));
  value = std::fabs(value);
  if (value == 0) return sign;
  int exponent = std::isinf(value) ? format.max_exponent + 1 : std::ilogb(value);
  if (exponent < format.min_exponent) exponent = format.min_exponent;
  if (exponent > format.max_exponent) return sign | inf;
  const double units = std::nearbyint(std::ldexp(value, format.mantissa - exponent));
  // A subnormal has no implicit bit; a carry from rounding up moves on to the next exponent.
  const uint32_t base = static_cast<uint32_t>(exponent - format.min_exponent) << format.mantissa;
  return sign | (base + static_cast<uint32_t>(units));
}

double Decode(DType dtype, uint32_t bits) {
  const Format format = FormatOf(dtype);
  const int exponent_bits = dtype == DType::kF16 ? 5 : 8;
  const double sign = bits >> (format.mantissa + exponent_bits) ? -1.0 : 1.0;
  const uint32_t exponent = (bits >> format.mantissa) & ((1u << exponent_bits) - 1);
  const uint32_t mantissa = bits & ((1u << format.mantissa) - 1);
  if (exponent == (1u << exponent_bits) - 1) {
    return mantissa ? std::numeric_limits<double>::quiet_NaN()
                    : sign * std::numeric_limits<double>::infinity();
  }
  const uint32_t units = exponent == 0 ? mantissa : mantissa + (1u << format.mantissa);
  const int shift = (exponent == 0 ? 1 : static_cast<int>(exponent)) - 1 + format.min_exponent;
  return sign * std::ldexp(units, shift - format.mantissa);
}

size_t SizeOf(DType dtype) { return dtype == DType::kF32 ? 4 : 2; }

}  // namespace

Tensor::Tensor(DType dtype, int64_t size)
    : dtype_(dtype), size_(size), bytes_(static_cast<size_t>(size) * SizeOf(dtype), '\xff') {}

Tensor::Tensor(DType dtype, const std::vector<double>& values)
    : Tensor(dtype, static_cast<int64_t>(values.size())) {
  for (int64_t i = 0; i < size_; ++i) Set(i, values[static_cast<size_t>(i)]);
}

double Tensor::operator[](int64_t i) const {
  uint32_t bits = 0;  // little-endian machines only
  std::memcpy(&bits, bytes_.data() + static_cast<size_t>(i) * SizeOf(dtype_), SizeOf(dtype_));
  return Decode(dtype_, bits);
}

void Tensor::Set(int64_t i, double value) {
  const uint32_t bits = Encode(dtype_, value);
  std::memcpy(bytes_.data() + static_cast<size_t>(i) * SizeOf(dtype_), &bits, SizeOf(dtype_));
}

std::vector<double> RandomValues(std::mt19937_64& random, int64_t size, double outlier) {
  std::normal_distribution<double> normal;
  std::vector<double> values(static_cast<size_t>(size));
  for (double& value : values) value = normal(random) * (random() % 50 == 0 ? outlier : 1.0);
  return values;
}

double Epsilon(DType dtype) { return std::ldexp(1.0, -FormatOf(dtype).mantissa); }
const char* Name(DType dtype) {
  return dtype == DType::kF32 ? "f32" : dtype == DType::kF16 ? "f16" : "bf16";
}

void Error::Add(const Tensor& got, int64_t i, double want, double magnitude) {
  const double value = got[i];
  // What a rounding of `want` to the type gives may be inf.
  const Tensor rounded(got.dtype(), std::vector<double>{want});
  if (std::isnan(want) || std::isnan(value)) {
    if (std::isnan(want) != std::isnan(value)) max_ = HUGE_VAL;
  } else if (std::isinf(rounded[0]) || std::isinf(value)) {
    if (rounded[0] != value) max_ = HUGE_VAL;
  } else {
    const double smallest = std::ldexp(1.0, FormatOf(got.dtype()).min_exponent);
    const double unit = Epsilon(got.dtype()) * std::fmax(std::fabs(magnitude), smallest);
    Merge(std::fabs(value - want) / unit);
  }
}

struct Pool::State {
  std::vector<std::thread> workers;
  std::mutex mutex;
  std::condition_variable wake, done;
  std::atomic<int64_t> next{0};
  int64_t count = 0, generation = 0, busy = 0;
  void* context = nullptr;
  void (*body)(void*, int64_t) = nullptr;
  bool stop = false;

  void TakeAll() {
    for (int64_t i; (i = next.fetch_add(1)) < count;) body(context, i);
  }
  void Work() {
    int64_t seen = 0;
    std::unique_lock lock(mutex);
    while (true) {
      wake.wait(lock, [&] { return stop || generation != seen; });
      if (stop) return;
      seen = generation;
      lock.unlock();
      TakeAll();
      lock.lock();
      if (--busy == 0) done.notify_one();
    }
  }
};

Pool::Pool(int threads) : state_(new State) {
  for (int i = 1; i < threads; ++i) {
    state_->workers.emplace_back([state = state_] { state->Work(); });
  }
}

Pool::~Pool() {
  {
    std::lock_guard lock(state_->mutex);
    state_->stop = true;
  }
  state_->wake.notify_all();
  for (std::thread& worker : state_->workers) worker.join();
  delete state_;
}

Launch Pool::launch() {
  return {state_, static_cast<int64_t>(state_->workers.size()) + 1,
          [](void* pool, int64_t count, void* context, void (*body)(void*, int64_t)) {
            State& state = *static_cast<State*>(pool);
            {
              std::lock_guard lock(state.mutex);
              state.count = count;
              state.context = context;
              state.body = body;
              state.next = 0;
              state.busy = static_cast<int64_t>(state.workers.size());
              ++state.generation;
            }
            state.wake.notify_all();
            state.TakeAll();
            std::unique_lock lock(state.mutex);
            state.done.wait(lock, [&] { return state.busy == 0; });
          }};
}

double BestTime(const std::function<void()>& run) {
  using Clock = std::chrono::steady_clock;
  double best = HUGE_VAL, total = 0;
  for (int i = 0; i < 5 || (total < 600 && i < 200); ++i) {
    const auto start = Clock::now();
    run();
    const double ms = std::chrono::duration<double, std::milli>(Clock::now() - start).count();
    best = std::fmin(best, ms);
    total += ms;
  }
  return best;
}

void Report::Add(const std::string& what, const CpuKernels& kernels, DType dtype, double ulps,
                 double limit) {
  const bool fails = !(ulps <= limit);
  failures_ += fails;
  std::printf("%-44s %-9s %-5s max error %8.2f ulp  limit %6.1f%s\n", what.c_str(), kernels.isa,
              Name(dtype), ulps, limit, fails ? "  FAILED" : "");
}

void Report::Require(bool holds, const std::string& claim) {
  if (holds) return;
  ++failures_;
  std::printf("FAILED: %s\n", claim.c_str());
}

void Report::Time(const std::string& what, const CpuKernels& kernels, DType dtype, double ms,
                  double ops_per_ns, const char* unit) {
  std::printf("%-44s %-9s %-5s %9.3f ms  %8.1f %s\n", what.c_str(), kernels.isa, Name(dtype), ms,
              ops_per_ns, unit);
}

}  // namespace zenith::test
