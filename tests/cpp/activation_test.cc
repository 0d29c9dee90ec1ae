#include <cmath>
#include <limits>

#include "tests/cpp/harness.h"

namespace zenith::test {
namespace {

constexpr Activation kKinds[] = {Activation::kGeluErf, Activation::kGeluTanh, Activation::kSilu};
const char* Name(Activation kind) {
  return kind == Activation::kGeluErf    ? "gelu_erf"
         : kind == Activation::kGeluTanh ? "gelu_tanh"
                                         : "silu";
}

struct Oracle {
  double value, derivative;
  double value_magnitude, derivative_magnitude;  // what errors are relative to
};

Oracle Exact(Activation kind, double x) {
  if (std::isinf(x)) return x < 0 ? Oracle{NAN, 0, NAN, 1} : Oracle{x, 1, x, 1};
  if (kind == Activation::kGeluErf) {
    const double phi = std::erfc(-x / std::sqrt(2.0)) / 2;
    const double slope = x * std::exp(-x * x / 2) / std::sqrt(2 * M_PI);
    return {x * phi, phi + slope, x * phi, phi + std::fabs(slope)};
  }
  const double c = std::sqrt(2 / M_PI);
  const bool tanh = kind == Activation::kGeluTanh;
  const double u = tanh ? 2 * c * (x + 0.044715 * x * x * x) : x;
  const double du = tanh ? 2 * c * (1 + 3 * 0.044715 * x * x) : 1;
  const double s = 1 / (1 + std::exp(-u));
  const double slope = x * s * du / (1 + std::exp(u));
  // exp(u) multiplies the rounding of u in float32 by |u|, in any float32 implementation.
  const double conditioning = 1 + (tanh ? std::fmin(std::fabs(u), 100) : 0);
  return {x * s, s + slope, x * s * conditioning, (s + std::fabs(slope)) * conditioning};
}

std::vector<double> Inputs(std::mt19937_64& random, int64_t size) {
  std::vector<double> x = RandomValues(random, size, 10.0);
  const double inf = std::numeric_limits<double>::infinity();
  const double special[] = {0.0,  -0.0,  inf,   -inf, std::nan(""), 1e-30, -1e-30, 1e30,  -1e30,
                            1e-7, -1e-7, -12.9, 5.5,  -88.0,        -90.0, 200.0,  -200.0};
  for (size_t i = 0; i < x.size() && i < std::size(special); ++i) {
    if (size > 100) x[i] = special[i];
  }
  return x;
}

/// `halves`: gate and value are those of one array, the value first.
void TestGated(const CpuKernels& kernels, DType dtype, Activation kind, int64_t rows, int64_t cols,
               bool halves, Error* forward, Error* backward, Report& report) {
  Pool pool(4);
  std::mt19937_64 random(2);
  const int64_t size = rows * cols, stride = halves ? 2 * cols : cols;
  const int64_t bytes = dtype == DType::kF32 ? 4 : 2;
  const Tensor gates(dtype, Inputs(random, rows * stride));
  const Tensor values(dtype, RandomValues(random, rows * stride, 10.0));
  const Tensor dy(dtype, RandomValues(random, size, 10.0));
  Tensor y(dtype, size), dgates(dtype, rows * stride), dvalues(dtype, rows * stride);
  const int64_t gate_at = halves ? cols : 0;
  const void* const gate = static_cast<const char*>(gates.data()) + gate_at * bytes;
  const void* const value = halves ? gates.data() : values.data();
  void* const dgate = static_cast<char*>(dgates.data()) + gate_at * bytes;
  void* const dvalue = halves ? dgates.data() : dvalues.data();
  const Status status = kernels.gated_forward(
      {kind, dtype, rows, cols, stride, gate, value, y.data()}, pool.launch());
  report.Require(status.ok(), "gated forward returns ok");
  (void)kernels.gated_backward(
      {kind, dtype, rows, cols, stride, gate, value, dy.data(), dgate, dvalue}, pool.launch());
  for (int64_t i = 0; i < size; ++i) {
    const int64_t at = i / cols * stride + i % cols;
    const Oracle want = Exact(kind, gates[at + gate_at]);
    const double v = halves ? gates[at] : values[at];
    // f and f' may be subnormal before they are multiplied.
    const double value_magnitude = std::fabs(want.value_magnitude) + 1e-35;
    forward->Add(y, i, want.value * v, value_magnitude * v);
    const double magnitude = (want.derivative_magnitude + 1e-35) * dy[i] * v;
    backward->Add(dgates, at + gate_at, want.derivative * v * dy[i], magnitude);
    backward->Add(halves ? dgates : dvalues, at, want.value * dy[i], value_magnitude * dy[i]);
  }
}

}  // namespace

void TestActivation(const CpuKernels& kernels, Report& report) {
  Pool pool(4);
  const Launch launch = pool.launch();
  const Launch serial{nullptr, 1, nullptr};
  for (const DType dtype : kDTypes) {
    for (const Activation kind : kKinds) {
      std::mt19937_64 random(1);
      Error forward, backward;
      for (const int64_t size : {0, 1, 3, 4, 7, 8, 15, 16, 17, 31, 33, 100, 1000, 200001}) {
        const Tensor x(dtype, Inputs(random, size)), dy(dtype, RandomValues(random, size, 100.0));
        Tensor y(dtype, size), dx(dtype, size), y_serial(dtype, size);
        const Status status =
            kernels.activation_forward({kind, dtype, size, x.data(), y.data()}, launch);
        report.Require(status.ok(), "activation forward returns ok");
        (void)kernels.activation_forward({kind, dtype, size, x.data(), y_serial.data()}, serial);
        report.Require(y.SameBits(y_serial), "activation does not depend on threads");
        (void)kernels.activation_backward({kind, dtype, size, x.data(), dy.data(), dx.data()},
                                          launch);
        for (int64_t i = 0; i < size; ++i) {
          const Oracle want = Exact(kind, x[i]);
          forward.Add(y, i, want.value, want.value_magnitude);
          // The derivative's factors may be subnormal before dy multiplies them.
          const double magnitude = want.derivative_magnitude + 1e-35;
          backward.Add(dx, i, want.derivative * dy[i], magnitude * dy[i]);
        }
      }
      Error gated, gated_backward;
      for (const int64_t cols : {1, 7, 16, 33, 2000, 70001}) {
        for (const bool halves : {false, true}) {
          TestGated(kernels, dtype, kind, cols > 10000 ? 2 : 5, cols, halves, &gated,
                    &gated_backward, report);
        }
      }
      const double limit = dtype == DType::kF32 ? 6.0 : 0.6;
      report.Add(std::string("gated ") + Name(kind) + " forward", kernels, dtype, gated.max(),
                 limit);
      report.Add(std::string("gated ") + Name(kind) + " backward", kernels, dtype,
                 gated_backward.max(), limit);
      report.Add(std::string(Name(kind)) + " forward", kernels, dtype, forward.max(), limit);
      report.Add(std::string(Name(kind)) + " backward", kernels, dtype, backward.max(), limit);
    }
  }
}

void TimeActivation(const CpuKernels& kernels, const Launch& launch, Report& report) {
  const int64_t size = 4096 * 1024;
  std::mt19937_64 random(1);
  for (const DType dtype : kDTypes) {
    const Tensor x(dtype, RandomValues(random, size)), dy(dtype, RandomValues(random, size));
    Tensor y(dtype, size);
    const double gb = static_cast<double>(size) * (dtype == DType::kF32 ? 4 : 2) * 1e-6;
    for (const Activation kind : kKinds) {
      const double forward = BestTime([&] {
        (void)kernels.activation_forward({kind, dtype, size, x.data(), y.data()}, launch);
      });
      report.Time(std::string(Name(kind)) + " 4096x1024", kernels, dtype, forward, 2 * gb / forward,
                  "GB/s");
      const double backward = BestTime([&] {
        (void)kernels.activation_backward({kind, dtype, size, x.data(), dy.data(), y.data()},
                                          launch);
      });
      report.Time(std::string(Name(kind)) + " backward 4096x1024", kernels, dtype, backward,
                  3 * gb / backward, "GB/s");
    }
  }
}

}  // namespace zenith::test
