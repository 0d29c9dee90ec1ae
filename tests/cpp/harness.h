// What the kernel tests share: tensors of any storage type, a thread pool, comparison, timing.
#pragma once

#include <cstdint>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "ffi/cpu/dispatch.h"
#include "ffi/cpu/launch.h"

namespace zenith::test {

/// A float tensor in one of the storage types, with the values a kernel sees as float64. Allocated
/// to the byte, so that AddressSanitizer sees any access beyond it.
class Tensor {
 public:
  Tensor() = default;
  /// Every byte 0xff, a NaN in all types: what is not overwritten shows.
  Tensor(DType dtype, int64_t size);
  Tensor(DType dtype, const std::vector<double>& values);

  DType dtype() const { return dtype_; }
  int64_t size() const { return size_; }
  void* data() { return bytes_.data(); }
  const void* data() const { return bytes_.data(); }
  double operator[](int64_t i) const;
  void Set(int64_t i, double value);
  bool SameBits(const Tensor& other) const { return bytes_ == other.bytes_; }

 private:
  DType dtype_ = DType::kF32;
  int64_t size_ = 0;
  std::vector<char> bytes_;
};

/// Standard normal values; one in fifty times `outlier`.
std::vector<double> RandomValues(std::mt19937_64& random, int64_t size, double outlier = 1.0);

/// Distance of 1 to the next float of the type.
double Epsilon(DType dtype);
const char* Name(DType dtype);
inline constexpr DType kDTypes[] = {DType::kF32, DType::kF16, DType::kBF16};

/// The largest |got - want| / (epsilon * magnitude) over a tensor, infinite where one is NaN or inf
/// and the other is not.
class Error {
 public:
  /// `magnitude`: of the terms that `want` is the sum of.
  void Add(const Tensor& got, int64_t i, double want, double magnitude);
  void Merge(double ulps) { max_ = ulps > max_ ? ulps : max_; }
  double max() const { return max_; }

 private:
  double max_ = 0;
};

/// `threads` - 1 workers and the caller take indices from one counter.
class Pool {
 public:
  explicit Pool(int threads);
  ~Pool();
  Launch launch();

 private:
  struct State;
  State* state_;
};

/// Milliseconds of the fastest of some runs.
double BestTime(const std::function<void()>& run);

/// Collects the rows of the table; what is worse than its limit fails the program.
class Report {
 public:
  void Add(const std::string& what, const CpuKernels& kernels, DType dtype, double ulps,
           double limit);
  void Require(bool holds, const std::string& claim);
  void Time(const std::string& what, const CpuKernels& kernels, DType dtype, double ms,
            double ops_per_ns, const char* unit);
  int failures() const { return failures_; }

 private:
  int failures_ = 0;
};

void TestActivation(const CpuKernels& kernels, Report& report);
void TestSoftmax(const CpuKernels& kernels, Report& report);
void TestCrossEntropy(const CpuKernels& kernels, Report& report);
void TestNorm(const CpuKernels& kernels, Report& report);
void TestGroupNorm(const CpuKernels& kernels, Report& report);
void TestAttention(const CpuKernels& kernels, Report& report);
void TestLinear(const CpuKernels& kernels, Report& report);
void TestConv(const CpuKernels& kernels, Report& report);
void TestQuantizedLinear(const CpuKernels& kernels, Report& report);

void TimeActivation(const CpuKernels& kernels, const Launch& launch, Report& report);
void TimeSoftmax(const CpuKernels& kernels, const Launch& launch, Report& report);
void TimeNorm(const CpuKernels& kernels, const Launch& launch, Report& report);
void TimeAttention(const CpuKernels& kernels, const Launch& launch, Report& report);
void TimeLinear(const CpuKernels& kernels, const Launch& launch, Report& report);

}  // namespace zenith::test
